"""Diagrams of the chapter on the codebook."""

from vocabulary import (
    COLOURS,
    PALE,
    QUIET,
    arrow,
    caption,
    card,
    cell,
    clip,
    code,
    grid,
    outline,
    text,
)

BLUE, SKY, GREEN, RED, PINK, ORANGE = COLOURS
TOKENS = [[BLUE, SKY, BLUE], [ORANGE, GREEN, SKY], [BLUE, RED, BLUE]]
GRADIENT = "#b30000"


def nearest_code() -> str:
    """A cell's vector is compared with every code, and the nearest one's index is its token."""
    book = [(BLUE, "7.1"), (SKY, "2.6"), (GREEN, "0.4"), (RED, "5.0"), (PINK, "9.3")]
    parts = []
    for n, (colour, distance) in enumerate(book):
        x = 352 + 42 * n
        parts += [
            code(x, 44, colour),
            text(x + 7, 36, str(n), colour=QUIET),
            text(x + 7, 124, distance, colour="#111" if n == 2 else QUIET),
        ]
    return card(
        760,
        190,
        grid(24, 36, [[PALE] * 3] * 3),
        outline(44, 72),
        caption(62, 148, "encoder output", "t × h × w vectors"),
        arrow(122, 82, 186, 82),
        code(200, 52, GREEN),
        caption(207, 148, "one vector", "D numbers"),
        arrow(226, 82, 334, 82, "distance"),
        *parts,
        '<rect x="428" y="22" width="30" height="110" rx="4" fill="none" stroke="#111" '
        'stroke-width="2"/>',
        caption(443, 156, "K codes, and how far each is", "the nearest is code 2"),
        arrow(556, 82, 632, 82, "index"),
        grid(646, 36, TOKENS),
        cell(666, 72, GREEN, label="2"),
        outline(666, 72),
        caption(690, 148, "tokens", "t × h × w indices"),
    )


def backward(path: str, words: str, x: float, y: float) -> str:
    """A gradient on its way back, and its name."""
    return (
        f'<path d="{path}" fill="none" stroke="{GRADIENT}" stroke-width="2.5" '
        'stroke-dasharray="6 4"/>' + text(x, y, words, colour=GRADIENT)
    )


def tip(x: float, y: float) -> str:
    """The tip of a gradient's path that ends at (x, y), pointing left."""
    return f'<path d="M{x:g} {y:g}l10 -6v12z" fill="{GRADIENT}"/>'


def jump(x: float, y: float) -> str:
    """The tip of a gradient's path that ends at (x, y), pointing up."""
    return f'<path d="M{x:g} {y:g}l-6 10h12z" fill="{GRADIENT}"/>'


def straight_through() -> str:
    """Values go through the nearest code; the gradient jumps over it."""
    return card(
        760,
        236,
        clip(20, 26),
        text(66, 140, "clip"),
        arrow(126, 72, 226, 72, "encoder"),
        code(242, 42, SKY, width=18),
        text(251, 124, "z"),
        arrow(272, 72, 456, 72, "nearest code"),
        code(472, 42, GREEN, width=18),
        text(481, 124, "e"),
        arrow(502, 72, 602, 72, "decoder"),
        clip(620, 26),
        text(666, 140, "reconstruction"),
        backward("M612 100H512", "∂L/∂e", 562, 122),
        tip(502, 100),
        backward("M481 134V176Q481 196 461 196H271Q251 196 251 176V144", "", 0, 0),
        jump(251, 134),
        text(366, 218, "straight through: the gradient is copied", colour=GRADIENT),
        backward("M226 100H136", "∂L/∂z", 186, 122),
        tip(126, 100),
        f'<path d="M456 100H400" stroke="{GRADIENT}" stroke-width="2.5" stroke-dasharray="6 4"/>'
        f'<path d="M376 92l16 16m0 -16l-16 16" stroke="{GRADIENT}" stroke-width="3"/>',
        text(366, 134, "argmin has no slope", colour=QUIET),
    )


DIAGRAMS = {"04-nearest.svg": nearest_code, "04-straight-through.svg": straight_through}
