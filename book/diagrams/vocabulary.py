"""The shapes that every diagram of the book is drawn with, as SVG.

One look for one thing, in all chapters: a *clip* is a stack of black frames, a *latent grid* a
stack of pale cells, *tokens* are cells in full colours (one colour, one index), a *code* is a bar
of shades of its token's colour, *attention* is orange, the thicker the more weight, what is yet
*to be predicted* is dashed, what may not be seen is hatched.

Each function draws at (x, y), the top left corner, in screen pixels, and returns SVG text.
"""

from collections.abc import Sequence
from html import escape

INK, QUIET, ATTENTION, PALE = "#444", "#555", "#e69f00", "#dbe9f3"
COLOURS = ["#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#e69f00"]  # of tokens
CELL = 20

_DEFINITIONS = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker>'
    '<pattern id="hatch" width="6" height="6" patternTransform="rotate(45)" '
    'patternUnits="userSpaceOnUse"><rect width="6" height="6" fill="#eee"/>'
    '<path d="M0 0v6" stroke="#bbb" stroke-width="2"/></pattern></defs>'
)


def card(width: float, height: float, *parts: str) -> str:
    """A whole diagram, on a white card that reads the same in both themes."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        'font-family="sans-serif" font-size="14" text-anchor="middle">\n'
        f'<rect width="{width:g}" height="{height:g}" rx="6" fill="#fff"/>\n'
        + "\n".join([_DEFINITIONS, *parts])
        + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, *, colour: str = INK, anchor: str = "middle") -> str:
    """Words whose baseline is at y, centred on x unless `anchor` is start or end."""
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def caption(x: float, y: float, name: str, size: str = "") -> str:
    """What something is called, and in quieter ink below it its shape."""
    return text(x, y, name) + (text(x, y + 20, size, colour=QUIET) if size else "")


def clip(x: float, y: float, *, size: float = 72, frames: int = 3) -> str:
    """A clip: frames behind each other, the first in front, with a digit 0 and a digit 1."""
    drawn = []
    for n in reversed(range(frames)):
        place = f'x="{x + 10 * n:g}" y="{y + 10 * (frames - 1 - n):g}"'
        drawn.append(
            f'<rect {place} width="{size:g}" height="{size:g}" fill="#111" stroke="#fff"/>'
        )
    front = y + 10 * (frames - 1)
    drawn.append(
        f'<g fill="none" stroke="#fff" stroke-width="{size / 18:g}">'
        f'<circle cx="{x + 0.33 * size:g}" cy="{front + 0.36 * size:g}" r="{size / 8:g}"/>'
        f'<path d="M{x + 0.7 * size:g} {front + 0.6 * size:g}v{0.28 * size:g}"/></g>'
    )
    return "".join(drawn)


def cell(x: float, y: float, colour: str, *, size: float = CELL, label: str = "") -> str:
    """One cell of a grid; a token if its colour is one of COLOURS."""
    square = (
        f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" fill="{colour}" '
        'stroke="#fff"/>'
    )
    ink = INK if colour in (PALE, "#fff") else "#fff"
    return square + (text(x + size / 2, y + size / 2 + 5, label, colour=ink) if label else "")


def predicted(x: float, y: float, *, size: float = CELL) -> str:
    """A cell that is yet to be predicted."""
    dashed = (
        f'<rect x="{x + 1:g}" y="{y + 1:g}" width="{size - 2:g}" height="{size - 2:g}" fill="none" '
        f'stroke="{INK}" stroke-dasharray="3 3"/>'
    )
    return dashed + text(x + size / 2, y + size / 2 + 5, "?")


def hidden(x: float, y: float, *, size: float = CELL) -> str:
    """A cell that may not be seen."""
    return cell(x, y, "url(#hatch)", size=size)


def outline(x: float, y: float, *, size: float = CELL) -> str:
    """A frame around a cell: the query of attention, or whatever is talked about."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" fill="none" '
        f'stroke="#111" stroke-width="2.5"/>'
    )


def row(x: float, y: float, colours: Sequence[str], *, size: float = CELL) -> str:
    """Cells side by side: tokens in raster order."""
    return "".join(cell(x + n * size, y, colour, size=size) for n, colour in enumerate(colours))


def grid(
    x: float, y: float, colours: Sequence[Sequence[str]], *, frames: int = 3, size: float = CELL
) -> str:
    """A grid of cells, rows of colours, with more such frames behind it: latents or tokens."""
    drawn, height = [], size * len(colours)
    for n in reversed(range(1, frames)):
        place = f'x="{x + 8 * n:g}" y="{y + 8 * (frames - 1 - n):g}"'
        width = size * len(colours[0])
        drawn.append(
            f'<rect {place} width="{width:g}" height="{height:g}" fill="{colours[0][0]}" '
            'stroke="#fff"/>'
        )
    front = y + 8 * (frames - 1)
    drawn += [row(x, front + n * size, line, size=size) for n, line in enumerate(colours)]
    return "".join(drawn)


def code(x: float, y: float, colour: str, *, width: float = 14, height: float = 60) -> str:
    """A code vector: a bar of shades of one colour, one shade a channel."""
    shades = (1.0, 0.35, 0.75, 0.2, 0.55)
    part = height / len(shades)
    return "".join(
        f'<rect x="{x:g}" y="{y + n * part:g}" width="{width:g}" height="{part:g}" fill="{colour}" '
        f'fill-opacity="{shade}" stroke="#fff"/>'
        for n, shade in enumerate(shades)
    )


def arrow(x1: float, y1: float, x2: float, y2: float, words: str = "") -> str:
    """What turns one thing into another; its name stands above the middle."""
    line = (
        f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{INK}" stroke-width="2" fill="none" '
        'marker-end="url(#head)"/>'
    )
    return line + (text((x1 + x2) / 2, min(y1, y2) - 10, words) if words else "")


def attention(x1: float, y1: float, x2: float, y2: float, weight: float) -> str:
    """A query at (x1, y1) looks at a key at (x2, y2) with a weight from 0 to 1."""
    bend = (y1 + y2) / 2
    return (
        f'<path d="M{x1:g} {y1:g}C{x1:g} {bend:g} {x2:g} {bend:g} {x2:g} {y2:g}" fill="none" '
        f'stroke="{ATTENTION}" stroke-width="{0.5 + 6 * weight:g}" stroke-opacity="0.8"/>'
    )
