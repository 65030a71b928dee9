"""Diagram of the chapter on training the tokenizer."""

from vocabulary import COLOURS, INK, PALE, QUIET, arrow, caption, card, clip, code, grid, text

BLUE, SKY, GREEN, RED, PINK, ORANGE = COLOURS
TOKENS = [[BLUE, SKY, BLUE], [ORANGE, GREEN, SKY], [BLUE, RED, BLUE]]


def tokenizer() -> str:
    """The five parts in a row, and what the two losses compare."""
    codebook = [code(340 + 18 * n, 34, colour) for n, colour in enumerate(COLOURS)]
    return card(
        780,
        300,
        clip(20, 110, size=64),
        caption(62, 222, "clip x"),
        arrow(112, 152, 182, 152, "encoder"),
        grid(192, 116, [[PALE] * 3] * 3),
        caption(230, 222, "vectors"),
        arrow(276, 152, 342, 152, "to_code"),
        *codebook,
        caption(394, 22, "codebook"),
        grid(356, 116, TOKENS),
        caption(394, 222, "codes, tokens"),
        arrow(440, 152, 520, 152, "from_code"),
        grid(530, 116, [[PALE] * 3] * 3),
        caption(568, 222, "vectors"),
        arrow(614, 152, 676, 152, "decoder"),
        clip(686, 110, size=64),
        caption(728, 222, "clip x̂"),
        _compared(310, 394, 246, "commitment loss"),
        _compared(62, 728, 272, "reconstruction loss"),
    )


def _compared(x1: float, x2: float, y: float, words: str) -> str:
    """A bracket under two things whose difference is a loss."""
    line = (
        f'<path d="M{x1:g} {y - 12:g}V{y:g}H{x2:g}V{y - 12:g}" fill="none" stroke="{INK}" '
        'stroke-dasharray="4 3"/>'
    )
    return line + text((x1 + x2) / 2, y + 18, words, colour=QUIET)


DIAGRAMS = {"06-tokenizer.svg": tokenizer}
