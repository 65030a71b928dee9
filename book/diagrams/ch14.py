"""Diagrams of chapter 14: rows packed in a tile, a split cache, the two passes of the gradient."""

from vocabulary import (
    ATTENTION,
    COLOURS,
    INK,
    PALE,
    QUIET,
    arrow,
    caption,
    card,
    cell,
    code,
    hidden,
    text,
)


def _box(x: float, y: float, width: float, height: float, fill: str = "#fff") -> str:
    """A place where something is kept or done."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" '
        f'stroke="{INK}"/>'
    )


def _frame(x: float, y: float, width: float, height: float) -> str:
    """A thick frame around what is talked about."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="none" '
        'stroke="#111" stroke-width="2.5"/>'
    )


def axial() -> str:
    """Four places of four frames become the rows of a tile; its scores are apart by a mask."""
    size, top, small = 15, 56, 20
    drawn = [text(108, 32, "a clip's grid"), text(342, 32, "tile of q"), text(572, 32, "scores")]
    for n in range(4):
        x, y = 20 + 96 * (n % 2), 70 + 116 * (n // 2)
        drawn.append(text(x + 2 * small, y - 8, f"frame {n}", colour=QUIET))
        for row in range(4):
            for column in range(4):
                colour = PALE if row else COLOURS[column]
                drawn.append(cell(x + column * small, y + row * small, colour, size=small))
    for row in range(16):
        y = top + row * size
        for column in range(8):
            drawn.append(cell(282 + column * size, y, COLOURS[row // 4], size=size))
        drawn.append(text(276, y + 12, f"{row % 4}", colour=QUIET, anchor="end"))
        for column in range(16):
            place = (452 + column * size, y)
            same = row // 4 == column // 4
            drawn.append(cell(*place, ATTENTION, size=size) if same else hidden(*place, size=size))
    drawn += [
        arrow(210, top + 8 * size, 252, top + 8 * size),
        arrow(408, top + 8 * size, 444, top + 8 * size),
        text(342, top + 16 * size + 24, "16 rows of d numbers", colour=QUIET),
        text(572, top + 16 * size + 24, "16 × 16, hatched: masked", colour=QUIET),
    ]
    return card(712, 336, *drawn)


def decode() -> str:
    """The keys of a head in three parts, a block each; one of the blocks merges."""
    colours, size, left = (COLOURS[0], COLOURS[2], COLOURS[4]), 24, 48
    drawn = [text(360, 30, "cache of one sequence and head: keys and values, in three parts")]
    for part, colour in enumerate(colours):
        x = left + part * 212
        middle = x + 4 * size
        drawn += [cell(x + n * size, 44, colour, size=size) for n in range(8)]
        drawn += [
            arrow(middle, 72, middle, 96),
            _box(x, 100, 8 * size, 76),
            text(middle, 122, f"block {part}"),
        ]
        for warp in range(4):
            drawn.append(_box(x + 12 + 44 * warp, 134, 36, 30, PALE))
            drawn.append(text(x + 30 + 44 * warp, 154, f"w {warp}", colour=QUIET))
        drawn.append(arrow(middle, 180, 472 + 42 * part, 218, ""))
    drawn += [
        _box(left + 2 * 212 - 24, 222, 160, 78, PALE),
        *[code(490 + 42 * n - 26, 230, colour, width=16, height=44)
          for n, colour in enumerate(colours)],
        text(552 - 24, 293, "m, l and o of each", colour=QUIET),
        text(430, 252, "shared memory", anchor="end"),
        text(430, 272, "of block 2", anchor="end"),
        arrow(612, 261, 652, 261),
        text(672, 266, "o"),
    ]  # fmt: skip
    return card(720, 318, *drawn)


def _triangle(x: float, y: float, size: float, now: tuple[int, int]) -> list[str]:
    """Tiles of causal attention; the one that is being worked on is orange."""
    drawn = []
    for row in range(7):
        for column in range(7):
            place = (x + column * size, y + row * size)
            if column > row:
                drawn.append(hidden(*place, size=size))
            else:
                here = (row, column) == now
                drawn.append(cell(*place, ATTENTION if here else PALE, size=size))
    return drawn


def backward() -> str:
    """A block that owns keys goes down a column, one that owns queries along a row."""
    size, top = 30, 64
    left, right = 76, 424
    return card(
        720,
        334,
        text(left + 105, 28, "pass 1: owns keys"),
        text(left + 105, 50, "keys", colour=QUIET),
        text(left - 10, top + 110, "queries", colour=QUIET, anchor="end"),
        *_triangle(left, top, size, (4, 2)),
        _frame(left + 2 * size, top + 2 * size, size, 5 * size),
        arrow(left + 2.5 * size, top + 5.1 * size, left + 2.5 * size, top + 6.9 * size),
        caption(left + 105, top + 7 * size + 28, "keeps dK and dV of its keys"),
        text(right + 105, 28, "pass 2: owns queries"),
        text(right + 105, 50, "keys", colour=QUIET),
        text(right - 10, top + 110, "queries", colour=QUIET, anchor="end"),
        *_triangle(right, top, size, (5, 2)),
        _frame(right, top + 5 * size, 6 * size, size),
        arrow(right + 3.1 * size, top + 5.5 * size, right + 5.8 * size, top + 5.5 * size),
        caption(right + 105, top + 7 * size + 28, "keeps dQ of its queries"),
        text(360, 324, "hatched: not seen, not visited", colour=QUIET),
    )


DIAGRAMS = {"14-axial.svg": axial, "14-decode.svg": decode, "14-backward.svg": backward}
