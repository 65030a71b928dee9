"""Diagrams of chapter 3."""

from vocabulary import (
    COLOURS,
    INK,
    PALE,
    QUIET,
    arrow,
    caption,
    card,
    cell,
    clip,
    grid,
    outline,
    text,
)

RED = COLOURS[3]


def slab(x: float, y: float, width: float, height: float, words: str) -> str:
    """A part of a network: a pale plate that narrows to nothing, with its name below."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{PALE}" '
        f'stroke="{INK}"/>' + text(x + width / 2, 214, words, colour=QUIET)
    )


def autoencoder() -> str:
    """A clip through the narrow middle and out again."""
    pale = [[PALE] * 3 for _ in range(3)]
    return card(
        760,
        270,
        clip(24, 58),
        caption(70, 214, "clip x", "65,536 numbers"),
        arrow(126, 104, 164, 104),
        slab(172, 48, 26, 120, "halve"),
        slab(226, 66, 26, 84, "halve"),
        slab(280, 78, 26, 60, "blocks"),
        text(239, 30, "encoder"),
        arrow(312, 108, 344, 108),
        grid(350, 66, pale, size=18),
        caption(386, 214, "latents z", "1,024 · c numbers"),
        arrow(424, 108, 452, 108),
        slab(460, 78, 26, 60, "blocks"),
        slab(514, 66, 26, 84, "double"),
        slab(568, 48, 26, 120, "double"),
        text(527, 30, "decoder"),
        arrow(602, 104, 640, 104),
        clip(648, 58),
        caption(694, 214, "clip x̂", "65,536 numbers"),
    )


def padding_row(y: float, front: int, behind: int, words: str) -> str:
    """Eight frames with their padding, and the four latent frames of a kernel 4 with stride 2."""
    size, left = 36, 216
    start = left - front * size
    drawn = [text(70, y + 24, "frames"), text(70, y + 106, words)]
    for n in range(-front, 8 + behind):
        x = left + n * size
        inside = 0 <= n < 8
        drawn.append(
            cell(x, y, "#111" if inside else "#fff", size=size, label=str(n) if inside else "0")
        )
    for k in range(4):
        x = start + (2 * k + 1.5) * size  # the middle of the four that it sees
        for j in range(4):
            if k == 1:
                tap = start + (2 * k + j + 0.5) * size
                drawn.append(
                    f'<path d="M{tap:g} {y + size:g}L{x + size / 2:g} {y + 82:g}" '
                    f'stroke="{RED}" stroke-width="2"/>'
                )
        drawn.append(cell(x, y + 82, PALE, size=size, label=str(k)))
        if k == 1:
            drawn.append(outline(x, y + 82, size=size))
    return "".join(drawn)


def causal_padding() -> str:
    """Where the zeros stand, and what a latent frame then sees."""
    return card(
        640,
        320,
        padding_row(20, 1, 1, "same"),
        padding_row(172, 2, 0, "causal"),
    )


DIAGRAMS = {"03-autoencoder.svg": autoencoder, "03-causal-padding.svg": causal_padding}
