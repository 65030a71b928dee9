"""Diagram of chapter 18: three sets of clips, and the distances between them."""

from vocabulary import INK, QUIET, arrow, card, clip, text


def several(x: float, y: float, words: str) -> str:
    """A set of clips, with its name below."""
    shown = "".join(clip(x + 62 * n, y, size=40) for n in range(3))
    return shown + text(x + 92, y + 84, words)


def between(x1: float, y1: float, x2: float, y2: float) -> str:
    """A distance: a line with a head at both ends."""
    line = f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{INK}" stroke-width="2" fill="none" '
    return line + 'stroke-dasharray="5 4" marker-start="url(#head)" marker-end="url(#head)"/>'


def distances() -> str:
    """Real clips, what the tokenizer leaves of them, and samples."""
    return card(
        760,
        300,
        several(20, 30, "real clips"),
        several(550, 30, "reconstructions"),
        several(285, 196, "samples"),
        arrow(232, 44, 540, 44, "tokens, there and back"),
        between(232, 80, 540, 80),
        text(386, 104, "R-FVD: what the tokenizer loses", colour=QUIET),
        between(150, 124, 278, 214),
        text(202, 190, "FVD", anchor="end", colour=QUIET),
        text(202, 210, "what all of it loses", anchor="end", colour=QUIET),
        between(612, 124, 486, 214),
        text(562, 190, "FVD*", anchor="start", colour=QUIET),
        text(562, 210, "what the GPT loses", anchor="start", colour=QUIET),
    )


DIAGRAMS = {"18-distances.svg": distances}
