"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_code_bits": [
        (
            "lambda usage, cells: cells * torch.log2((usage > 0).float().sum())",
            r"usage \[2, 1, 1, 0\], 100 cells: yours says 158.5 bits, 150.0 is right",
        ),
        (
            "lambda usage, cells: (lambda p: -cells * (p * p.log2()).sum())(usage / usage.sum())",
            "yours says nan bits, 150.0 is right; a code that isn't used adds 0",
        ),
        (
            "lambda usage, cells: cells * torch.log(perplexity(usage))",
            "yours says 13.9 bits, 20.0 is right; is your logarithm to base 2",
        ),
    ],
    "check_dead": (
        "lambda count: count < 0.1 * count.max()",
        "one code with a third of all: 127 of 128 are dead by yours, 0 is right",
    ),
    "check_worst": (
        "lambda flat, codes, n: flat[torch.cdist(flat, codes).sum(1).topk(n).indices]",
        r"\[.*\] is .* from its nearest code, \[.*\] is",
    ),
    "check_residual": [
        (
            "lambda flat, coarse, fine: (\n"
            "    coarse[nearest(flat, coarse)] + fine[nearest(flat, fine)],\n"
            "    torch.stack([nearest(flat, coarse), nearest(flat, fine)], 1),\n"
            ")",
            r"has tokens \[1, .\], \[1, .\] is right: the first code leaves",
        ),
        (
            "lambda flat, coarse, fine: (lambda sums: (lambda best: (\n"
            "    sums.flatten(0, 1)[best],\n"
            "    torch.stack([best // len(fine), best % len(fine)], 1),\n"
            "))(nearest(flat, sums.flatten(0, 1))))(coarse[:, None] + fine)",
            r"the vector \[4.8, 4.8\] has tokens \[1, 3\], \[0, 1\] is right",
        ),
    ],
    "check_fsq": (
        "lambda z: (\n    (2 * torch.tanh(z)).detach().round() / 2,\n    fsq(z)[1],\n)",
        "no gradient comes through: rounding has no slope",
    ),
}
