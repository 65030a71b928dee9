"""Diagrams of chapter 8, the transformer."""

from vocabulary import (
    ATTENTION,
    COLOURS,
    INK,
    PALE,
    QUIET,
    arrow,
    attention,
    card,
    cell,
    outline,
    predicted,
    text,
)

BLUE, SKY, GREEN, RED, PINK, ORANGE = COLOURS
CLIP = [BLUE, SKY, BLUE, ORANGE, GREEN, SKY, BLUE, BLUE, SKY, PINK, ORANGE, GREEN]


def raster() -> str:
    """Two latent frames and the row they make."""
    size, parts = 36, []
    for t in range(2):
        left = 92 + 190 * t
        parts.append(text(left + 54, 26, f"frame {t}"))
        for i in range(6):
            x, y, n = left + i % 3 * size, 38 + i // 3 * size, 6 * t + i
            parts.append(cell(x, y, CLIP[n], size=size, label=str(n)))
    parts += [arrow(240, 120, 240, 152), text(292, 142, "flatten")]
    parts += [cell(24 + size * n, 164, CLIP[n], size=size, label=str(n)) for n in range(12)]
    return card(480, 220, *parts)


def shift() -> str:
    """Inputs, shifted right, below the guesses."""
    size, left, parts = 40, 100, []
    xs = [left + 62 * n for n in range(6)]
    for n, x in enumerate(xs):
        if n <= 3:
            parts.append(attention(xs[3] + 20, 82, x + 20, 148, 0.25 + 0.15 * n))
        parts.append(predicted(x, 42, size=size))
        parts.append(text(x + 20, 32, f"token {n}", colour=QUIET))
        if n:
            parts.append(cell(x, 148, CLIP[n - 1], size=size, label=str(n - 1)))
        else:
            parts.append(cell(x, 148, PALE, size=size, label="start"))
    parts += [outline(xs[3], 42, size=size), text(48, 67, "guessed"), text(48, 173, "goes in")]
    parts += [text(x + 20, 208, f"place {n}", colour=QUIET) for n, x in enumerate(xs)]
    return card(480, 224, *parts)


def box(x: float, y: float, words: str, *, width: float = 92, fill: str = PALE) -> str:
    """A named step."""
    ink = "#fff" if fill == ATTENTION else INK
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="34" rx="4" fill="{fill}"/>' + text(
        x + width / 2, y + 22, words, colour=ink
    )


def line(path: str) -> str:
    """A way that vectors take."""
    return f'<path d="{path}" stroke="{INK}" stroke-width="2" fill="none" marker-end="url(#head)"/>'


def plus(x: float, y: float) -> str:
    """Where a branch joins the stream."""
    return (
        f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="#fff" stroke="{INK}" stroke-width="2"/>'
        + text(x, y + 5, "+")
    )


def block() -> str:
    """The residual stream and the two branches of a block."""
    parts = [line("M12 140H494")]
    for left, name, fill in [(30, "attention", ATTENTION), (264, "MLP", PALE)]:
        parts += [
            line(f"M{left} 140V67H{left + 16}"),
            box(left + 18, 50, "norm", width=64),
            line(f"M{left + 82} 67H{left + 98}"),
            box(left + 100, 50, name, width=84, fill=fill),
            line(f"M{left + 184} 67H{left + 206}V127"),
            plus(left + 206, 140),
        ]
    parts += [
        text(192, 20, "a label sets gain and bias", colour=QUIET),
        f'<path d="M98 16H80V46" stroke="{QUIET}" stroke-dasharray="3 3" fill="none"/>',
        f'<path d="M286 16H314V46" stroke="{QUIET}" stroke-dasharray="3 3" fill="none"/>',
        text(236, 172, "residual stream, (B, N, D)", colour=QUIET),
    ]
    return card(500, 190, *parts)


DIAGRAMS = {"08-raster.svg": raster, "08-shift.svg": shift, "08-block.svg": block}
