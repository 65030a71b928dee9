"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_perplexity": (
        "lambda p: (1 / p).mean()",
        r"for 2 tokens, \[0.5, 0.125\] …, yours is 5, 4 is right: the mean surprise is 2 bits",
    ),
    "check_joined": (
        "lambda rows, p: rows[0] * rows[1] * rows[2] / p**2",
        r"row 0 adds up to .*, probabilities to 1",
    ),
    "check_robust_loss": (
        "lambda gpt, tokens, share: (lambda x: cross_entropy(gpt(x), x))(torch.where(\n"
        "    torch.rand(tokens.shape) < share, torch.randint_like(tokens, K), tokens\n"
        "))",
        "a model that knows the truth has a loss of .* judge it by the true tokens",
    ),
    "check_tied": (
        "lambda gpt: torch.nn.Sequential(\n"
        "    (layer := torch.nn.Linear(48, K, bias=False)),\n"
        ").requires_grad_(bool(layer.weight.data.copy_(gpt.token_in(gpt.codes)).numel()))",
        "no gradient reaches token_in: is this a copy of its weights",
    ),
    "check_interval": [
        (
            "lambda guesses, tokens: (\n"
            "    sum(sum(guess[:token]) for guess, token in zip(guesses, tokens)),\n"
            "    math.prod(guess[token] for guess, token in zip(guesses, tokens)),\n"
            ")",
            r"\[1, 1\]: yours begins at 1/4, 15/64 is right",
        ),
        (  # in floats
            "lambda guesses, tokens: tuple(map(float, interval(guesses, tokens)))",
            r"\[2, 1\]: its width is 0.166\d*, 1/6 is right",
        ),
    ],
}
