"""Times kernels cut otherwise than their tables say: python -m tinyvgpt.bench.tune [axial …].

"step" is a whole decoding step.

For a GPU that the tables were not made on, or a shape: the fastest line is what to write in the
table. Lines are printed as they come. Chapter 14 has the tables' meaning.

Shapes: those of `kernels`.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from tinyvgpt import GPT, GPTConfig
from tinyvgpt.bench.kernels import CACHED, Call, milliseconds, milliseconds_of, random
from tinyvgpt.graph_decoder import STEPS, GraphDecoder
from tinyvgpt.kernels import axial, decode, flash, flash_attention, flash_backward, step
from tinyvgpt.sampling import Sampler

REPEATS = 10
FORWARD_64 = [
    (8, 16, 64, 64, 2, True, 2),
    (4, 32, 64, 32, 2, False, 3),
    (4, 32, 128, 64, 2, True, 2),
    (4, 32, 64, 32, 2, True, 2),
]
FORWARD_128 = [
    (4, 32, 64, 32, 2, False, 2),
    (4, 32, 64, 64, 2, False, 2),
    (8, 16, 64, 64, 2, True, 1),
]
FORWARD_144 = [(4, 32, 32, 32, 2, False, 2), (4, 32, 48, 16, 2, False, 2)]
# Pairs, of blocks that own keys and of those that own queries.
BACKWARD_64 = [((4, 16, 64, 64, False), (4, 16, 64, 64, True))]
BACKWARD_128 = [
    ((4, 16, 64, 32, False), (4, 16, 64, 64, True)),
    ((8, 16, 64, 32, False), (4, 32, 32, 32, False)),
]
BACKWARD_144 = [((4, 16, 32, 32, False), (4, 32, 32, 32, False))]
Variant = tuple[dict[Any, Any], Any, Sequence[Any], Callable[[], float]]


def main() -> None:
    """Prints milliseconds of each variant of the kernels that are named, or of all."""
    kinds: dict[str, Callable[[], Iterator[tuple[str, Variant]]]] = {
        "axial": axial_variants,
        "decode": decode_variants,
        "flash": flash_variants,
        "backward": backward_variants,
        "step": step_variants,
    }
    wanted = sys.argv[1:] or list(kinds)
    if unknown := set(wanted) - set(kinds):
        sys.exit(f"no kernels {', '.join(sorted(unknown))}; known are {', '.join(kinds)}")
    with torch.cuda.stream(torch.cuda.Stream()):
        for kind in wanted:
            for title, variant in kinds[kind]():
                compare(f"{kind}, {title}", *variant)


def compare(
    title: str, table: dict[Any, Any], key: Any, entries: Sequence[Any], measure: Call
) -> None:
    """Prints a measurement for each entry in a table's place; the first line is the table's."""
    former = table[key]
    for entry in [former, *entries]:
        table[key] = entry
        axial.plan.cache_clear()
        try:
            print(f"{title}: {measure():.4f} ms  {entry}", flush=True)
        except RuntimeError as error:
            print(f"{title}: {str(error).splitlines()[0][:100]}  {entry}", flush=True)
    table[key] = former


def axial_variants() -> Iterator[tuple[str, Variant]]:
    """(teams, blocks) by shape and axis, forward and backward."""
    shapes: list[tuple[tuple[int, ...], int, list[tuple[int, int]], list[tuple[int, int]]]] = [
        ((16, 4, 32, 32, 2, 120), 2, [(2, 4), (1, 6)], [(2, 3), (1, 5)]),
        ((16, 4, 32, 32, 2, 120), 1, [(2, 8), (1, 16), (8, 2)], [(2, 6), (1, 12)]),
        ((16, 16, 64, 64, 2, 64), 1, [(2, 16), (8, 4), (4, 6)], [(2, 10), (2, 12), (4, 6)]),
        ((16, 16, 64, 64, 2, 64), 3, [(1, 6), (2, 2), (2, 3), (1, 4)], [(2, 2), (1, 3)]),
    ]
    for shape, axis, forward, backward in shapes:
        q, k, v, g = (random(*shape) for _ in range(4))
        key, wide = axial.warps(shape[axis]), shape[-1] > 64

        def run(q=q, k=k, v=v, axis=axis):
            return torch.ops.tinyvgpt.axial_attention(q, k, v, axis, False)

        def run_back(q=q, k=k, v=v, g=g, axis=axis):
            return torch.ops.tinyvgpt.axial_attention_backward(g, q, k, v, axis, False)

        for name, table, cuts, call in (
            ("forward", axial.FORWARD, forward, run),
            ("backward", axial.BACKWARD, backward, run_back),
        ):
            entries = []
            for cut in cuts:
                entry = list(table[key])
                entry[wide] = axial.Tiles(*cut)
                entries.append(tuple(entry))
            measure = lambda call=call: milliseconds([call] * 5, REPEATS)  # noqa: E731
            yield f"{name} {shape} along {'THW'[axis - 1]}", (table, key, entries, measure)


def decode_variants() -> Iterator[tuple[str, Variant]]:
    """(warps, stages, keys, blocks) by shape."""
    shapes: list[tuple[tuple[int, int, int], list[tuple[int, int, int, int]]]] = [
        ((1, 16, 64), [(4, 8, 2, 1), (8, 3, 2, 1), (2, 8, 4, 1), (4, 6, 4, 1)]),
        ((1, 8, 128), [(8, 3, 1, 1), (4, 8, 1, 1), (4, 6, 2, 1)]),
        ((1, 4, 144), [(4, 4, 2, 1), (4, 6, 1, 1), (8, 4, 1, 1)]),
        ((16, 16, 64), [(4, 3, 4, 8), (4, 4, 4, 3), (8, 3, 2, 4), (4, 2, 4, 4)]),
        ((64, 16, 64), [(4, 3, 4, 8), (4, 4, 4, 3), (8, 3, 2, 4), (4, 2, 4, 4)]),
        ((64, 8, 128), [(4, 3, 2, 4), (4, 4, 2, 3), (8, 3, 1, 4)]),
    ]
    for (b, nh, d), cuts in shapes:
        size = 4 * b * nh * CACHED * d
        level_2 = torch.cuda.get_device_properties(0).L2_cache_size
        rows = (b, nh, CACHED, d)
        caches = [(random(*rows), random(*rows)) for _ in range(3 * level_2 // size + 2)]
        q, lengths = random(b, nh, 1, d), torch.full((b,), CACHED, device="cuda").int()
        calls: list[Call] = [
            partial(decode.decode_attention, q, *cache, lengths=lengths) for cache in caches
        ]
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        table = decode.FEW if b * nh < processors else decode.MANY
        entries = [decode.Tiles(*cut) for cut in cuts]
        measure = lambda calls=calls: milliseconds(calls, REPEATS)  # noqa: E731
        yield f"{rows}", (table, decode.chunks(d), entries, measure)


def flash_variants() -> Iterator[tuple[str, Variant]]:
    """(warps, rows, tile, step, stages, held, blocks) by head dim."""
    shapes: list[tuple[tuple[int, int, int, int], bool, list[tuple[Any, ...]]]] = [
        ((4, 16, 4096, 64), False, FORWARD_64),
        ((4, 16, 4096, 64), True, FORWARD_64),
        ((4, 8, 4096, 128), False, FORWARD_128),
        ((4, 8, 4096, 128), True, FORWARD_128),
        ((8, 4, 4096, 144), True, FORWARD_144),
    ]
    for shape, causal, cuts in shapes:
        q, k, v = (random(*shape) for _ in range(3))
        key = next(most for most in flash.DENSE if shape[-1] <= most)
        call = lambda q=q, k=k, v=v, causal=causal: flash_attention(q, k, v, causal)  # noqa: E731
        measure = lambda call=call: milliseconds([call] * 3, REPEATS)  # noqa: E731
        entries = [flash.Tiles(*cut) for cut in cuts]
        yield f"{shape} {'causal' if causal else 'full'}", (flash.DENSE, key, entries, measure)


def backward_variants() -> Iterator[tuple[str, Variant]]:
    """A pair of (warps, rows, tile, step, held), for blocks that own keys and queries."""
    shapes: list[tuple[tuple[int, int, int, int], list[tuple[tuple, tuple]]]] = [
        ((4, 16, 4096, 64), BACKWARD_64),
        ((4, 8, 4096, 128), BACKWARD_128),
        ((8, 4, 4096, 144), BACKWARD_144),
    ]
    for shape, cuts in shapes:
        q, k, v, g = (random(*shape) for _ in range(4))
        o, lse = flash.attention_with_lse(q, k, v)
        key = next(most for most in flash_backward.DENSE if shape[-1] <= most)

        def call(q=q, k=k, v=v, g=g, o=o, lse=lse):
            scale = q.shape[-1] ** -0.5
            backward = torch.ops.tinyvgpt.flash_backward
            return backward(g, q, k, v, o, lse, False, scale, None, None)

        tiles = flash_backward.Tiles
        entries = [(tiles(*keys), tiles(*queries)) for keys, queries in cuts]
        measure = lambda call=call: milliseconds([call] * 3, REPEATS)  # noqa: E731
        yield f"{shape} full", (flash_backward.DENSE, key, entries, measure)


def step_variants() -> Iterator[tuple[str, Variant]]:
    """Whether kernels overlap and how many warps a product has, in the middle of released clips."""
    config = GPTConfig(latent_shape=(4, 32, 32))
    gpt = GPT(config, torch.randn(config.codes, config.code_dim)).eval().cuda()
    for batch in (1, 16, 64):

        def measure(batch=batch):
            decoder = Sampler(gpt, batch, seed=0).decoder
            assert isinstance(decoder, GraphDecoder)
            decoder.prefill(0)
            decoder.tokens.zero_()
            decoder.position = CACHED // 2
            decoder.begin(decoder.position)
            decoder.draw(decoder.position, 1 + STEPS)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                decoder.lengths.fill_(CACHED // 2)  # each replay begins where the first did
                for _ in range(STEPS):
                    decoder.step()
            return milliseconds_of(graph, REPEATS) / STEPS

        for table, key, entries in (
            (vars(step), "OVERLAP", [not step.OVERLAP]),
            (vars(step), "WARPS", [9, 12]),
            (vars(step), "MANY", [1, 1 << 20]),
        ):
            yield f"batch {batch}, {key}", (table, key, entries, measure)


if __name__ == "__main__":
    main()
