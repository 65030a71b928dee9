"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_holder": (
        "lambda name, row, column: (\n"
        "    row % 8 * 4 + column % 8 // 2, row // 8 * 2 + column // 8, column % 2\n"
        ")",
        r"A, row 8, column 0: yours says lane, register and half \(0, 2, 0\), it is \(0, 1, 0\)",
    ),
    "check_arrange": (
        "lambda row, chunk, d: row * d + (chunk ^ row % min(d // 8, 8)) * 8",
        "d 16: a load of keys takes 8 cycles, not 4",
    ),
    "check_product": (
        "lambda a, b, multiply: multiply(a.bfloat16(), b.bfloat16())",
        "the relative error is .*e-03, at most 1e-4 will do",
    ),
    "check_schedule": (
        "lambda tiles, stages: [('copy', i) for i in range(stages - 1)] + [\n"
        "    step for i in range(tiles)\n"
        "    for step in (('wait', 0), ('copy', i + stages - 1), ('use', i))\n"
        "]",
        "5 tiles, 3 stages: tile 0 needs no wait for tile 1",
    ),
    "check_reuse": (
        "lambda rows, d, step, held: 4 * rows * step * d / (8 * (step // 16) * (d // 16))",
        "rung 6, d 128: yours says 4096, 3072 is right",
    ),
}
