"""Diagrams of chapter 11: where conditions enter a transformer, and what an action leads to."""

from vocabulary import (
    CELL,
    COLOURS,
    INK,
    arrow,
    attention,
    caption,
    card,
    cell,
    clip,
    code,
    predicted,
    row,
    text,
)

BLUE, SKY, GREEN, RED, PINK, _ = COLOURS


def box(x: float, y: float, width: float, height: float, words: str) -> str:
    """A part of the network."""
    outline = (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="#fff" '
        f'stroke="{INK}" stroke-width="1.5"/>'
    )
    return outline + text(x + width / 2, y + height / 2 + 5, words)


def doors() -> str:
    """A label sets norms, frames are looked at or stand in front, actions are added."""
    tokens = row(302, 254, [BLUE, BLUE, SKY, RED])
    return card(
        760,
        330,
        # the network, from its input upwards
        box(290, 176, 180, 34, "self-attention"),
        box(290, 124, 180, 34, "cross-attention"),
        box(290, 72, 180, 34, "MLP"),
        arrow(380, 72, 380, 42),
        predicted(370, 20),
        arrow(380, 124, 380, 108),
        arrow(380, 176, 380, 160),
        arrow(380, 246, 380, 212),
        tokens,
        predicted(302 + 4 * CELL, 254),
        text(412, 268, "…", anchor="start"),
        # a label
        cell(78, 128, PINK, label="7", size=26),
        caption(91, 176, "a label", "sets every norm"),
        arrow(118, 136, 282, 92),
        arrow(118, 142, 282, 140),
        arrow(118, 148, 282, 190),
        # the first frames, twice
        clip(622, 66, size=54, frames=2),
        caption(654, 160, "first frames", "as a memory"),
        attention(475, 141, 612, 118, 0.7),
        attention(475, 141, 612, 96, 0.25),
        attention(475, 141, 612, 138, 0.1),
        text(322, 296, "first frames' tokens"),
        f'<path d="M302 280h40" stroke="{INK}" stroke-width="2"/>',
        # actions
        *(code(x, 222, GREEN, width=10, height=40) for x in (600, 616, 632, 648)),
        caption(629, 284, "actions", "are added"),
        arrow(590, 242, 412, 234),
    )


def actions() -> str:
    """Frames in latent frames of four, and the action that leads to each."""
    left, step, parts = 60, 40, []
    for frame in range(12):
        x = left + frame * step
        shade = (BLUE, SKY, GREEN)[frame // 4]
        parts.append(cell(x, 60, "#111", size=30, label=str(frame)))
        parts.append(
            f'<path d="M{x - 14:g} 54C{x - 14:g} 30 {x + 6:g} 30 {x + 6:g} 52" fill="none" '
            f'stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'
            if frame
            else ""
        )
        parts.append(cell(x - 2, 122, shade, size=34, label="0" if not frame else f"a{frame - 1}"))
    for latent, shade in enumerate((BLUE, SKY, GREEN)):
        x = left + latent * 4 * step
        parts.append(
            f'<rect x="{x - 2:g}" y="186" width="{4 * step - 6}" height="34" fill="{shade}"/>'
        )
        parts.append(text(x + 2 * step - 5, 208, f"latent frame {latent}", colour="#fff"))
        parts.append(arrow(x + 2 * step - 5, 158, x + 2 * step - 5, 182))
    return card(
        760,
        240,
        *parts,
        text(552, 80, "frames", anchor="start"),
        text(552, 46, "action i leads from i to i + 1", anchor="start"),
        text(552, 144, "what leads to each", anchor="start"),
        text(552, 208, "four of them, joined", anchor="start"),
    )


DIAGRAMS = {"11-doors.svg": doors, "11-actions.svg": actions}
