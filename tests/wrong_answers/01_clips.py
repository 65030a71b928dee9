"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_weight": (
        "lambda hours, height, width, channels, fps: hours * 3600 * fps * height * width / 1e9",
        "447.898, 1343.6928 is right: multiply by 3",
    ),
    "check_ping_pong": (
        "lambda clip: torch.cat([clip, clip.flip(0)])",
        "frame 4 comes twice in a row",
    ),
    "check_on_screen": (
        "lambda times, fps, start, count: [\n"
        "    (times - start - n / fps).abs().argmin() for n in range(count)\n"
        "]",
        r"frames at 0, 1, 2, 3 s: .* yours shows \[0, 1, 1, .*\], \[0, 0, 1, .*\] is on screen",
    ),
    "check_smooth_matrix": ("resize_matrix", "72 → 32: new pixel .* of old pixel .* is right"),
    "check_motion": (
        "lambda before, after: before",
        "block .* is off by .*: a better one is in reach",
    ),
}
