"""Diagrams of the index page."""

from vocabulary import COLOURS, arrow, caption, card, clip, grid, predicted, row, text

BLUE, SKY, GREEN, RED, _, ORANGE = COLOURS
TOKENS = [[BLUE, SKY, BLUE], [ORANGE, GREEN, SKY], [BLUE, RED, BLUE]]


def pipeline() -> str:
    """VideoGPT's two stages, there and back."""
    return card(
        760,
        190,
        clip(32, 28),
        caption(78, 148, "a clip", "T × H × W pixels"),
        arrow(142, 66, 270, 66, "encoder"),
        arrow(270, 94, 142, 94),
        text(206, 116, "decoder"),
        grid(286, 36, TOKENS),
        caption(324, 148, "tokens", "t × h × w indices"),
        arrow(382, 66, 524, 66, "flatten"),
        arrow(524, 94, 382, 94),
        text(453, 116, "GPT samples"),
        row(540, 70, [BLUE, SKY, BLUE, ORANGE, GREEN], size=22),
        predicted(650, 70, size=22),
        caption(606, 148, "the next token", "one at a time"),
    )


DIAGRAMS = {"pipeline.svg": pipeline}
