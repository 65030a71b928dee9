"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_first_changed": (
        "lambda i, f, frames: i // f",
        "action 3, latent frames of 4: yours is 0, 1 is right; it leads to frame 4",
    ),
    "check_classify": [
        (
            "lambda logits_of, tokens, candidates: max(\n"
            "    candidates,\n"
            "    key=lambda y: logits_of(y).gather(-1, tokens[..., None]).sum().item(),\n"
            ")",
            "7 only has larger logits",
        ),
        (
            "lambda logits_of, tokens, candidates: max(\n"
            "    candidates, key=lambda y: logits_of(y).log_softmax(-1).amax(-1).sum().item()\n"
            ")",
            "yours is [49], the clip is likeliest under 2",
        ),
    ],
    "check_schedule": (
        "lambda position, w, per_frame, frames: w + position / (per_frame * frames) * (1 - w)",
        r"token 255 is in latent frame 0: yours is 4\.\d+, 4\.5 is right",
    ),
    "check_start_label": (
        "type('StartLabel', (nn.Module,), {\n"
        "    '__init__': lambda self, classes, width: (\n"
        "        nn.Module.__init__(self),\n"
        "        setattr(self, 'table', nn.Embedding(classes + 1, width)),\n"
        "    )[0],\n"
        "    'forward': lambda self, start, labels: start + self.table(labels)[:, None],\n"
        "})",
        "before training the start vector has changed",
    ),
}
