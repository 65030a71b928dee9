"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_queries": (
        "lambda flops, bandwidth, size: int(np.ceil(flops / bandwidth * size))",
        r"H200, float32: 56 queries, 28 are right; a query does 4 · S · d",
    ),
    "check_scan": [
        (
            "lambda t, x, out: (t.room('sums', t.threads).__setitem__(t.me, x[t.me]), "
            "out.__setitem__(t.me, t.room('sums', t.threads)[: t.me + 1].sum()), None)[-1]",
            "2 threads: right in . of 8 orders of the threads: somebody reads what is not there",
        ),
        (  # the sums of each thread for itself, after one barrier
            "lambda t, x, out: (\n"
            "    t.room('sums', t.threads).__setitem__(t.me, x[t.me]), (yield),\n"
            "    out.__setitem__(t.me, t.room('sums', t.threads)[: t.me + 1].sum()),\n"
            ")",
            "8 threads: 1 barriers; 3 steps have one or two each",
        ),
    ],
    "check_merge": (
        "lambda a, b: (max(a[0], b[0]), a[1] + b[1], a[2] + b[2])",
        "small scores, 7 and 13 keys: l is .* is right",
    ),
    "check_window": (
        "lambda first, queries, keys, length, window: "
        "range(max(first - window, 0) // keys, -(-(first + queries) // keys))",
        r"300 tokens, window 1, queries from 64 on: tiles \[1, 2, 3\], \[2, 3\] hold what",
    ),
    "check_moments": [
        (
            f"lambda tiles: (lambda s: (s[1] / s[0], s[2] / s[0] - (s[1] / s[0]) ** 2))(\n"
            f"    sum(np.array([len(x), *{sums}], np.{dtype}) for x in tiles)\n"
            f")",
            complaint,
        )
        for dtype, sums, complaint in (
            ("float32", "(x.sum(), (x * x).sum())", "mean about 3000: the variance is .* is right"),
            (
                "float64",
                "(x.sum(dtype=float), np.square(x, dtype=float).sum())",
                "the mean is float64: carry float32",
            ),
        )
    ],
}
