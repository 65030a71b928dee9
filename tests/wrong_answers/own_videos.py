"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_clips_in": (
        "lambda seconds, fps, frames, stride: sum(int(s * fps) // frames for s in seconds)",
        "is 1, 5 is right",
    ),
    "check_find_broken": [
        (
            "lambda folder: [p.name for p in sorted(folder.iterdir()) if not p.stat().st_size]",
            r"d\.mp4 is missing in your list",
        ),
        (
            "lambda folder: [\n"
            "    p.name for p in sorted(folder.iterdir()) if b'ftyp' not in p.read_bytes()[:12]\n"
            "]",
            r"f\.mp4 is missing in your list",
        ),
    ],
    "check_find_cuts": [
        (
            "lambda film: (\n"
            "    (film[1:].float() - film[:-1].float()).abs().mean((1, 2, 3)) > 1\n"
            ").nonzero()[:, 0] + 1",
            "a film without a cut: yours are",
        ),
        (  # differences of uint8 begin again at 0
            "lambda film: ((film[1:] - film[:-1]).abs().amax(-1) > 25)\n"
            ".float().mean((1, 2)).gt(0.3).nonzero()[:, 0] + 1",
            "one that gets darker: yours are",
        ),
    ],
}
