"""Diagrams of the chapter on axial attention."""

from vocabulary import (
    ATTENTION,
    COLOURS,
    PALE,
    QUIET,
    arrow,
    attention,
    caption,
    card,
    cell,
    code,
    outline,
    text,
)

BLUE, SKY, GREEN, RED, PINK, _ = COLOURS
MIXED = "#2681b0"  # the five colours by the weights below


def look_up() -> str:
    """A query is compared with keys; values are mixed by how well each key fits."""
    keys = [(GREEN, 0.05), (SKY, 0.2), (BLUE, 0.65), (RED, 0.05), (PINK, 0.05)]
    parts = [code(273, 22, BLUE, height=50), text(240, 52, "query", anchor="end")]
    for n, (colour, weight) in enumerate(keys):
        x = 150 + 65 * n
        parts += [
            attention(280, 72, x, 138, weight),
            code(x - 7, 138, colour, height=50),
            text(x, 210, f"{weight:.0%}", colour=QUIET),
            code(x - 7, 222, colour, height=50, width=14),
        ]
    return card(
        620,
        300,
        *parts,
        text(110, 168, "keys", anchor="end"),
        text(110, 210, "weights", anchor="end", colour=QUIET),
        text(110, 252, "values", anchor="end"),
        arrow(440, 247, 520, 247, "mix"),
        code(534, 222, MIXED, height=50),
        caption(541, 290, "output"),
    )


def three_lines() -> str:
    """One cell of a latent grid looks along time, along its column and along its row."""
    parts, size, query = [], 20, (2, 1, 2)  # frame, row, column
    for t in range(4):
        left = 30 + 132 * t
        for h in range(5):
            for w in range(5):
                shared = (t == query[0]) + (h == query[1]) + (w == query[2])
                colour = ATTENTION if shared >= 2 else PALE
                parts.append(cell(left + size * w, 16 + size * h, colour, size=size))
        parts.append(text(left + 50, 138, f"frame {t}", colour=QUIET))
    parts.append(outline(30 + 132 * 2 + size * query[2], 16 + size * query[1]))
    for name, count, at, left in [("time", 4, 2, 30), ("height", 5, 1, 190), ("width", 5, 2, 370)]:
        for n in range(count):
            x = left + size * n + size / 2
            parts.append(attention(left + size * at + size / 2, 182, x, 212, 0.3))
            parts.append(cell(left + size * n, 212, ATTENTION))
        parts.append(cell(left + size * at, 162, PALE))
        parts.append(outline(left + size * at, 162))
        parts.append(text(left + size * count / 2, 254, f"along {name}"))
    parts += [text(155, 227, "+"), text(330, 227, "+"), arrow(480, 222, 520, 222)]
    parts += [cell(528, 212, PALE), outline(528, 212)]
    return card(580, 268, *parts)


DIAGRAMS = {"05-look-up.svg": look_up, "05-three-lines.svg": three_lines}
