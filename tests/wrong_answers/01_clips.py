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
        "lambda before, after: (\n"
        "    copies := torch.stack([before.roll((y, x), (0, 1))\n"
        "                           for y in range(-4, 5) for x in range(-4, 5)]),\n"
        "    best := torch.stack([block_costs(copy, after) for copy in copies]).argmin(0),\n"
        "    copies.gather(0, best.repeat_interleave(8, 0).repeat_interleave(8, 1)[None])[0],\n"
        ")[2]",
        "what leaves it below comes in above: block .* is off by .*: that piece is out of reach",
    ),
}
