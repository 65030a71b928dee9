"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_go_to": (
        "lambda tip, goal, most: F.pad(\n"
        "    (goal - tip) / math.ceil((goal - tip).norm().item() / most), (0, 1)\n"
        ").expand(math.ceil((goal - tip).norm().item() / most), 4)",
        r"2 steps to \[0\.03\d*, 0\.03\d*, 0\.1\d*\], 1 will do",
    ),
    "check_unknown": (
        "type('Unknown', (nn.Module,), {\n"
        "    '__init__': lambda self, embedding, width: (\n"
        "        nn.Module.__init__(self),\n"
        "        setattr(self, 'embedding', embedding),\n"
        "    )[0],\n"
        "    'forward': lambda self, actions, known: self.embedding(\n"
        "        actions * known[:, None, None]\n"
        "    ),\n"
        "})",
        r"before training unknown actions give up to \d\.\d\d, not 0",
    ),
    "check_plan": (
        "lambda world, n, rounds, shape, generator: (\n"
        "    lambda plans: plans[world(plans).argmin()]\n"
        ")(torch.randn(n * rounds, *shape, generator=generator))",
        r"it ends \d\.\d\d from the goal: do later rounds draw near the best",
    ),
}
