"""Diagrams of chapter 13: the ways of the matrices, and copies that overlap the work."""

from vocabulary import COLOURS, INK, PALE, QUIET, arrow, card, text

BLUE, SKY, GREEN, RED, PINK, ORANGE = COLOURS


def box(x: float, y: float, width: float, height: float, colour: str, *, opacity: float = 1) -> str:
    """A matrix, a tile or a stretch of time."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{colour}" '
        f'fill-opacity="{opacity:g}" stroke="{INK}"/>'
    )


def path() -> str:
    """Device memory, shared memory, registers: where each matrix goes."""
    rows = [  # y, name, colour, words in shared memory, register, shape
        (64, "Q", SKY, "", "q", "16 × D"),
        (144, "K", BLUE, "K tile", "b", "16 × 8, right"),
        (224, "V", GREEN, "V tile", "b", "16 × 8, right"),
        (304, "O", ORANGE, "", "o", "16 × D"),
    ]
    parts = [
        text(90, 30, "device memory"),
        text(330, 30, "shared memory"),
        text(582, 30, "registers of a warp"),
        f'<path d="M210 14V366M450 14V366" stroke="{QUIET}" stroke-dasharray="4 4"/>',
    ]
    for y, name, colour, tile, register, shape in rows:
        parts += [
            box(50, y - 18, 80, 44, colour, opacity=0.25),
            text(90, y + 9, name),
            box(486, y - 18, 44, 44, colour, opacity=0.25),
            text(508, y + 9, register),
            text(542, y + 9, shape, colour=QUIET, anchor="start"),
        ]
        if tile:
            parts += [
                box(266, y - 18, 80, 44, colour, opacity=0.25),
                text(306, y + 9, tile),
                arrow(134, y + 4, 260, y + 4),
                arrow(350, y + 4, 480, y + 4),
            ]
    parts += [
        arrow(134, 68, 480, 68),
        arrow(482, 308, 136, 308),
        text(400, 136, "ldmatrix", colour=QUIET),
        text(400, 200, "ldmatrix,", colour=QUIET),
        text(400, 217, "transposed", colour=QUIET),
        text(586, 358, "s = q Kᵀ,  p = exp(s − m),  o += p V", colour=QUIET),
    ]
    return card(720, 380, *parts)


def stages() -> str:
    """One tile after the other, and two stages that take turns."""

    def at(n: float) -> float:
        return 120 + 92 * n

    def lane(y: float, what: list[tuple[float, str, str]]) -> str:
        return "".join(
            box(at(n), y, 90, 34, RED if kind == "copy" else GREEN, opacity=0.3)
            + text(at(n) + 45, y + 22, f"{kind} {tile}")
            for n, kind, tile in what
        )

    before = [(2 * n + i, kind, str(n)) for n in range(3) for i, kind in enumerate(("copy", "use"))]
    even = [(0, "copy", "0"), (1, "use", "0"), (2, "copy", "2"), (3, "use", "2")]
    odd = [(1, "copy", "1"), (2, "use", "1"), (3, "copy", "3"), (4, "use", "3")]
    return card(
        720,
        250,
        text(20, 42, "rung 4", anchor="start"),
        lane(20, before),
        text(20, 112, "rung 5", anchor="start"),
        text(20, 136, "stage 0", colour=QUIET, anchor="start"),
        lane(114, even),
        text(20, 180, "stage 1", colour=QUIET, anchor="start"),
        lane(158, odd),
        arrow(120, 222, 676, 222),
        text(398, 242, "time", colour=QUIET),
        f'<rect x="{at(4):g}" y="114" width="90" height="34" rx="3" fill="{PALE}"/>',
        text(at(4) + 45, 136, "copy 4", colour=QUIET),
    )


DIAGRAMS = {"13-path.svg": path, "13-stages.svg": stages}
