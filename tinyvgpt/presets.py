"""Whole configurations, as functions: data, both stages, and how each is trained.

`tinyvgpt train-vqvae --preset NAME --out RUN --dry-run` prints what one amounts to. Sources:
VideoGPT (Yan et al. 2021), appendix A, for `paper_…`; its released code for `released_…`; ours
otherwise.

Shapes: latent grids are (t, h, w).
"""

from dataclasses import dataclass, replace

from tinyvgpt.gpt import GPTConfig
from tinyvgpt.settings import TrainConfig
from tinyvgpt.vqvae import VQVAEConfig


@dataclass(frozen=True)
class Preset:
    """Everything that a model's two training runs need."""

    data: str  # what open_dataset opens
    vqvae: VQVAEConfig  # stage 1
    train_vqvae: TrainConfig  # how stage 1 is trained
    gpt: GPTConfig  # stage 2
    train_gpt: TrainConfig  # how stage 2 is trained


def moving_mnist() -> Preset:
    """The shipped model: class-conditional with a null label, continues given frames."""
    vqvae = VQVAEConfig(
        channels=1,
        downsample=(2, 4, 4),
        hidden=112,
        res_blocks=4,
        axial=False,
        codes=1024,
        code_dim=64,
        causal_time=True,
        local_encoder=True,
    )
    gpt = GPTConfig.for_vqvae(
        vqvae,
        width=240,
        heads=5,
        layers=8,
        dropout=0.0,
        attn_dropout=0.0,
        classes=55,
        label_dropout=0.2,
    )
    shared = TrainConfig(beta2=0.95, checkpoint_every=1000, validate_every=1000, log_every=50)
    return Preset(
        "moving-mnist",
        vqvae,
        replace(shared, steps=16_000, batch_size=64, lr=1e-3, warmup=200, ema=0.999),
        gpt,
        replace(
            shared,
            steps=29_000,
            batch_size=320,  # 64 clips, and the first latent frame of 256 others
            openings=0.8,
            lr=2e-3,
            warmup=1000,
            weight_decay=0.05,
            ema=0.999,
            encode_once=1_000_000,
        ),
    )


def robot_push() -> Preset:
    """The shipped model of simulated pushing: continues given frames, steered by actions."""
    vqvae = VQVAEConfig(
        downsample=(4, 4, 4),
        hidden=64,
        res_blocks=4,
        codes=1024,
        code_dim=64,
        causal_time=True,
        local_encoder=True,
    )
    gpt = GPTConfig.for_vqvae(
        vqvae,
        width=120,
        heads=3,
        layers=6,
        dropout=0.1,
        attn_dropout=0.0,
        action_dim=4,
        action_std=(0.018, 0.022, 0.019, 0.17),  # metres and radians a frame, of the training clips
    )
    shared = TrainConfig(beta2=0.95, checkpoint_every=1000, validate_every=500, log_every=50)
    return Preset(
        "robot-push",
        vqvae,
        replace(shared, steps=14_000, batch_size=32, lr=1e-3, warmup=200, ema=0.999),
        gpt,
        replace(
            shared,
            steps=17_000,
            batch_size=64,
            lr=1e-3,
            warmup=500,
            weight_decay=0.05,
            ema=0.999,
            encode_once=40_000,
        ),
    )


def laptop() -> Preset:
    """Minutes on two CPU cores: small networks, few tokens; strokes move, digits barely form."""
    vqvae = VQVAEConfig(
        channels=1,
        downsample=(4, 8, 8),
        hidden=32,
        res_blocks=1,
        codes=128,
        code_dim=32,
        causal_time=True,
    )
    gpt = GPTConfig.for_vqvae(
        vqvae,
        width=96,
        heads=4,
        layers=4,
        dropout=0.0,
        attn_dropout=0.0,
        classes=55,
        label_dropout=0.1,
    )
    shared = TrainConfig(batch_size=8, warmup=50, validation_clips=64, preview_every=500)
    return Preset(
        "moving-mnist",
        vqvae,
        replace(shared, steps=1000, lr=2e-3),
        gpt,
        replace(shared, steps=1000, lr=2e-3, batch_size=16),
    )


def own_videos() -> Preset:
    """Colour clips of your own, in minutes on two CPU cores; more steps on a GPU sharpen it."""
    vqvae = VQVAEConfig(
        downsample=(4, 8, 8),
        hidden=48,
        res_blocks=1,
        codes=256,
        code_dim=32,
        causal_time=True,
    )
    gpt = GPTConfig.for_vqvae(
        vqvae, width=144, heads=4, layers=4, dropout=0.1, attn_dropout=0.0, label_dropout=0.1
    )
    shared = TrainConfig(batch_size=8, warmup=50, lr=2e-3, validation_clips=64, preview_every=500)
    return Preset("videos", vqvae, shared, gpt, replace(shared, batch_size=16, weight_decay=0.05))


def released_bair() -> Preset:
    """BAIR robot pushing with the defaults of the original's released code, on one GPU."""
    vqvae = VQVAEConfig(downsample=(4, 2, 2))
    train = TrainConfig(steps=100_000, batch_size=32, lr=3e-4, warmup=0, clip_norm=0.0)
    return Preset("bair.h5", vqvae, train, GPTConfig.for_vqvae(vqvae, cond_frames=1), train)


def paper_moving_mnist() -> Preset:
    """The paper's Moving MNIST model, conditioned on the first frame."""
    vqvae = VQVAEConfig(
        channels=1, downsample=(4, 4, 4), res_blocks=2, axial=False, codes=512, code_dim=64
    )
    gpt = GPTConfig.for_vqvae(
        vqvae, width=192, heads=4, layers=8, mlp_ratio=2.0, dropout=0.1, cond_frames=1
    )
    return _paper("moving-mnist", vqvae, 20_000, gpt, 80_000)


def paper_bair() -> Preset:
    """The paper's BAIR model; its width 512 does not divide by 3 axes, so 504."""
    vqvae = VQVAEConfig(downsample=(2, 2, 2), codes=1024)
    gpt = GPTConfig.for_vqvae(vqvae, width=504, heads=4, layers=16, cond_frames=1)
    return _paper("bair.h5", vqvae, 100_000, gpt, 150_000)


def paper_ucf101() -> Preset:
    """The paper's UCF-101 model at 128 × 128; its width 1024 does not divide by 3, so 1008."""
    vqvae = VQVAEConfig(resolution=128, downsample=(4, 4, 4), codes=1024)
    gpt = GPTConfig.for_vqvae(vqvae, width=1008, heads=8, layers=20, classes=101)
    return _paper("ucf101", vqvae, 100_000, gpt, 600_000)


def _paper(
    data: str, vqvae: VQVAEConfig, vqvae_steps: int, gpt: GPTConfig, gpt_steps: int
) -> Preset:
    train = TrainConfig(batch_size=32, lr=3e-4, warmup=0, clip_norm=0.0)
    return Preset(
        data, vqvae, replace(train, steps=vqvae_steps), gpt, replace(train, steps=gpt_steps)
    )


PRESETS = {
    "laptop": laptop,
    "moving-mnist": moving_mnist,
    "robot-push": robot_push,
    "own-videos": own_videos,
    "released-bair": released_bair,
    "paper-moving-mnist": paper_moving_mnist,
    "paper-bair": paper_bair,
    "paper-ucf101": paper_ucf101,
}


def preset(name: str) -> Preset:
    """The preset called `name`; ValueError lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]()
