"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_multiplications": (
        "lambda t, h, w, width: (\n"
        "    t * h * w * (4 * width**2 + 2 * width * t * h * w),\n"
        "    t * h * w * (4 * width**2 + 2 * width * (t + h + w)),\n"
        ")",
        r"axial on \(8, 32, 32\), D 64: .* 8 · D² a position are missing",
    ),
    "check_mirror": (
        "lambda length: (torch.eye(length).flip(0), torch.eye(length))",
        "of its weight column 0 puts only 0.018 on its mirror; make the scores differ more",
    ),
    "check_latest": (
        "lambda layer, frames, t: t",
        "without a mask: of 5 frames, frame 2 depends on frame 4 at the latest, yours says 2",
    ),
    "check_sequence": (
        "lambda axial, x: x + axial(x)",
        "a position reaches 10 of 60: all were to be had",
    ),
    "check_in_pieces": [
        (
            "lambda q, pieces: torch.stack([attend(q, k, v) for k, v in pieces]).mean(0)",
            "pieces of 4: off by .* A piece counts for as much as the sum of its exponentials",
        ),
        (
            "lambda q, pieces: attend(q, *(\n"
            "    torch.cat(x, -2) for x in zip(*((k.clone(), v.clone()) for k, v in pieces))\n"
            "))",
            "pieces of 4: what you keep grows with every piece",
        ),
    ],
}
