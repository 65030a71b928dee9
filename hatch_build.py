"""What a build adds to the package's metadata: addresses, where _config.yml or a workflow has one.

README's links lead into the repository; on the package index's page they need its address.
"""

import re
import sys
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "book" / "notebooks"))


def absolute(readme: str, repository: str, version: str) -> str:
    """README with links and pictures of this version in the repository."""
    files = f"{repository}/{{}}/v{version}/"
    readme = re.sub(r"(!\[[^\]]*\]\()(?!https?://)", rf"\g<1>{files.format('raw')}", readme)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?![a-z]+://|#)", rf"\g<1>{files.format('blob')}", readme)


class Metadata(MetadataHookInterface):
    """Fills in what pyproject.toml calls dynamic."""

    def update(self, metadata: dict) -> None:
        """Changes the table [project] in place."""
        from addresses import known

        where, readme = known(), (ROOT / "README.md").read_text(encoding="utf-8")
        if where.repository:
            readme = absolute(readme, where.repository, metadata["version"])
            changes = f"{where.repository}/blob/main/CHANGELOG.md"
            metadata["urls"] = {"Repository": where.repository, "Changelog": changes}
            if where.site:
                metadata["urls"]["Book"] = where.site
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
