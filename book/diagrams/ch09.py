"""Diagrams of chapter 9: a whole clip of guesses in one pass, and the neighbours of a token."""

from vocabulary import COLOURS, INK, PALE, arrow, card, cell, hidden, predicted, text

BLUE, SKY, GREEN, RED, _, _ = COLOURS


def bars(x: float, y: float, heights: dict[str, float], right: str) -> str:
    """A guess: a bar for each token, as high as its probability, the right one framed."""
    drawn = []
    for n, (colour, height) in enumerate(heights.items()):
        edge = 'stroke="#111" stroke-width="2"' if colour == right else 'stroke="#fff"'
        drawn.append(
            f'<rect x="{x + 16 * n:g}" y="{y + 60 * (1 - height):g}" width="14" '
            f'height="{60 * height:g}" fill="{colour}" {edge}/>'
        )
    foot = f'<path d="M{x - 3:g} {y + 60:g}h68" stroke="{INK}"/>'
    return "".join(drawn) + foot


def guessing() -> str:
    """Tokens go in, shifted by one; out comes a guess for each; each is priced."""
    truth = [BLUE, SKY, BLUE, RED]
    guesses = [
        {BLUE: 0.5, SKY: 0.25, GREEN: 0.125, RED: 0.125},
        {BLUE: 0.25, SKY: 0.5, GREEN: 0.125, RED: 0.125},
        {BLUE: 1.0, SKY: 0.0, GREEN: 0.0, RED: 0.0},
        {BLUE: 0.5, SKY: 0.25, GREEN: 0.125, RED: 0.125},
    ]
    price = ["1 bit", "1 bit", "0 bits", "3 bits"]
    parts = []
    for n, (colour, guess, bits) in enumerate(zip(truth, guesses, price, strict=True)):
        x = 118 + 96 * n
        before = cell(x + 17, 268, PALE, size=26, label="S")
        parts += [
            cell(x + 17, 268, truth[n - 1], size=26) if n else before,
            arrow(x + 30, 262, x + 30, 238),
            arrow(x + 30, 196, x + 30, 172),
            bars(x - 1, 100, guess, colour),
            cell(x + 17, 42, colour, size=26),
            text(x + 30, 30, bits),
        ]
    box = (
        f'<rect x="104" y="198" width="382" height="36" rx="4" fill="#fff" stroke="{INK}" '
        'stroke-width="1.5"/>'
    )
    return card(
        500,
        316,
        box,
        text(295, 221, "GPT: each position sees itself and what is left of it"),
        text(8, 30, "surprise", anchor="start"),
        text(8, 60, "the truth", anchor="start"),
        text(8, 140, "the guesses", anchor="start"),
        text(8, 286, "what goes in", anchor="start"),
        *parts,
    )


def neighbours() -> str:
    """Two latent frames; the token to be guessed, and its neighbours left, above and before."""
    size, parts = 52, []
    named = {
        (0, 2, 2): (RED, "before"),
        (1, 1, 2): (GREEN, "above"),
        (1, 2, 1): (BLUE, "left"),
    }
    for frame, left in enumerate((16, 252)):
        for row in range(4):
            for column in range(4):
                x, y, place = left + column * size, 44 + row * size, (frame, row, column)
                if place == (1, 2, 2):
                    parts.append(predicted(x, y, size=size))
                elif place > (1, 2, 2):
                    parts.append(hidden(x, y, size=size))
                else:
                    colour, label = named.get(place, (PALE, ""))
                    parts.append(cell(x, y, colour, size=size, label=label))
    names = (text(120, 30, "a latent frame"), text(356, 30, "the next one"))
    return card(476, 272, *names, *parts)


DIAGRAMS = {"09-guessing.svg": guessing, "09-neighbours.svg": neighbours}
