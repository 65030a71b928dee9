"""Draws the clips of chapter 10's widget: python book/pregenerate_sampling.py (minutes on a CPU).

The shipped model, without a label, at every pairing of a temperature with a rule, always with the
same random numbers. They are kept as tokens, in book/results/sampling-clips.json. Run it again when
the model changes: tests/test_sampling_clips.py notices.
"""

import base64
import hashlib
import zlib
from pathlib import Path

import numpy as np

from tinyvgpt import VideoGPT, bench
from tinyvgpt.sampling import SamplingRule, sample_tokens
from tinyvgpt.store import resolve

MODEL, SEED, CLIPS = "moving-mnist", 0, 6
TEMPERATURES = (0.0, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5)
RULES = {
    "every token": {},
    "top-k, k = 32": {"top_k": 32},
    "top-p, p = 0.95": {"top_p": 0.95},
    "top-p, p = 0.8": {"top_p": 0.8},
}
RECORD = Path(__file__).parent / "results" / "sampling-clips.json"


def fingerprint(name: str) -> str:
    """SHA-256 over a model's configuration and weights."""
    folder = resolve(name)
    files = ("config.json", "vqvae.safetensors", "gpt.safetensors")
    return hashlib.sha256(b"".join((folder / file).read_bytes() for file in files)).hexdigest()


def pack(tokens: np.ndarray) -> str:
    """Tokens as text: 16 bits each, compressed, in base 64."""
    return base64.b64encode(zlib.compress(tokens.astype("<u2").tobytes(), 9)).decode()


def unpack(text: str, shape: list[int]) -> np.ndarray:
    """Undoes `pack`."""
    data = zlib.decompress(base64.b64decode(text))
    return np.frombuffer(data, dtype="<u2").reshape(shape).astype(np.int64)


def main() -> None:
    """Draws the clips and writes the record."""
    gpt = VideoGPT.from_pretrained(MODEL).gpt
    drawn = []
    for temperature in TEMPERATURES:
        for name, fields in RULES.items():
            rule = SamplingRule(temperature=temperature, **fields)
            if temperature or name == next(iter(RULES)):  # at 0 the likeliest token, by any rule
                clips = sample_tokens(gpt, CLIPS, seed=SEED, rule=rule).numpy()
            drawn.append(clips)
            print(f"temperature {temperature}, {name}", flush=True)
    tokens = np.stack(drawn).reshape(len(TEMPERATURES), len(RULES), CLIPS, *drawn[0].shape[1:])
    found = {
        "device": bench.device_name("cpu"),
        "model": MODEL,
        "fingerprint": fingerprint(MODEL),
        "seed": SEED,
        "temperatures": TEMPERATURES,
        "rules": RULES,
        "shape": tokens.shape,
        "tokens": pack(tokens),
    }
    bench.record(found, RECORD.stem, "python book/pregenerate_sampling.py", RECORD.parent)
    print(f"{RECORD}: {RECORD.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
