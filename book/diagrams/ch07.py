"""Diagrams of chapter 7: what a query may see, and the two ways to use a causal model."""

from vocabulary import (
    ATTENTION,
    COLOURS,
    PALE,
    QUIET,
    arrow,
    attention,
    caption,
    card,
    cell,
    code,
    hidden,
    outline,
    predicted,
    text,
)

BLUE, SKY, GREEN, RED, PINK, ORANGE = COLOURS
ROW = [BLUE, SKY, BLUE, GREEN, PINK, SKY, RED]
SIDE = 40


def row() -> str:
    """Inputs are the tokens shifted by one; the query at place 4 sees places 0 to 4."""
    left, top, place = 210, 108, 4
    x = [left + 62 * n for n in range(len(ROW))]
    inputs = [cell(x[0], top, PALE, size=SIDE, label="start")]
    inputs += [
        cell(x[n + 1], top, colour, size=SIDE, label=str(n)) if n < place else ""
        for n, colour in enumerate(ROW[:-1])
    ]
    inputs += [hidden(x[n], top, size=SIDE) for n in range(place + 1, len(ROW))]
    weights = (0.1, 0.15, 0.5, 0.25)
    beams = [
        attention(x[n] + SIDE / 2, top, x[place] + SIDE / 2, 44, weight)
        for n, weight in enumerate((*weights, 0.7))
    ]
    targets = [
        cell(x[n], 216, colour, size=SIDE, label=str(n)) if n < place else ""
        for n, colour in enumerate(ROW)
    ]
    targets += [hidden(x[n], 216, size=SIDE) for n in range(place + 1, len(ROW))]
    return card(
        680,
        292,
        text(x[place] + SIDE / 2, 34, "the query at place 4"),
        *beams,
        text(28, top + 17, "what goes in:", anchor="start"),
        text(28, top + 36, "the tokens, one later", colour=QUIET, anchor="start"),
        *inputs,
        outline(x[place], top, size=SIDE),
        arrow(x[place] + SIDE / 2, top + SIDE + 6, x[place] + SIDE / 2, 210),
        text(28, 233, "what must come out:", anchor="start"),
        text(28, 252, "the tokens", colour=QUIET, anchor="start"),
        *targets,
        predicted(x[place], 216, size=SIDE),
        text(x[5] + 51, 280, "not yet to be seen", colour=QUIET),
    )


def triangle(x: float, y: float, rows: range, *, future: bool = True) -> str:
    """The scores of six queries over six keys: `rows` in light, those before them pale."""
    drawn = []
    for n in range(rows.stop):
        for m in range(6):
            place = (x + 26 * m, y + 26 * n)
            if m <= n:
                drawn.append(cell(*place, ATTENTION if n in rows else PALE, size=26))
            elif future:
                drawn.append(hidden(*place, size=26))
    return "".join(drawn)


def two_uses() -> str:
    """In training all rows at once; in use one row after the other, over kept keys and values."""
    kept = [code(470 + 26 * n + 8, 34, colour, width=10, height=34) for n, colour in enumerate(ROW)]
    return card(
        680,
        300,
        text(146, 60, "all tokens are known"),
        triangle(68, 84, range(6)),
        caption(146, 268, "training", "every row at once"),
        text(456, 48, "keys, values", anchor="end"),
        text(456, 66, "kept so far", colour=QUIET, anchor="end"),
        *kept[:4],
        triangle(470, 84, range(3, 4), future=False),
        text(456, 180, "the next token", anchor="end"),
        text(456, 140, "done", colour=QUIET, anchor="end"),
        caption(522, 268, "sampling", "one row at a time"),
    )


DIAGRAMS = {"07-row.svg": row, "07-two-uses.svg": two_uses}
