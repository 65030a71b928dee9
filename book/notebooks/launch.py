"""Sphinx extension: launch buttons that open the published notebooks, and notebooks to download.

The theme makes the buttons from _config.yml. It would open a chapter's Markdown, which Colab can't,
and offer for download what myst-nb has executed, with all of MyST in it.
"""

from pathlib import Path
from typing import Any

from addresses import ROOT, known
from convert import notebook
from labels import with_code
from nbformat import writes
from sphinx.application import Sphinx
from sphinx.config import Config


def set_addresses(app: Sphinx, config: Config) -> None:
    """Tells the theme where the repository is; without an address there are no buttons."""
    where, options = known(), config.html_theme_options
    options["repository_url"] = where.repository
    options["use_repository_button"] = bool(where.repository)
    if not where.repository:
        options["launch_buttons"] = {}
    if where.site:
        config.html_baseurl = f"{where.site}/"


def has_notebook(page: str) -> bool:
    """Whether a page is published as a notebook."""
    return ROOT / f"{page}.md" in with_code()


def offer_notebook(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any
) -> None:
    """Makes the theme offer a page's notebook for download, with launch buttons or without."""
    if has_notebook(page):
        context["ipynb_source"] = f"{page}.ipynb"


def open_notebooks(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any
) -> None:
    """Makes a page's launch buttons open its notebook; pages that have none lose their buttons."""
    labelled = {group.get("label"): group for group in context["header_buttons"]}
    launch, download = labelled.get("launch-buttons"), labelled.get("download-buttons")
    if has_notebook(page) and launch:
        for button in launch["buttons"]:
            button["url"] = button["url"].replace(f"{page}.md", f"{page}.ipynb")
    elif launch:
        context["header_buttons"].remove(launch)
        kept = [b for b in download["buttons"] if b["label"] != "download-notebook-button"]
        download["buttons"] = kept


def write_notebooks(app: Sphinx, exception: Exception | None) -> None:
    """Puts the notebooks to download where the theme looks for them, and no others."""
    if exception is None and app.builder.format == "html":
        where, folder = known(), Path(app.outdir) / "_sources"
        for stray in folder.rglob("*.ipynb"):
            stray.unlink()
        for path in with_code():
            target = folder / path.relative_to(ROOT).with_suffix(".ipynb")
            target.write_text(writes(notebook(path, where)) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the above: before other extensions read the address, and around the theme's 501."""
    app.connect("config-inited", set_addresses, priority=100)
    app.connect("html-page-context", open_notebooks, priority=502)
    app.connect("html-page-context", offer_notebook, priority=500)
    app.connect("build-finished", write_notebooks)
    return {"parallel_read_safe": True}
