"""Sphinx extension: launch buttons that open the published notebooks, and notebooks to download.

The theme makes the buttons from _config.yml. It would open a chapter's Markdown, which Colab can't,
and offer for download what myst-nb has executed, with all of MyST in it.
"""

import re
from pathlib import Path
from typing import Any

from addresses import BRANCH, ROOT, known
from convert import notebook
from labels import with_code
from nbformat import writes
from sphinx.application import Sphinx
from sphinx.config import Config


def set_addresses(app: Sphinx, config: Config) -> None:
    """Tells the theme where the repository is; without an address there are no buttons."""
    where, options = known(), config.html_theme_options
    options["repository_url"] = where.repository
    options["repository_branch"] = BRANCH
    options["use_repository_button"] = bool(where.repository)
    if not where.repository:
        options["launch_buttons"] = {}
    if where.site:
        config.html_baseurl = f"{where.site}/"


def open_notebooks(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Makes a page's launch buttons open its notebook; pages that have none lose them."""
    has_notebook = ROOT / f"{page}.md" in with_code()
    for group in list(context["header_buttons"]):
        if group.get("label") != "launch-buttons":
            continue
        if not has_notebook:
            context["header_buttons"].remove(group)
        for button in group["buttons"]:
            button["url"] = re.sub(rf"({re.escape(page)})\.md\b", r"\1.ipynb", button["url"])


def offer_notebook(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any
) -> None:
    """Makes the theme offer a page's notebook for download."""
    if ROOT / f"{page}.md" in with_code():
        context["ipynb_source"] = f"{page}.ipynb"
    else:
        context.pop("ipynb_source", None)


def write_notebooks(app: Sphinx, exception: Exception | None) -> None:
    """Puts the notebooks to download where the theme looks for them."""
    if exception is None and app.builder.format == "html":
        for path in with_code():
            name = path.relative_to(ROOT).with_suffix(".ipynb")
            target = Path(app.outdir) / "_sources" / name
            target.write_text(writes(notebook(path, known())) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the above: before other extensions read the address, and around the theme's 501."""
    app.connect("config-inited", set_addresses, priority=100)
    app.connect("html-page-context", open_notebooks, priority=502)
    app.connect("html-page-context", offer_notebook, priority=500)
    app.connect("build-finished", write_notebooks)
    return {"parallel_read_safe": True}
