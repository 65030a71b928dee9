"""For each check of the chapter a wrong answer that a reader may well give, and what it says."""

WRONG = {
    "check_rising": (  # rows counted from the bottom
        "lambda speed: -rising(speed)",
        "speed 1: a stroke that moves up gives -1.00, 1 is right",
    ),
    "check_frames_seen": (  # from the first layer to the last
        "lambda layers, causal, k: frames_seen(layers[::-1], causal, k)",
        r"\[\(3, 1\), \(4, 2\)\], causal: output 3 sees frames 2 to 7, yours says",
    ),
    "check_upsample": (
        "lambda dim_in, dim_out, kernel, stride, causal: SameConvTranspose3d(\n"
        "    dim_in, dim_out, kernel, stride, causal\n"
        ")",
        "a flat input has chequers of .* in its output",
    ),
    "check_linear": (  # the first c pixels instead of the best c directions
        "lambda boxes, c: torch.where(torch.arange(64) < c, boxes, boxes.mean(0))",
        "c = 1: error .* can be had",
    ),
}
