"""Diagrams of chapter 10, sampling."""

from vocabulary import (
    ATTENTION,
    COLOURS,
    INK,
    PALE,
    QUIET,
    arrow,
    card,
    cell,
    predicted,
    row,
    text,
)

BLUE, SKY, GREEN, RED, _, ORANGE = COLOURS
TOKENS = [SKY, BLUE, BLUE, ORANGE, GREEN, SKY, BLUE]
PLACES, LAYERS, STEP = len(TOKENS), 3, 40


def _look(query: float, key: float, y: float, weight: float) -> str:
    """Attention along a row: a bow above the cells from a query to a key, both at height y."""
    half, top = (query + key) / 2, y - 12 - (query - key) / 7
    return (
        f'<path d="M{query:g} {y:g}Q{half:g} {top:g} {key:g} {y:g}" fill="none" '
        f'stroke="{ATTENTION}" stroke-width="{0.7 + 5 * weight:g}" stroke-opacity="0.85"/>'
    )


def _panel(x: float, y: float, name: str, below: str, kept: int) -> str:
    """Layers over places; the first `kept` columns are known from earlier steps."""
    drawn = [text(x + PLACES * STEP / 2, y, name)]
    for layer in range(LAYERS):
        top = y + 72 + 52 * (LAYERS - 1 - layer)
        last = x + (PLACES - 1) * STEP
        for place in range(PLACES):
            colour = PALE if place < kept else INK
            drawn.append(cell(x + place * STEP, top, colour, size=26))
        for place in range(kept):
            weight = (0.1, 0.3, 0.05, 0.6, 0.15, 0.8)[place - layer]
            start, edge = x + place * STEP + 13, top + 2
            drawn.append(_look(last + 13, start, edge, weight))
    foot = y + 72 + 52 * LAYERS
    for place, colour in enumerate(TOKENS):
        drawn.append(row(x + place * STEP + 2, foot, [colour], size=22))
    right = x + (PLACES - 1) * STEP + 13
    drawn += [
        arrow(right, y + 68, right, y + 46),
        predicted(right - 11, y + 20, size=22),
        text(x + PLACES * STEP / 2, foot + 50, below, colour=QUIET),
    ]
    return "".join(drawn)


def cache() -> str:
    """What is computed for one more token, without a cache and with one."""
    return card(
        760,
        330,
        _panel(50, 30, "the whole pass, once more", "every cell is computed", kept=0),
        _panel(430, 30, "a cached step", "one column is computed, the rest is kept", kept=6),
    )


DIAGRAMS = {"10-cache.svg": cache}
