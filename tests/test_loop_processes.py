"""Training in two processes: what one would have learnt, resumed from one another, written once."""

from dataclasses import replace

import pytest
import torch
from processes import run_processes, start_processes
from test_train import QUICK, Clips, Stop, StopsAfter, fresh_gpt, fresh_vqvae, lines

from tinyvgpt import VQVAE, VideoGPT, distributed, video
from tinyvgpt.checkpoints import Checkpoints
from tinyvgpt.data.tokens import TokenFolder
from tinyvgpt.encode import encode_folder
from tinyvgpt.train import train_gpt, train_vqvae

# Of what is random by rank nothing is left: no dropout, no hidden labels, and codes whose counts
# are too high for restarts and whose first values are given.
STEPS = replace(QUICK, batch_size=8, lr=3e-4, keep=3, tensorboard=False)
GPT_FIELDS = {"classes": 10, "dropout": 0.0, "attn_dropout": 0.0, "label_dropout": 0.0}
SCENARIOS = (
    "vqvae", "gpt", "accumulated", "encoded", "tokens", "few validated",
    "resumed vqvae", "resumed gpt",
)  # fmt: skip


def started_vqvae():
    """A tokenizer whose codes are far apart and in use: they move by a fifth a step."""
    vqvae, x = fresh_vqvae().train(), video.to_model(Clips().batch(range(40))["video"])
    with torch.no_grad():
        for _ in range(30):  # the running statistics become the clips'
            features = vqvae.features(x).movedim(1, -1).flatten(0, -2)
        codes = features[:1]
        while len(codes) < vqvae.config.codes:
            farthest = torch.cdist(features, codes).min(1).values.argmax()
            codes = torch.cat([codes, features[farthest, None]])
    book = vqvae.codebook
    book.decay = 0.8
    book.codes.copy_(codes)
    book.count.fill_(100.0)
    book.total.copy_(100 * codes)
    # Before a batch norm a bias does nothing. Its gradient is rounding, which AdamW would enlarge.
    vqvae.encoder.conv_last.bias.requires_grad_(False)
    return vqvae


def started(scenario, root):
    """Trains what a scenario says in the folder of its name, in however many processes there are.

    Returns:
        The model that was saved, and the module that was trained.
    """
    out, validation = root / scenario, Clips("val")
    if scenario.endswith("vqvae"):
        vqvae = started_vqvae()
        return train_vqvae(vqvae, Clips(), STEPS, out, validation=validation), vqvae
    model, config, data = fresh_gpt(**GPT_FIELDS), STEPS, Clips()
    if scenario == "accumulated":
        config = replace(config, accumulate=2)
    elif scenario == "encoded":
        config = replace(config, encode_once=20)
    elif scenario == "few validated":  # three clips, which leaves nothing for a second process
        config = replace(config, validation_clips=3)
    elif scenario == "tokens":
        data = TokenFolder(str(root.parent / "token folder"))
    return train_gpt(model, data, config, out, validation=validation), model.gpt


def all_scenarios(root):
    """What each scenario ends with in this process."""
    found = {}
    for scenario in SCENARIOS:
        best, module = started(scenario, root)
        found[scenario] = (best.state_dict(), module.state_dict())
    return found


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Folders for the runs of one process and of two, in which two runs are to be gone on with."""
    top = tmp_path_factory.mktemp("runs")
    encode_folder(fresh_gpt().vqvae, Clips(), top / "token folder" / "train", first_frames=0)
    for scenario in ("resumed vqvae", "resumed gpt"):
        out, data = top / "two" / scenario, StopsAfter(3)
        of_gpt = scenario == "resumed gpt"
        train = train_gpt if of_gpt else train_vqvae
        model = fresh_gpt(**GPT_FIELDS) if of_gpt else started_vqvae()
        with pytest.raises(Stop):
            train(model, data, STEPS, out, validation=Clips("val"))
        assert Checkpoints(out, 1).newest().name == "checkpoint-0000002.pt"
    return top / "one", top / "two"


@pytest.fixture(scope="module")
def two(roots):
    return run_processes(all_scenarios, 2, roots[1], timeout=120)


@pytest.fixture(scope="module")
def one(roots):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return all_scenarios(roots[0])
    finally:
        torch.set_num_threads(threads)


def assert_same_way(scenario, alone, together):
    """Two state dicts differ by far less than either differs from the start."""
    if scenario.endswith("vqvae"):
        start = started_vqvae().state_dict()
    else:
        model = fresh_gpt(**GPT_FIELDS)
        start = (model if "gpt.codes" in alone else model.gpt).state_dict()
    moved = 0
    for name, value in alone.items():
        way = (value.double() - start[name].double()).norm()
        assert (together[name].double() - value.double()).norm() <= 0.05 * way + 2e-4, name
        moved += bool(way > 5e-3)
    assert moved > 10, "the comparison can fail"


def another_folder_each(root):
    """Two processes whose folders differ, as on machines that share no disk."""
    train_gpt(fresh_gpt(**GPT_FIELDS), Clips(), STEPS, root / str(distributed.rank()))


def undivided(root):
    train_gpt(fresh_gpt(**GPT_FIELDS), Clips(), replace(STEPS, accumulate=3), root / "undivided")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (another_folder_each, r"processes differ in step ([4, 0]): "),
        (
            undivided,
            "batch_size 8 doesn't divide among 2 processes × 3 accumulated parts = 6; 6 or",
        ),
    ],
)
def test_refused_by_all_in_one_line(roots, two, tmp_path, function, says):
    if function is another_folder_each:
        (tmp_path / "0").mkdir()
        saved = "checkpoint-0000004.pt"
        (tmp_path / "0" / saved).write_bytes((roots[1] / "gpt" / saved).read_bytes())
    for good, text in start_processes(function, 2, tmp_path).values():
        assert not good
        assert text.splitlines()[-1].startswith(f"ValueError: {says}")


def step_lines(folder):
    """Lines of the log without speed, which differs."""
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in lines(folder)]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_both_processes_have_the_same_bits(two, scenario):
    for first, second in zip(two[0][scenario], two[1][scenario], strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_learn_what_one_does(one, two, scenario):
    """Averaged and last weights, running statistics, codes, counts and sums of their vectors.

    AdamW divides gradients by their size, so rounding shows where they are almost 0; over a tensor
    as a whole it is far less than what was learnt.
    """
    for alone, together in zip(one[scenario], two[0][scenario], strict=True):
        assert_same_way(scenario, alone, together)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_log_is_written_once_and_tells_of_all_clips(roots, one, two, scenario):
    """Of training and validation: six clips, which two processes share as 4 and 2."""
    alone, together = (step_lines(root / scenario) for root in roots)
    assert [line["step"] for line in together] == [2, 3, 4, 6, 6]
    for first, second in zip(alone, together, strict=True):
        assert second == pytest.approx(first, rel=1e-2, abs=1e-5)
    if scenario == "vqvae":
        training = [line for line in together if "perplexity" in line]
        assert all(line["perplexity"] > 2 for line in training)


def test_accumulating_changes_nothing(roots, two):
    """Nor the gradient's norm, which AdamW and clipping would hide."""
    for whole, parts in zip(
        *(step_lines(roots[1] / s) for s in ("gpt", "accumulated")), strict=True
    ):
        assert parts == pytest.approx(whole, rel=1e-4)
    for whole, parts in zip(two[0]["gpt"], two[0]["accumulated"], strict=True):
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_rank_0_alone_writes(roots, two, scenario):
    """No file is there twice, no temporary one is left; what is saved is what both return."""
    out = roots[1] / scenario
    names = {f"checkpoint-{step:07d}.pt" for step in (2, 4, 6)}
    kind = VQVAE if scenario.endswith("vqvae") else VideoGPT
    model = {"config.json", "vqvae.safetensors"} | (
        {"gpt.safetensors"} if kind is VideoGPT else set()
    )
    assert {path.name for path in out.iterdir()} == {*names, *model, "log.jsonl"}
    saved = kind.from_pretrained(out).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in two[1][scenario][0].items())


@pytest.mark.parametrize("scenario", ["vqvae", "gpt", "accumulated"])
def test_one_process_goes_on_with_the_run_of_two(roots, one, two, tmp_path, scenario):
    out = tmp_path / scenario
    out.mkdir()
    found = roots[1] / scenario
    for name in ("checkpoint-0000004.pt", "log.jsonl"):
        (out / name).write_bytes((found / name).read_bytes())
    best, _ = started(scenario, tmp_path)
    assert_same_way(scenario, one[scenario][0], best.state_dict())
    assert step_lines(out)[:3] == step_lines(found)[:3]
    assert [line["step"] for line in step_lines(out)] == [2, 3, 4, 6, 6]
