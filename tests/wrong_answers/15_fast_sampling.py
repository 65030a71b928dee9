"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_balance": (
        "lambda c: int(np.ceil(weights_of(c) / (2 * c.tokens * c.layers * c.width)))",
        "released: 1 clips, 2 are right; a query sees",
    ),
    "check_repeat": [
        (
            "lambda s: (\n"
            "    s['ring'].__setitem__(int(s['place']) % 4, s['x'][0]), s['place'].add_(1),\n"
            "    s['mean'].copy_(s['ring'][: int(s['place'])].mean())\n"
            ")",
            "after 1 replays: the mean is 1, 0.5 is right",
        ),
        (
            "lambda s: (\n"
            "    s['ring'].index_copy_(0, s['place'] % 4, s['x']), s['place'].add_(1),\n"
            "    s['mean'].copy_(s['ring'].sum() / s['place'].clamp(max=4))\n"
            ")",
            "after 0 replays: the mean is 300, 0 is right",
        ),
        (
            "lambda s: (\n"
            "    s['ring'].copy_(torch.cat([s['ring'][1:], s['x']])), s['place'].add_(1),\n"
            "    s['mean'].copy_((s['ring'] * (torch.arange(4) >= 4 - s['place'])).sum()\n"
            "                    / s['place'].clamp(max=4))\n"
            ")",
            r"after 0 replays: ring\[0\] isn't the newest",
        ),
    ],
    "check_early": [
        (
            "lambda queue: [kernel[0] - queue[n - 1][1] for n, kernel in enumerate(queue)]",
            r"product is soon: kernel 1 may read \['cache'\] early, yours says \['cache', 'n'\]",
        ),
        (
            "lambda queue: [\n"
            "    r - queue[n - 1][1] - (queue[n - 2][1] if queue[n - 1][2] else set())\n"
            "    for n, (r, w, s) in enumerate(queue)\n"
            "]",
            r"the first two are soon: kernel 2 may read \['w'\] early, yours says \['w', 'x'\]",
        ),
    ],
    "check_draft": (
        "lambda p, q, token, u, v: (\n"
        "    token if u * q[token] < p[token]\n"
        "    else int(np.searchsorted(p.cumsum(), v, side='right'))\n"
        ")",
        r"token \d comes in 0.\d+ of the rounds, 0.\d+ is right",
    ),
}
