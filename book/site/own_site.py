"""What this book's site adds to the theme: its mark, tags for shared links, light pages.

The site's address stands once, as `html: baseurl` in _config.yml. Tags that need an absolute
address, a page's own and that of its card, are left out while there is none.
"""

import re
from pathlib import Path
from typing import Any

from PIL import Image
from sphinx.application import Sphinx
from sphinx.config import Config

LOGO = {
    "image_light": "book/_static/logo.svg",
    "image_dark": "book/_static/logo-dark.svg",
    "alt_text": "tinyvgpt",  # the mark alone says nothing to who cannot see it
    "text": "tinyvgpt",
}


def settle(app: Sphinx, config: Config) -> None:
    """Adds to the theme's options, most of which Jupyter Book sets."""
    config.html_theme_options = {**config.html_theme_options, "logo": LOGO}
    config.ogp_site_url = config.html_baseurl


def without_address(tags: str) -> str:
    """A page's tags but for those that would need the site's address."""
    return re.sub(r'<meta property="og:(?:url|image)" [^>]*>\n?', "", tags)


def late(body: str) -> str:
    """The page with clips, and pictures of a known size, that load when they come into view.

    There clips.js starts the clips. Without scripts they have controls and a picture of their first
    frame.
    """
    body = re.sub(r"(<video\b[^>]*) autoplay\b", r'\1 preload="none" controls', body)
    return re.sub(r"<img (?=[^>]*\bheight=)", '<img loading="lazy" ', body)


def named(body: str) -> str:
    """The page as it should be read aloud.

    What unfolds is called by the words on it; neither signatures nor the bibliography are lists.
    """
    body = re.sub(r'(<summary\b[^>]*) aria-label="[^"]*"', r"\1", body)
    body = re.sub(r' role="doc-biblioentry"| role="list"(?= class="citation-list")', "", body)
    silent = ' role="presentation"'  # parameters a line each, in what is itself a term
    lines = re.compile(r"(?<=</span>)\s*<dl>\s*(<dd>.*?)</dl>", re.DOTALL)
    return lines.sub(
        lambda found: f"<dl{silent}>{found[1].replace('<dd>', f'<dd{silent}>')}</dl>", body
    )


def finish(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Last changes to a page."""
    if not app.config.html_baseurl:
        context["metatags"] = without_address(context.get("metatags", ""))
    if "body" in context:
        context["body"] = named(late(context["body"]))
    if pagename == app.config.root_doc:
        app.env.own_root_tags = context["metatags"]


ROOT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<meta http-equiv="refresh" content="0; url={page}">
{tags}</head>
<body><a href="{page}">{title}</a></body>
</html>
"""


def lead_on(app: Sphinx, exception: Exception | None) -> None:
    """Writes the site's root, which leads to the first page and is shared with that page's tags."""
    tags = getattr(app.env, "own_root_tags", None)
    if exception is None and tags is not None and app.builder.format == "html":
        page = app.builder.get_target_uri(app.config.root_doc)
        text = ROOT.format(title=LOGO["text"], page=page, tags=tags)
        Path(app.outdir, "index.html").write_text(text, encoding="utf-8")


FIGURE = re.compile(r"(_images/[0-9a-f]{64})\.png")  # as myst_nb calls what a cell has drawn


def lighten(app: Sphinx, exception: Exception | None) -> None:
    """Keeps figures as lossless WebP, a third of their PNG files."""
    if exception is not None or app.builder.format != "html":
        return
    for drawn in Path(app.outdir, "_images").glob("*.png"):
        if FIGURE.search(drawn.as_posix()):
            with Image.open(drawn) as picture:
                picture.save(drawn.with_suffix(".webp"), lossless=True, quality=80, exact=True)
            drawn.unlink()
    for page in Path(app.outdir).glob("**/*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(FIGURE.sub(r"\1.webp", text), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("config-inited", settle)
    app.connect("html-page-context", finish, priority=900)  # after sphinxext.opengraph
    app.connect("build-finished", lighten)
    app.connect("build-finished", lead_on, priority=100)  # before sphinx_external_toc's
    return {"parallel_read_safe": True, "parallel_write_safe": True}
