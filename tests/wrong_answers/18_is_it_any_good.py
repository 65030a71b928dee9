"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_endless": (
        "distance",
        r"two sets of the same Gaussian: yours is 0\.\d+ on average, near 0 is right",
    ),
    "check_order_features": (
        "lambda tracks: tracks.diff(dim=1).norm(dim=-1).mean(1)",
        "which digit comes first changes features by",
    ),
    "check_kernel_distance": (
        "lambda a, b: sum(\n"
        "    sign * ((x @ y.mT / x.shape[1] + 1) ** 3).mean()\n"
        "    for sign, x, y in [(1, a, a), (1, b, b), (-2, a, b)]\n"
        ")",
        r"yours is 13\.75; 1 \+ 2 - 2 · 3 = -3 is right",
    ),
}
