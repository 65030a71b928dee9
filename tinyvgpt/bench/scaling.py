"""How throughput grows with the number of GPUs of one machine, the batch of each staying the same.

One process a GPU, joined as under torchrun; a step is the training loop's own, whole. On a machine
without GPUs the processes are on the CPU and talk by gloo: that only shows that it runs. Chapter 16
reads the record.

Shapes: none of its own.
"""

import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig
from tinyvgpt.bench.train import RELEASED, fast, ours, timed
from tinyvgpt.distributed import any_rank, joined, rank
from tinyvgpt.loop import Batch, Stage, fastest_convolutions, place
from tinyvgpt.settings import TrainConfig
from tinyvgpt.train import gpt_stage, vqvae_stage


def scaling(
    vqvae: VQVAEConfig = RELEASED,
    gpt: GPTConfig | None = None,
    *,
    device: str = "cuda",
    processes: tuple[int, ...] | None = None,
    vqvae_batch: int = 16,
    gpt_batch: int = 8,
    steps: int = 20,
) -> dict[str, Any]:
    """Units a second of both stages for each number of processes.

    Args:
        vqvae: the tokenizer.
        gpt: the GPT; by default the released size with 9 heads, without dropout.
        device: "cuda" or "cpu".
        processes: their numbers, 1 among them; by default powers of two up to the GPUs.
        vqvae_batch: clips a process, of the tokenizer.
        gpt_batch: clips a process, of the GPT.
        steps: timed at a time.

    Returns:
        For each stage and number, timings of all processes together, and how many times as much
        as one process does.
    """
    if processes is None:
        processes = tuple(n for n in (1, 2, 4, 8) if n <= max(torch.cuda.device_count(), 1))
    if gpt is None:
        size = {"width": 576, "layers": 8, "heads": 9, "dropout": 0.0, "attn_dropout": 0.0}
        gpt = GPTConfig.for_vqvae(vqvae, **size)
    batches = {"gpt": gpt_batch, "vqvae": vqvae_batch}
    result: dict[str, Any] = {"processes": list(processes), "clips a process": batches}
    for stage in ("gpt", "vqvae"):
        found: dict[str, Any] = {}
        for count in processes:
            with tempfile.TemporaryDirectory() as folder:
                file = str(Path(folder, "found.json"))
                job = (count, free_port(), stage, vqvae, gpt, device, batches[stage], steps, file)
                start_processes(measure, args=job, nprocs=count, start_method="spawn")
                found[str(count)] = json.loads(Path(file).read_text())
        alone = found["1"]["per second"]
        times = {
            f"{n} against 1": round(found[str(n)]["per second"] / alone, 3)
            for n in processes
            if n > 1
        }
        result[stage] = {**found, **times}
    return result


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(
    index: int,
    count: int,
    port: int,
    stage_name: str,
    vqvae: VQVAEConfig,
    gpt: GPTConfig,
    device: str,
    batch: int,
    steps: int,
    file: str,
) -> None:
    """What process `index` of `count` does; the first one writes what it measured."""
    places = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    config = fast(batch * count, torch.device(device))
    with joined(config.torch_device()) as where, fastest_convolutions(where):
        stage, data = made(stage_name, vqvae, gpt, config, batch, where)
        alone = ours(stage, config, data, where)

        def step() -> None:
            alone()
            any_rank(False)  # as `loop.train` asks after each step

        found = timed(step, where, steps, config.batch_size * stage.units_per_clip)
        if rank() == 0:
            Path(file).write_text(json.dumps(found))


def made(
    name: str,
    vqvae: VQVAEConfig,
    gpt: GPTConfig,
    config: TrainConfig,
    batch: int,
    device: torch.device,
) -> tuple[Stage, Batch]:
    """A stage on its device, and random data for a step."""
    torch.manual_seed(0)
    tokenizer = VQVAE(vqvae)
    if name == "gpt":
        model = VideoGPT(tokenizer, GPT(gpt, tokenizer.codebook.codes))
        stage = gpt_stage(model, config, "")
        data = {"tokens": torch.randint(gpt.codes, (batch, *gpt.latent_shape))}
    else:
        stage = vqvae_stage(tokenizer, "")
        size = (batch, vqvae.frames, vqvae.resolution, vqvae.resolution, vqvae.channels)
        data = {"video": torch.randint(256, size, dtype=torch.uint8)}
    place(stage.module, device)
    return stage, {key: value.to(device) for key, value in data.items()}
