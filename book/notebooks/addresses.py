"""Where the book, its repository and its notebooks are, as far as that is known.

_config.yml has the repository's address, and the site's where it isn't that of GitHub's Pages.
Where it has none and a workflow of GitHub builds, it is the workflow's own repository.
"""

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Addresses:
    """Addresses without a slash at their end; "" where one isn't known."""

    repository: str
    site: str
    package: str  # what pip is told to install


def project() -> dict:
    """The table [project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pages_of(repository: str) -> str:
    """Where GitHub's Pages put the site of a repository; "" for repositories elsewhere."""
    found = re.fullmatch(r"https://github\.com/([^/]+)/([^/]+)", repository)
    if not found:
        return ""
    owner, name = found.groups()
    host = f"{owner.lower()}.github.io"
    return f"https://{host}" if name.lower() == host else f"https://{host}/{name}"


def known() -> Addresses:
    """What _config.yml says, or else the environment of a workflow.

    There, notebooks install the package as it is in the commit that they are made from; elsewhere,
    from the package index.
    """
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    repository, commit = config["repository"]["url"], os.environ.get("GITHUB_SHA", "")
    if not repository and "GITHUB_REPOSITORY" in os.environ:
        repository = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
    repository = repository.rstrip("/").removesuffix(".git")
    site = config["html"].get("baseurl", "").rstrip("/") or pages_of(repository)
    package = f"tinyvgpt>={project()['version']}"
    if repository and commit:
        package = f"tinyvgpt @ {repository}/archive/{commit}.zip"
    return Addresses(repository, site, package)
