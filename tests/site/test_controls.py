"""What a reader does: search, switch themes, stop clips, by keyboard; a site without a server."""

import pytest
from looking import SITE, Looking

pytestmark = pytest.mark.site
FIRST = "book/index.html"


def test_the_search_finds_a_word_and_its_page(looking):
    looking.open(FIRST)
    looking.window.keyboard.press("Control+k")
    looking.window.keyboard.type("codebook")
    looking.window.keyboard.press("Enter")
    looking.window.wait_for_selector("#search-results li a")
    found = [link.get_attribute("href") for link in looking.all("#search-results li a")]
    assert any("04_codebook" in address for address in found)
    looking.window.click('#search-results li a[href*="04_codebook"]')
    assert "codebook" in looking.window.title()
    assert looking.errors == looking.failed == looking.outside == []


def test_a_clip_stops_and_goes_on_by_keyboard(looking):
    looking.open(FIRST)
    clip = looking.window.wait_for_selector("video")
    paused = "([clip, wanted]) => clip.paused === wanted"
    looking.window.wait_for_function(paused, arg=[clip, False])
    for _ in range(200):
        if looking.run("() => document.activeElement.tagName") == "VIDEO":
            break
        looking.window.keyboard.press("Tab")
    else:
        raise AssertionError("no number of Tabs leads to the clip")
    assert clip.evaluate("clip => getComputedStyle(clip).outlineWidth") == "3px"
    for key, wanted in (("Space", True), ("Enter", False)):
        looking.window.keyboard.press(key)
        looking.window.wait_for_function(paused, arg=[clip, wanted])
    clip.click()
    looking.window.wait_for_function(paused, arg=[clip, True])


def test_the_theme_is_switched_by_keyboard(looking):
    looking.open(FIRST)
    theme = "() => document.documentElement.dataset.theme"
    seen = {looking.run(theme)}
    button = looking.window.query_selector(".theme-switch-button:visible")
    button.focus()
    for _ in range(3):
        looking.window.keyboard.press("Enter")
        seen.add(looking.run(theme))
    assert seen == {"light", "dark"}


def test_who_asks_for_less_motion_starts_clips_himself(browser, address):
    with Looking(browser, address) as looking:
        looking.window.emulate_media(reduced_motion="reduce")
        looking.open(FIRST)
        looking.window.wait_for_timeout(500)
        states = (
            "() => [...document.querySelectorAll('video')].map(one => [one.paused, one.controls])"
        )
        assert looking.run(states) == [[True, True]]


def test_it_works_from_a_folder_without_a_server(looking):
    looking.window.goto((SITE / FIRST).as_uri())
    playing = "() => document.querySelector('video').currentTime > 0"
    looking.window.wait_for_function(playing)
    assert looking.errors == looking.outside == []
