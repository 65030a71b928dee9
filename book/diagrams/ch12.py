"""Diagrams of chapter 12: a GPU's memories, a block of the first kernel, a block of the second."""

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
    row,
    text,
)

WHITE = "#fff"


def _box(x: float, y: float, width: float, height: float, fill: str = WHITE) -> str:
    """A place where something is kept or done."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" '
        f'stroke="{INK}"/>'
    )


def _multiprocessor(x: float, y: float) -> str:
    """One of many: threads in warps, their registers, the memory that a block shares."""
    drawn = [_box(x, y, 176, 160)]
    for warp in range(4):
        drawn.append(row(x + 16, y + 14 + 14 * warp, [COLOURS[warp]] * 12, size=12))
    drawn += [
        _box(x + 12, y + 78, 152, 30, PALE),
        text(x + 88, y + 98, "registers"),
        _box(x + 12, y + 118, 152, 30, PALE),
        text(x + 88, y + 138, "shared memory"),
    ]
    return "".join(drawn)


def gpu() -> str:
    """Multiprocessors over a cache over device memory; the lower, the larger and the farther."""
    places = [20 + 196 * n for n in range(3)]
    return card(
        640,
        392,
        *[text(x + 88, 28, f"multiprocessor {n}") for n, x in enumerate(places)],
        *[_multiprocessor(x, 40) for x in places],
        *[arrow(x + 88, 236, x + 88, 206) for x in places],
        _box(20, 240, 568, 44, PALE),
        text(304, 267, "L2 cache, for all of them"),
        arrow(304, 316, 304, 290),
        _box(20, 320, 568, 52, PALE),
        text(304, 351, "device memory: q, k, v and o"),
        text(616, 124, "…", colour=QUIET),
    )


def _column(x: float, y: float, colours: list[str], columns: int, size: float) -> str:
    """Rows of cells, a colour a row."""
    return "".join(
        row(x, y + n * size, [colour] * columns, size=size) for n, colour in enumerate(colours)
    )


def naive() -> str:
    """A block of the first kernel: threads take keys, then they take columns."""
    size, colours = 24, COLOURS
    keys = len(colours)
    top = 66
    first = [
        text(166, 30, "step 1: a thread a key"),
        text(52, top + 76, "K", anchor="end"),
        _column(64, top, colours, keys, size),
        *[arrow(64 + keys * size + 6, top + 12 + n * size, 250, top + 12 + n * size)
          for n in range(keys)],
        *[cell(256, top + n * size, colour, size=size) for n, colour in enumerate(colours)],
        caption(268, top + keys * size + 22, "scores", "shared memory"),
    ]  # fmt: skip
    left = 420
    last = [
        text(left + 72, 30, "step 3: a thread a column"),
        text(left - 12, top + 76, "V", anchor="end"),
        "".join(row(left, top + n * size, colours, size=size) for n in range(keys)),
        *[arrow(left + 12 + n * size, top + keys * size + 6, left + 12 + n * size, 244)
          for n in range(keys)],
        row(left, 248, colours, size=size),
        text(left - 12, 265, "o", anchor="end"),
    ]  # fmt: skip
    return card(620, 296, *first, *last)


def tiles() -> str:
    """A block of the second kernel walks along its queries' row of tiles."""
    x, y, size = 96, 60, 30
    drawn = []
    for band in range(4):
        for tile in range(8):
            for half in range(2):
                place = (x + tile * size, y + band * 2 * size + half * size)
                if tile > 2 * band + 1:
                    drawn.append(hidden(*place, size=size))
                else:
                    now = band == 2 and tile == 3
                    drawn.append(cell(*place, ATTENTION if now else PALE, size=size))
    frame = (
        f'<rect x="{x:g}" y="{y + 4 * size:g}" width="{6 * size:g}" height="{2 * size:g}" '
        'fill="none" stroke="#111" stroke-width="2.5"/>'
    )
    right = 430
    keep = [
        _box(right, 60, 230, 84),
        text(right + 115, 50, "shared memory, of the block"),
        *[code(right + 24 + 16 * n, 76, ATTENTION, width=12, height=52) for n in range(5)],
        *[code(right + 130 + 16 * n, 76, COLOURS[2], width=12, height=52) for n in range(5)],
        caption(right + 62, 164, "tile of K"),
        caption(right + 170, 164, "tile of V"),
        _box(right, 206, 230, 70),
        text(right + 115, 196, "registers, of a thread"),
        code(right + 24, 216, COLOURS[0], width=12, height=50),
        text(right + 52, 246, "q"),
        code(right + 78, 216, COLOURS[4], width=12, height=50),
        text(right + 106, 246, "o"),
        text(right + 170, 237, "maximum m"),
        text(right + 170, 257, "sum l"),
    ]
    return card(
        690,
        330,
        text(x + 4 * size, 44, "keys, 32 a tile"),
        text(84, y + 4 * size + 26, "a block's", anchor="end"),
        text(84, y + 4 * size + 44, "queries", anchor="end"),
        *drawn,
        frame,
        arrow(x + 4 * size + 4, y + 4.6 * size, right - 8, 106),
        *keep,
        text(x + 4 * size, 322, "hatched: skipped", colour=QUIET),
    )


DIAGRAMS = {"12-gpu.svg": gpu, "12-naive.svg": naive, "12-tiles.svg": tiles}
