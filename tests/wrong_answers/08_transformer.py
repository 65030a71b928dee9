"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_widest": (
        "lambda budget, layers: int((budget / (12 * layers)) ** 0.5) // 12 * 12",
        "30,000,000 parameters, 8 layers: width 552 takes ",
    ),
    "check_as_sum": (
        "lambda tables: [F.pad(table, (0, 2 * table.shape[1])) for table in tables]",
        r"the sum differs from the marks in channels \[0, 1, ",
    ),
    "check_fold": (
        "lambda norm, linear: (\n"
        "    merged := __import__('copy').deepcopy(linear),\n"
        "    merged.weight.data.mul_(norm.gain),\n"
        "    merged.bias.data.add_(merged.weight @ norm.bias),\n"
        ")[0]",
        "the gain or the bias is not folded in right: outputs are off by",
    ),
    "check_codebook_head": (
        "lambda width, codes: nn.Sequential(\n"
        "    project(width, codes.shape[1], 0.02), project(codes.shape[1], len(codes), 0.0)\n"
        ")",
        "240 numbers are trained, 144 will do",
    ),
}
