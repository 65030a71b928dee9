"""Diagrams of chapter 15: kernels on a time line, warps that share K, windows of a long clip."""

from vocabulary import COLOURS, INK, PALE, QUIET, arrow, card, text

BLUE, SKY, GREEN, RED, PINK, ORANGE = COLOURS


def box(x: float, y: float, width: float, height: float, colour: str, *, opacity: float = 1) -> str:
    """A kernel, a part of a matrix, some frames."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{colour}" '
        f'fill-opacity="{opacity:g}" stroke="{INK}"/>'
    )


def queue() -> str:
    """Launched one by one, replayed from a graph, overlapped."""
    parts = []
    ways = [("from Python", 92, 0), ("from a graph", 44, 0), ("overlapped", 28, 24)]
    for row, (name, apart, early) in enumerate(ways):
        y = 28 + 62 * row
        parts.append(text(14, y + 21, name, anchor="start"))
        for n in range(6):
            x, late = 140 + apart * n, 28 - early * 0.4
            colour = COLOURS[n]
            if early:
                parts.append(box(x - early + 10, y + 34, early, 14, colour, opacity=0.25))
            parts.append(box(x + 10, y, late, 32, colour, opacity=0.75))
    parts += [arrow(140, 226, 676, 226), text(408, 246, "time", colour=QUIET)]
    return card(720, 256, *parts)


def product() -> str:
    """A block: x and eight rows of w in columns, a warp each, and their sums."""
    parts = [text(40, 46, "x"), text(40, 130, "w"), text(40, 152, "8 rows", colour=QUIET)]
    names = [f"warp {n}" for n in range(6)]
    for n, (name, colour) in enumerate(zip(names, COLOURS, strict=True)):
        x = 80 + 78 * n
        parts += [
            text(x + 38, 20, name, colour=QUIET),
            box(x, 30, 76, 22, colour, opacity=0.45),
            *(box(x, 76 + 16 * row, 76, 15, colour, opacity=0.45) for row in range(8)),
            arrow(x + 38, 210, x + 38, 238),
            box(x + 10, 244, 56, 24, colour, opacity=0.25),
        ]
    parts += [
        arrow(550, 256, 592, 256),
        text(640, 250, "bias + sums,"),
        text(640, 268, "left to right"),
        text(310, 292, "16 × 8 sums of each warp", colour=QUIET),
    ]
    return card(720, 304, *parts)


def windows() -> str:
    """Three windows of sixteen frames that overlap by eight."""
    parts, frame = [], 19
    for row in range(3):
        y, left = 46 + 58 * row, 20 + 8 * frame * row
        for n in range(16):
            x, known = left + frame * n, row > 0 and n < 8
            if known:
                parts.append(box(x, y, frame - 2, 30, PALE))
            else:
                parts.append(
                    f'<rect x="{x:g}" y="{y:g}" width="{frame - 2:g}" height="30" fill="none" '
                    f'stroke="{INK}" stroke-dasharray="3 3"/>'
                )
    parts += [
        text(20, 30, "frame 0", anchor="start", colour=QUIET),
        text(20 + 16 * frame, 30, "16", anchor="start", colour=QUIET),
        text(20 + 24 * frame, 30, "24", anchor="start", colour=QUIET),
        box(20, 232, frame - 2, 22, PALE),
        text(46, 248, "known", anchor="start"),
        f'<rect x="240" y="232" width="{frame - 2:g}" height="22" fill="none" stroke="{INK}" '
        'stroke-dasharray="3 3"/>',
        text(266, 248, "drawn", anchor="start"),
    ]
    return card(660, 270, *parts)


DIAGRAMS = {"15-queue.svg": queue, "15-product.svg": product, "15-windows.svg": windows}
