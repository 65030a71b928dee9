"""What needs no browser: links and anchors, alternative texts, bytes, tags for shared links."""

import re
from functools import cache
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from looking import CHAPTERS, PAGES, SITE, Elements

pytestmark = pytest.mark.site
BUDGET = 1_500_000  # bytes that only this page needs
each_page = pytest.mark.parametrize("page", PAGES)
each_chapter = pytest.mark.parametrize("page", CHAPTERS)


@cache
def elements(page):
    return Elements(page)


@cache
def anchors(page):
    return set(elements(page).values("id", "name"))


def inside(page, address):
    """The site's file that an address on a page names, and the anchor; None for other sites'."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    path = urljoin(page, unquote(parts.path)) if parts.path else page
    return path, unquote(parts.fragment)


def test_the_site_is_built():
    assert {"search.html", "genindex.html", "book/index.html"} <= set(PAGES), "first: make book"
    assert len(CHAPTERS) > 20


def test_the_root_leads_to_the_first_page():
    (refresh,) = (found for found in elements("index.html").all("meta") if "http-equiv" in found)
    assert (SITE / refresh["content"].partition("url=")[2]).is_file()


@each_page
def test_links_and_anchors_lead_somewhere(page):
    lost = []
    for address in elements(page).values("href", "src", "poster"):
        if (target := inside(page, address)) is None:
            continue
        path, anchor = target
        assert not path.startswith("../"), f"{address} leads out of the site"
        path = path + "index.html" if path.endswith("/") else path
        missing = not (SITE / path).is_file()
        if missing or (path.endswith(".html") and anchor and anchor not in anchors(path)):
            lost.append(address)
    assert lost == []


@each_page
def test_what_is_to_be_seen_is_said(page):
    found = elements(page)
    assert [img.get("src") for img in found.all("img") if not (img.get("alt") or "").strip()] == []
    assert [clip["src"] for clip in found.all("video") if not clip.get("aria-label")] == []
    text = (SITE / page).read_text(encoding="utf-8")
    assert text.count("<figure") == text.count("<figcaption")


@each_page
def test_clips_wait_until_they_are_seen(page):
    for clip in elements(page).all("video"):
        assert clip["preload"] == "none"
        assert "autoplay" not in clip
        assert {"loop", "muted", "playsinline", "poster"} <= clip.keys()


@each_page
def test_a_page_is_not_heavy(page):
    """The page with its pictures and clips; scripts, styles and fonts are the whole site's."""
    media = {
        target[0]
        for one in elements(page).all("img", "video", "source")
        for key in ("src", "poster")
        if one.get(key) and (target := inside(page, one[key]))
    }
    sizes = {name: (SITE / name).stat().st_size for name in {page, *media}}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert sum(sizes.values()) <= BUDGET, f"{sum(sizes.values()):,} bytes: {largest}"


@each_page
def test_scripts_of_widgets_are_where_widgets_are(page):
    text = (SITE / page).read_text(encoding="utf-8")
    scripts = [src for src in elements(page).values("src") if "vendor/widgets/" in src]
    assert bool(scripts) == ("application/vnd.jupyter.widget-view+json" in text)


@each_chapter
def test_a_shared_link_shows_what_it_is(page):
    tags = {
        tag["property"]: tag["content"] for tag in elements(page).all("meta") if "property" in tag
    }
    assert tags["og:site_name"] == "tinyvgpt"
    assert tags["og:title"]
    assert len(tags["og:description"]) > 20
    card = f"_images/social_previews/summary_{page.removesuffix('.html').replace('/', '_')}_*.png"
    (drawn,) = SITE.glob(card)
    for needs_address in ("og:image", "og:url"):  # absolute, or there is none to be had
        assert re.match(r"https://.+/", tags.get(needs_address, "https://absent/"))
    if "og:image" in tags:
        assert tags["og:image"].endswith(drawn.relative_to(SITE).as_posix())
        assert tags["og:url"].endswith(page)
