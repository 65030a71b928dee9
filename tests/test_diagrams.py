"""The book's diagrams: what is committed is what the code draws, and every one is shown."""

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

BOOK = Path(__file__).parents[1] / "book"
DIAGRAMS = runpy.run_path(str(BOOK / "diagrams" / "draw.py"))["diagrams"]()


def test_every_diagram_has_its_code():
    marks = {"favicon.svg", "logo.svg", "logo-dark.svg"}
    assert {p.name for p in (BOOK / "_static").glob("*.svg")} - marks == DIAGRAMS.keys()


@pytest.mark.parametrize("name", DIAGRAMS)
def test_what_is_committed_is_what_the_code_draws(name):
    drawn = DIAGRAMS[name]()
    assert (BOOK / "_static" / name).read_text(encoding="utf-8") == drawn
    width, height = map(float, ET.fromstring(drawn).get("viewBox").split()[2:])
    for element in ET.fromstring(drawn).iter():  # nothing stands outside the card
        assert 0 <= float(element.get("x", 0)) <= width
        assert 0 <= float(element.get("y", 0)) <= height


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_page_shows_it_with_words_for_those_who_cannot_see_it(name):
    pages = [p.read_text(encoding="utf-8") for p in BOOK.glob("*.md")]
    shown = [f"{{figure}} _static/{name}\n:alt: " in page for page in pages]
    assert any(shown)
