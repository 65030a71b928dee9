"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_cache_bytes": (
        "lambda config, batch, size: config.layers * config.width * config.tokens * batch * size",
        "the shipped model, 1 clip, float32: .* are needed: × 2$",
    ),
    "check_min_p": (
        "lambda p, share: p.masked_fill(p < share, 0) / p.masked_fill(p < share, 0).sum(-1, True)",
        r"share 0.25 of \[0.16, 0.5, 0.04, 0.3\]: yours keeps tokens \[1, 3\], \[0, 1, 3\] are",
    ),
    "check_race": (
        "lambda z, u, temperature=1.0: (z / temperature + u).argmax(-1)",
        "temperature 1.0: token 0 wins .* of the races, its probability is 0.600",
    ),
    "check_ranking": [
        (
            "lambda logits, tokens: (\n"
            "    logits.gather(-1, tokens[..., None]).sum((1, 2)).argsort(descending=True)\n"
            ")",
            r"come out in the order \[0, .* logits are only as good as log-probabilities",
        ),
        (
            "lambda logits, tokens: (\n"
            "    logits.softmax(-1).gather(-1, tokens[..., None])[..., 0].prod(1)\n"
            "    .argsort(descending=True)\n"
            ")",
            r"come out in the order \[0, 1, 2\]",
        ),
    ],
    "check_window": (
        "lambda q, k, v, window: attend(q, k[:, :, -window:], v[:, :, -window:])",
        "6 queries on 6 keys, window 1: the query of place 0 should see places 0 to 0",
    ),
}
