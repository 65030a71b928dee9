"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_bits": (
        "lambda shape, downsample, codes: codes / math.prod(downsample)",
        "the shipped model: 32 bits a pixel, 0.3125 is right; a choice out of 1024 takes 10 bits",
    ),
    "check_step": [
        (
            "lambda model, optimizer, clips: (\n"
            "    loss := losses(model, video.to_model(clips))['loss'],\n"
            "    loss.backward(),\n"
            "    optimizer.step(),\n"
            ")",
            "the second step misses what its own gradient asks for by .*: the first one's",
        ),
        (
            "lambda model, optimizer, clips: (\n"
            "    loss := losses(model, video.to_model(clips))['loss'],\n"
            "    loss.backward(),\n"
            "    clip_gradients(model, 1.0),\n"
            "    optimizer.step(),\n"
            ")",
            "the second step misses what its own gradient asks for by .*: the first one's",
        ),
    ],
    "check_snapshot": (
        "lambda run: {\n"
        "    'step': run.step,\n"
        "    **{name: getattr(run, name).state_dict() for name in\n"
        "       ('model', 'optimizer', 'average')},\n"
        "}",
        "weights are off by .* after going on; a state dict holds the live tensors",
    ),
    "check_two": (
        "lambda codes, dim: type('Plain', (TwoCodebooks,), {'forward': lambda self, z: Quantized(\n"
        "    (a := self.first(z)).vectors + (b := self.second(z - a.vectors)).vectors,\n"
        "    torch.stack([a.tokens, b.tokens], dim=1),\n"
        "    a.commitment_loss + b.commitment_loss, *b[3:],\n"
        ")})(codes, dim)",
        "is right, but not its gradient: does what the second codebook gets still depend on z",
    ),
}
