"""Diagrams of the chapter on axial attention."""

from vocabulary import (
    ATTENTION,
    COLOURS,
    PALE,
    QUIET,
    arrow,
    attention,
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
    parts = [code(191, 16, BLUE, height=50), text(178, 46, "query", anchor="end")]
    for n, (colour, weight) in enumerate(keys):
        x = 98 + 50 * n
        parts += [
            attention(198, 66, x, 124, weight),
            code(x - 7, 124, colour, height=50),
            text(x, 196, f"{weight:.0%}", colour=QUIET),
            code(x - 7, 208, colour, height=50),
        ]
    return card(
        420,
        270,
        *parts,
        text(74, 154, "keys", anchor="end"),
        text(74, 196, "weights", anchor="end", colour=QUIET),
        text(74, 238, "values", anchor="end"),
        arrow(318, 233, 368, 233, "mix"),
        code(378, 208, MIXED, height=50),
        text(385, 196, "output"),
    )


def three_lines() -> str:
    """One cell of a latent grid looks along time, along its column and along its row."""
    parts, size, query = [], 16, (2, 1, 2)  # frame, row, column
    for t in range(4):
        left = 20 + 106 * t
        for h in range(5):
            for w in range(5):
                shared = (t == query[0]) + (h == query[1]) + (w == query[2])
                colour = ATTENTION if shared >= 2 else PALE
                parts.append(cell(left + size * w, 16 + size * h, colour, size=size))
        parts.append(text(left + 40, 116, f"frame {t}", colour=QUIET))
    parts.append(outline(20 + 106 * 2 + size * query[2], 16 + size * query[1], size=size))
    for name, count, at, left in [("time", 4, 2, 20), ("height", 5, 1, 128), ("width", 5, 2, 252)]:
        for n in range(count):
            x = left + size * n + size / 2
            parts.append(attention(left + size * at + size / 2, 152, x, 186, 0.3))
            parts.append(cell(left + size * n, 186, ATTENTION, size=size))
        parts.append(cell(left + size * at, 136, PALE, size=size))
        parts.append(outline(left + size * at, 136, size=size))
        parts.append(text(left + size * count / 2, 222, f"along {name}"))
    parts += [text(106, 199, "+"), text(230, 199, "+"), arrow(346, 194, 384, 194)]
    parts += [cell(394, 186, PALE, size=size), outline(394, 186, size=size)]
    return card(440, 236, *parts)


DIAGRAMS = {"05-look-up.svg": look_up, "05-three-lines.svg": three_lines}
