"""Diagrams of chapter 16: the bits of three formats, and gradients that travel meanwhile."""

from vocabulary import COLOURS, INK, QUIET, arrow, card, cell, text

BLUE, SKY, GREEN, RED, PINK, ORANGE = COLOURS


def bits() -> str:
    """Sign, exponent and fraction of float32, bfloat16 and float16, bit by bit."""
    formats = [("float32", 8, 23), ("bfloat16", 8, 7), ("float16", 5, 10)]
    parts = [
        cell(130, 12, RED, size=14) + text(150, 24, "sign", anchor="start"),
        cell(220, 12, BLUE, size=14) + text(240, 24, "exponent", anchor="start"),
        cell(350, 12, GREEN, size=14) + text(370, 24, "fraction", anchor="start"),
    ]
    for row, (name, exponent, fraction) in enumerate(formats):
        y = 48 + 48 * row
        colours = [RED, *[BLUE] * exponent, *[GREEN] * fraction]
        parts.append(text(20, y + 14, name, anchor="start"))
        parts += [cell(110 + 18 * n, y, colour, size=18) for n, colour in enumerate(colours)]
        parts += [
            text(128 + 9 * exponent, y + 34, str(exponent), colour=QUIET),
            text(128 + 18 * exponent + 9 * fraction, y + 34, str(fraction), colour=QUIET),
        ]
    edge = 110 + 18 * 16
    parts.append(
        f'<path d="M{edge} 42V138" stroke="{INK}" stroke-width="2" stroke-dasharray="4 4"/>'
    )
    parts.append(text(edge + 10, 112, "bfloat16 ends here", colour=QUIET, anchor="start"))
    return card(720, 192, *parts)


def overlap() -> str:
    """The backward pass, layer by layer, and below it what travels."""
    width = 118

    def stretch(n: float, y: float, words: str, colour: str) -> str:
        return (
            f'<rect x="{130 + width * n:g}" y="{y}" width="{width - 2}" height="36" rx="3" '
            f'fill="{colour}" fill-opacity="0.3" stroke="{INK}"/>'
            + text(129 + width * (n + 0.5), y + 23, words)
        )

    computed = [stretch(n, 24, f"layer {3 - n}", GREEN) for n in range(4)]
    sent = [stretch(n + 1, 84, f"gradient {3 - n}", ORANGE) for n in range(4)]
    return card(
        740,
        170,
        text(20, 47, "backward", anchor="start"),
        text(20, 107, "all-reduce", anchor="start"),
        *computed,
        *sent,
        f'<path d="M{129 + 4 * width} 14V132" stroke="{QUIET}" stroke-dasharray="4 4"/>',
        arrow(130, 142, 718, 142),
        text(424, 162, "time", colour=QUIET),
        text(129 + 4.5 * width, 72, "waited for", colour=QUIET),
    )


DIAGRAMS = {"16-bits.svg": bits, "16-overlap.svg": overlap}
