"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_label3": (
        "lambda digits: int(''.join(map(str, digits)))",
        "735 has label 735 and 357 has 357: order must not count",
    ),
    "check_decoded": (
        "lambda first, frames, gop: frames + gop",
        "a clip that starts at a key frame takes 16 frames, not 46",
    ),
    "check_reflect": ("travel", "from 0.95 yours stops at the wall"),
    "check_fall": (  # moves before it falls
        "lambda p, v, n, g: [p := min(max(p + ((v := v + g) - g), 0), 1) for _ in range(n)]",
        "the first step goes nowhere: add g to the velocity before you move",
    ),
    "check_place_of": ("shuffled", "place_of is shuffled, it goes forwards"),
    "check_locate": (  # as if all videos were as long as the first
        "lambda index, lengths, frames, stride=1: divmod(\n"
        "    index, (lengths[0] - frames) // stride + 1\n"
        ")",
        r"videos of \[16, 17, 16\] frames, stride 1: clip 2 of 4 is \(1, 1\), you say \(2, 0\)",
    ),
    "check_squares": (  # random numbers by batch
        "type('Squares', (), {\n"
        "    '__len__': lambda self: 10_000,\n"
        "    'batch': lambda self, indices, device='cpu': {\n"
        "        'video': torch.randint(256, (len(indices), 16, 64, 64, 3), dtype=torch.uint8),\n"
        "        'label': torch.randint(3, (len(indices),)),\n"
        "    },\n"
        "})()",
        "clip 0 alone is not clip 0 among others: count random numbers by clip",
    ),
}
