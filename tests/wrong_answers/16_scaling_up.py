"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_crossing": (
        "lambda width, mlp_ratio, causal: 6 * width",
        "width 576, ratio 4, causal: with 3456 tokens attention takes 0.50 times the FLOP",
    ),
    "check_lot": (
        "to_bfloat16",
        "1.001953125 is off by 0.25 of a neighbour's distance on average",
    ),
    "check_plan": (
        "lambda hours, rate, held, epochs: (\n"
        "    math.sqrt(hours * 3600 * rate / 120), 20 * math.sqrt(hours * 3600 * rate / 120)\n"
        ")",
        r"1000 hours, 7e\+08 tokens held: the plan reads them .* times",
    ),
    "check_exchange": (
        "lambda rank, step, count: (\n"
        "    (partner := rank ^ (1 << (bit := step % int(math.log2(count))))),\n"
        "    [c for c in range(count) if c >> bit == partner >> bit],\n"
        ")",
        "2 processes: not every chunk is whole everywhere",
    ),
}
