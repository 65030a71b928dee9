"""Diagram of chapter 17: what a clip costs whoever is given nothing, its beginning, its actions."""

from vocabulary import COLOURS, INK, QUIET, card, text

BLUE, _, GREEN, *_ = COLOURS
LEFT, HEIGHT = 210, 34
BEGINNING, SAID, REST = 190, 110, 190  # widths of the three parts


def part(x: float, y: float, width: float, colour: str, words: str, *, given: bool) -> str:
    """A part of a clip's bits: paid for, or given and so only an outline."""
    look = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="5 4"'
    if not given:
        look = f'fill="{colour}" stroke="#fff"'
    bar = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{HEIGHT}" {look}/>'
    return bar + text(x + width / 2, y + 22, words, colour=QUIET if given else "#fff")


def knowing() -> str:
    """Three bars of the same clip; what is given is drawn dashed."""
    rows = [("nothing", 0), ("the beginning", 1), ("beginning and actions", 2)]
    parts = []
    for n, (name, known) in enumerate(rows):
        y = 50 + 56 * n
        parts.append(text(LEFT - 16, y + 22, name, anchor="end"))
        parts.append(part(LEFT, y, BEGINNING, BLUE, "the beginning", given=known > 0))
        parts.append(part(LEFT + BEGINNING, y, SAID, GREEN, "said", given=known > 1))
        x = LEFT + BEGINNING + SAID
        parts.append(part(x, y, REST, "#a35c00", "said by nobody", given=False))
    future = LEFT + BEGINNING + (SAID + REST) / 2
    line = f'<path d="M{LEFT + BEGINNING + 4} 34H{LEFT + BEGINNING + SAID + REST - 4}" '
    return card(
        730,
        230,
        text(LEFT - 16, 26, "given", anchor="end"),
        text(future, 24, "the future"),
        f'{line}stroke="{INK}" stroke-width="1.5"/>',
        *parts,
    )


DIAGRAMS = {"17-knowing.svg": knowing}
