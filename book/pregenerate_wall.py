"""Draws the clips that the landing page, README and shared links show (minutes on a CPU).

    python book/pregenerate_wall.py

Both shipped models draw, with seed 0, and what they draw is taken as it comes: pairs of digits, by
the labels of the first test clips and the settings of the model's card, and the robot, by the
commands of the first test clips. The page decodes the tokens, which are kept in
book/results/wall-clips.json; README, shared links and the card of moving-mnist have pictures of
their own. Run it again when a model changes: tests/test_wall.py notices.
"""

from pathlib import Path

import torch
from pregenerate_sampling import fingerprint, pack
from torch import Tensor

from tinyvgpt import VideoGPT, bench, open_dataset, video
from tinyvgpt.sampling import SamplingRule, sample_tokens
from tinyvgpt.store import write_atomically
from tinyvgpt.train import conditions

SEED, COLUMNS = 0, 10
CLIPS = {"moving-mnist": 20, "robot-push": 10}  # rows of ten, one under the other
RULES = {  # as the cards' samples are drawn
    "moving-mnist": SamplingRule(temperature=0.9, top_p=0.95, guidance=4.0),
    "robot-push": SamplingRule(),
}
BOOK = Path(__file__).parent
RECORD = BOOK / "results" / "wall-clips.json"
SAMPLES = BOOK / "_static" / "samples.webp"  # README's, which can't play an mp4
CARD = BOOK / "_static" / "card.png"  # beside the titles of shared links
SHEET = BOOK.parent / "tinyvgpt" / "weights" / "moving-mnist" / "samples.png"  # of its model card


def draw(name: str) -> Tensor:
    """A model's tokens, int64 (B, t, h, w)."""
    gpt, count = VideoGPT.from_pretrained(name).gpt, CLIPS[name]
    told = conditions(gpt.config, open_dataset(name, "test").batch(range(count)))
    return sample_tokens(gpt, count, **told, rule=RULES[name], seed=SEED)


def decoded(name: str, tokens: Tensor) -> Tensor:
    """Tokens (B, t, h, w) as clips, uint8 (B, T, H, W, 3)."""
    clips = video.to_uint8(VideoGPT.from_pretrained(name).vqvae.decode(tokens))
    return clips.expand(-1, -1, -1, -1, 3)


def write_samples(clips: Tensor) -> None:
    """The wall as an animated WebP, eight frames a second."""
    from PIL import Image

    frames = [Image.fromarray(frame) for frame in video.grid(clips, COLUMNS).numpy()]
    options = {"save_all": True, "append_images": frames[1:], "duration": 125, "loop": 0}
    write_atomically(
        {SAMPLES: lambda path: frames[0].save(path, "webp", quality=70, method=6, **options)}
    )


def write_card(clips: Tensor) -> None:
    """The ninth frames of the first digits and the first robots, four by four, as a picture."""
    from PIL import Image

    first = torch.cat([clips[:8], clips[CLIPS["moving-mnist"] :][:8]])
    frame = Image.fromarray(video.grid(first, 4)[8].numpy())
    write_atomically({CARD: lambda path: frame.save(path, "png", optimize=True)})


def write_sheet(clips: Tensor) -> None:
    """Every other frame of the first ten clips of digits, a row each, as a picture."""
    from PIL import Image

    frames = clips[:10, ::2].flatten(0, 1)[:, None]  # (80, 1, H, W, 3)
    sheet = Image.fromarray(video.grid(frames, 8)[0].numpy()).convert("L")
    write_atomically({SHEET: lambda path: sheet.save(path, "png", optimize=True)})


def main() -> None:
    """Draws the clips, writes the record and the pictures."""
    walls, models = [], {}
    for name in CLIPS:
        tokens = draw(name)
        walls.append(decoded(name, tokens))
        models[name] = {
            "fingerprint": fingerprint(name),
            "shape": tokens.shape,
            "tokens": pack(tokens.numpy()),
        }
        print(f"{len(tokens)} clips of {name}", flush=True)
    clips = torch.cat(walls)
    found = {"device": bench.device_name("cpu"), "seed": SEED, "models": models}
    bench.record(found, RECORD.stem, "python book/pregenerate_wall.py", RECORD.parent)
    write_samples(clips)
    write_card(clips)
    write_sheet(clips)
    for path in (RECORD, SAMPLES, CARD, SHEET):
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
