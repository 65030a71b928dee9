"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_leaks": [
        (
            "lambda net, x: [\n"
            "    (7, int(i))\n"
            "    for i in (net(x) != net(F.pad(x[:, :7], (0, 0, 0, 1)))).any(-1).any(0).nonzero()\n"
            "    if i < 7\n"
            "]",
            "a leak at place 2: place 3 is seen from 2, missed",
        ),
        (  # the same added to all channels
            "lambda net, x: [\n"
            "    (j, i) for j in range(8) for i in range(j)\n"
            "    if (net(x + (torch.arange(8) == j)[:, None]) - net(x))[:, i].abs().max() > 1e-5\n"
            "]",
            "the next place, normalised: place 1 is seen from 0, missed",
        ),
    ],
    "check_frame_mask": (
        "lambda t, h, w: causal_mask(t * h * w, t * h * w)",
        "token 0 is in frame 0, token 1 in frame 0, and it must be seen",
    ),
    "check_hops": (
        "lambda blocks: math.ceil(math.log2(len(blocks)))",
        "the full triangle: yours says 4, 1 is right",
    ),
    "check_layout": (
        "lambda n: strided_blocks((4, 16, 16))",
        "90 pairs take more than two hops, such as",
    ),
}
