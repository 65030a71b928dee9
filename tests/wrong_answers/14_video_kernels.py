"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_ends": (  # dealt out by turns
        "lambda work, slots: max(sum(work[i::slots]) for i in range(slots))",
        r"the longest first: \[4, 3, 2, 1\] in 2 slots end at 5, yours says 6",
    ),
    "check_mask": (  # the first block for the first frame
        "lambda grid: (lambda block, frame: (frame[:, None] == frame) | (block == 0))(\n"
        "    torch.arange(math.prod(grid) // 32),\n"
        "    torch.arange(math.prod(grid) // 32) // (math.prod(grid[1:]) // 32)\n"
        ")",
        r"\(4, 8, 8\): token 64 misses token 32",
    ),
    "check_capped": (  # as if nothing were capped
        "lambda q, k, v, o, lse, grad, cap: gradients(q, k, v, o, lse, grad, 1)",
        "cap 50: dQ is off by 0.006 of its size",
    ),
    "check_rows": (  # without a mask
        "lambda q, k, v, grad, L: gradients(\n"
        "    q, k, v, *(lambda s: (s.softmax(-1) @ v, s.logsumexp(-1)))(q @ k.T / 4), grad, 1\n"
        ")",
        r"4 rows of 4: dQ is off by \d+% of its size",
    ),
}
