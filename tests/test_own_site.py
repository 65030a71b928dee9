"""What the site's extension makes of a page, and the tags it keeps with an address and without."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

SITE = runpy.run_path(str(Path(__file__).parents[1] / "book" / "site" / "own_site.py"))
TAGS = (
    '<meta property="og:title" content="A &quot;title&quot;" />\n'
    '<meta property="og:url" content="{0}book/01_clips.html" />\n'
    '<meta property="og:image" content="{0}_images/card.png" />\n'
    '<meta property="og:image:alt" content="words" />\n'
)


def app(folder, address=""):
    """What the handlers need of Sphinx."""
    config = SimpleNamespace(
        html_baseurl=address, root_doc="book/index", html_theme_options={"a": 1}
    )
    builder = SimpleNamespace(format="html", get_target_uri=lambda name: f"{name}.html")
    return SimpleNamespace(config=config, builder=builder, env=SimpleNamespace(), outdir=folder)


def test_one_setting_gives_every_address(tmp_path):
    sphinx = app(tmp_path, "https://example.org/book/")
    SITE["settle"](sphinx, sphinx.config)
    assert sphinx.config.ogp_site_url == "https://example.org/book/"
    assert sphinx.config.html_theme_options["a"] == 1
    for name in ("image_light", "image_dark"):
        assert (
            Path(__file__).parents[1] / sphinx.config.html_theme_options["logo"][name]
        ).is_file()


@pytest.mark.parametrize("address", ["", "https://example.org/book/"])
def test_the_root_has_the_first_page_s_tags(tmp_path, address):
    sphinx, context = app(tmp_path, address), {"metatags": TAGS.format(address)}
    SITE["finish"](sphinx, "book/index", "page.html", context, None)
    SITE["lead_on"](sphinx, None)
    root = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'content="0; url=book/index.html"' in root
    assert 'og:title" content="A &quot;title&quot;"' in root
    assert "og:image:alt" in root
    for name in ("og:url", "og:image"):
        assert (f'"{name}" content="https://example.org/book/' in root) == bool(address)
        assert (f'"{name}"' in root) == bool(address)


def test_clips_load_late_and_are_no_different_otherwise():
    clip = '<video src="a.mp4" title="autoplay" autoplay loop muted playsinline>a clip</video>'
    code = "&lt;video autoplay loop&gt;"  # shown as text
    late = SITE["late"](clip + code)
    assert late.startswith('<video src="a.mp4" title="autoplay" preload="none" controls loop muted')
    assert late.endswith(code)


def test_pictures_whose_size_is_known_load_late():
    sized, unsized = '<img src="a" width="3" height="3">', '<img src="b" style="width: 100%">'
    assert SITE["late"](sized + unsized) == sized.replace("<img", '<img loading="lazy"') + unsized


def test_figures_become_lighter_and_no_other(tmp_path):
    images, name = tmp_path / "_images", "0f" * 32
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 4), np.uint8)
    for path in (f"{name}.png", "screen.png"):
        Image.fromarray(pixels).save(images / path)
    page = tmp_path / "page.html"
    page.write_text(f'<img src="_images/{name}.png"><img src="_images/screen.png">')
    SITE["lighten"](app(tmp_path), None)
    assert page.read_text() == f'<img src="_images/{name}.webp"><img src="_images/screen.png">'
    assert {path.name for path in images.iterdir()} == {f"{name}.webp", "screen.png"}
    with Image.open(images / f"{name}.webp") as picture:
        assert np.array_equal(np.asarray(picture), pixels)


def test_a_page_is_read_aloud_by_its_words():
    fold = '<summary aria-label="Toggle hidden content">\n<span>Show</span></summary>'
    signature = '<span class="sig-paren">(</span>\n\n<dl>\n<dd>a,</dd>\n<dd>b,</dd>\n</dl>\n\n'
    terms = "<dl><dt>term</dt><dd>words</dd></dl>"
    named = SITE["named"](fold + signature + terms)
    assert "<summary>\n<span>Show" in named
    assert named.count('<dd role="presentation">') == 2
    assert '<dl role="presentation">' in named
    assert named.endswith(terms)
