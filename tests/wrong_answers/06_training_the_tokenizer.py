"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_bits": (
        "lambda shape, downsample, codes: codes / math.prod(downsample)",
        "the shipped model: 32 bits a pixel, 0.3125 is right; a choice out of 1024 takes 10 bits",
    ),
    "check_step": (
        "lambda model, optimizer, clips: (\n"
        "    loss := losses(model, video.to_model(clips))['loss'],\n"
        "    loss.backward(),\n"
        "    optimizer.step(),\n"
        ")",
        "weights still have a gradient; the next one is added to it",
    ),
    "check_snapshot": (
        "lambda run: {\n"
        "    'step': run.step,\n"
        "    **{name: getattr(run, name).state_dict() for name in\n"
        "       ('model', 'optimizer', 'average')},\n"
        "}",
        "weights are off by .* after going on; a state dict holds the live tensors",
    ),
    "check_two": (
        "lambda codes, dim: type('Same', (TwoCodebooks,), {'forward': lambda self, z: Quantized(\n"
        "    (q := self.first(z)).vectors,\n"
        "    torch.stack([q.tokens, self.second(z).tokens], dim=1), *q[2:],\n"
        ")})(codes, dim)",
        "the error is .* does the second codebook see what the first left over",
    ),
}
