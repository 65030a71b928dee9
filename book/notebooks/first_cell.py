"""The first cell of a published notebook: it installs what is missing, and nothing else."""

from addresses import Addresses, project

SOURCE = '''\
# @title Install what is missing here
import importlib, shutil, subprocess, sys
from importlib.metadata import PackageNotFoundError, version
from packaging.requirements import Requirement

PACKAGE = "{package}"
NEEDS = [
    PACKAGE,
{needs}
]
if shutil.which("nvidia-smi"):
    NEEDS += [{cuda}]  # compiles kernels

def lacks(need):
    """Whether a package is missing, or older than it may be."""
    need = Requirement(need)
    try:
        return not need.specifier.contains(version(need.name), prereleases=True)
    except PackageNotFoundError:
        return True

lacking = [need for need in NEEDS if lacks(need)]
if lacking:
    if not lacks("torch"):  # the PyTorch that is here stays as it is
        lacking.append(f"torch=={{version('torch')}}")
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", *lacking])
    importlib.invalidate_caches()'''


def first_cell(where: Addresses) -> str:
    """Its code. What chapters need beside the package is the extra `chapters`."""
    extras = project()["optional-dependencies"]
    needs = [f'    "{need}",' for need in extras["chapters"]]
    cuda = ", ".join(f'"{need}"' for need in extras["cuda"])
    return SOURCE.format(package=where.package, needs="\n".join(needs), cuda=cuda)
