"""Encoding once: shards hold what the tokenizer says, whatever happens on the way there."""

import json
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import QUICK, Clips, fresh_gpt, fresh_vqvae

from tinyvgpt import encode, open_dataset, video
from tinyvgpt.data import TokenFolder, batches
from tinyvgpt.encode import encode_folder
from tinyvgpt.train import train_gpt, train_vqvae

CHILD = "import test_encode; test_encode.encode_slowly({out!r})"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    make_small(monkeypatch.setattr)


def make_small(set_attribute):
    """Four clips at a time, two batches a shard."""
    set_attribute(encode, "ENCODED_AT_A_TIME", 4)
    set_attribute(encode, "SHARD_BATCHES", 2)


def expected_tokens(vqvae, data):
    with torch.no_grad():
        clips = data.batch(range(len(data)))["video"]
        return vqvae.eval().encode(video.to_model(clips))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_hold_tokens_labels_actions_and_first_frames(tmp_path, workers):
    vqvae, data = fresh_gpt().vqvae, Clips(size=21, actions=3)
    count = encode_folder(vqvae, data, tmp_path / "train", first_frames=2, workers=workers)
    tokens = open_dataset(tmp_path)
    assert isinstance(tokens, TokenFolder)
    assert count == len(tokens) == 21
    assert (tokens.channels, tokens.frames, tokens.resolution) == (1, 4, 32)
    assert tokens.label_names == data.label_names
    order = np.random.default_rng(0).permutation(21)
    batch, clips = tokens.batch(order), data.batch(order)
    assert batch["tokens"].dtype == torch.int64
    assert torch.equal(batch["tokens"], expected_tokens(vqvae, data)[torch.as_tensor(order)])
    assert torch.equal(batch["video"], clips["video"][:, :2])
    assert torch.equal(batch["label"], clips["label"])
    assert torch.equal(batch["action"], clips["action"])
    sizes = [len(np.load(path)) for path in sorted((tmp_path / "train").glob("tokens-*.npy"))]
    assert sizes == [8, 8, 5]
    assert np.load(tmp_path / "train" / "tokens-00000.npy").dtype == np.uint16


def test_a_worker_maps_the_files_again(tmp_path):
    encode_folder(fresh_vqvae(), Clips(size=16), tmp_path / "train")
    tokens = TokenFolder(str(tmp_path))
    tokens.batch(range(16))
    assert len(pickle.dumps(tokens)) < 3000  # what index.json says, no array
    alone, shared = (batches(tokens, 8, workers=workers) for workers in (0, 1))
    for _ in range(3):
        assert torch.equal(next(alone)["tokens"], next(shared)["tokens"])
    shared.close()


def encode_slowly(out):
    """As a command would, with time for a kill."""
    torch.set_num_threads(1)
    make_small(setattr)
    whole = encode.encode
    encode.encode = lambda *args: time.sleep(0.02) or whole(*args)
    encode_folder(fresh_gpt().vqvae, Clips(size=88), Path(out) / "train")


def test_killed_at_ten_moments_it_ends_with_the_same_arrays(tmp_path):
    vqvae, data = fresh_gpt().vqvae, Clips(size=88)
    encode_folder(vqvae, data, tmp_path / "whole")
    folder = tmp_path / "killed" / "train"
    rng = np.random.default_rng(1)
    encode_folder(vqvae, Clips(size=8), tmp_path / "warm")  # imports and shapes work
    for _ in range(10):
        command = CHILD.format(out=str(tmp_path / "killed"))
        child = subprocess.Popen([sys.executable, "-c", command], cwd=Path(__file__).parent)
        deadline = time.monotonic() + 60
        before = len(list(folder.glob("tokens-*")))
        while child.poll() is None and len(list(folder.glob("tokens-*"))) == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        if (folder / "index.json").exists():
            break
    encode_folder(vqvae, data, folder)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_finished_shards_are_not_encoded_again(tmp_path, monkeypatch):
    vqvae, folder = fresh_vqvae(), tmp_path / "train"
    calls = []
    whole = encode.encode
    monkeypatch.setattr(encode, "encode", lambda *args: calls.append(1) or whole(*args))

    class Full(Exception):
        pass

    def fail(*_):
        raise Full

    monkeypatch.setattr(encode, "_write_json", fail)  # stops before index.json
    with pytest.raises(Full):
        encode_folder(vqvae, Clips(size=20), folder)
    monkeypatch.undo()
    make_small(monkeypatch.setattr)
    monkeypatch.setattr(encode, "encode", lambda *args: calls.append(1) or whole(*args))
    calls.clear()
    encode_folder(vqvae, Clips(size=20), folder)
    assert len(calls) == 5  # nothing was there yet
    (folder / "index.json").rename(folder / encode.JOB)
    (folder / "tokens-00002.npy").write_bytes(b"")
    calls.clear()
    encode_folder(vqvae, Clips(size=20), folder)
    assert len(calls) == 1
    calls.clear()
    encode_folder(vqvae, Clips(size=20), folder)
    assert not calls


def test_a_shard_s_tokens_are_renamed_last(tmp_path, monkeypatch):
    """A shard that has them is taken for whole, wherever a kill came."""
    orders, write = [], encode.write_atomically
    monkeypatch.setattr(
        encode, "write_atomically", lambda files: orders.append([*files]) or write(files)
    )
    encode_folder(fresh_vqvae(), Clips(size=8, actions=2), tmp_path / "train")
    (shard,) = (order for order in orders if len(order) > 1)
    assert len(shard) == 4
    assert shard[-1].name == "tokens-00000.npy"


def test_another_job_is_not_mixed_in(tmp_path):
    vqvae = fresh_vqvae()
    encode_folder(vqvae, Clips(size=20), tmp_path / "train", source="digits")
    with pytest.raises(ValueError, match="holds other tokens: clips was 20, is 12"):
        encode_folder(vqvae, Clips(size=12), tmp_path / "train", source="digits")
    with pytest.raises(ValueError, match="source was digits, is letters"):
        encode_folder(vqvae, Clips(size=20), tmp_path / "train", source="letters")
    other = Clips("val", size=20)
    with pytest.raises(ValueError, match=r"holds other tokens: looks was .*, is "):
        encode_folder(vqvae, other, tmp_path / "train", source="digits")
    with torch.no_grad():
        vqvae.codebook.codes.add_(1)
    with pytest.raises(ValueError, match=r"codebook was .*, is "):
        encode_folder(vqvae, Clips(size=20), tmp_path / "train", source="digits")
    (tmp_path / "train" / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"is damaged; remove .*train to start again"):
        encode_folder(vqvae, Clips(size=20), tmp_path / "train")


def test_clips_must_fit_the_tokenizer(tmp_path):
    data = Clips()
    data.frames = 8
    with pytest.raises(ValueError, match="the data has frames 8, the model needs 4"):
        encode_folder(fresh_vqvae(), data, tmp_path / "train")
    assert not (tmp_path / "train").exists()


def test_a_gpt_learns_the_same_from_shards_as_from_clips(tmp_path):
    config = QUICK
    model = fresh_gpt(classes=10, label_dropout=0.3)
    encode_folder(model.vqvae, Clips(), tmp_path / "tokens" / "train")
    encode_folder(model.vqvae, Clips("val"), tmp_path / "tokens" / "val")
    results = []
    for name, data, validation in (
        ("clips", Clips(), Clips("val")),
        ("shards", *(open_dataset(tmp_path / "tokens", split) for split in ("train", "val"))),
    ):
        fresh = fresh_gpt(classes=10, label_dropout=0.3)
        train_gpt(fresh, data, config, tmp_path / name, validation=validation)
        results.append((tmp_path / name / "gpt.safetensors").read_bytes())
    assert results[0] == results[1]


def test_tokens_of_another_tokenizer_and_too_few_frames_are_refused(tmp_path):
    model = fresh_gpt()
    encode_folder(model.vqvae, Clips(), tmp_path / "train")
    tokens = open_dataset(tmp_path, frames=4)
    with pytest.raises(
        ValueError, match=r"has the first 1 frames of each clip, .* conditioned on 2"
    ):
        train_gpt(fresh_gpt(cond_frames=2), tokens, QUICK, tmp_path / "out")
    with torch.no_grad():
        model.vqvae.codebook.codes.add_(1)
    with pytest.raises(ValueError, match="was encoded by another tokenizer"):
        train_gpt(model, tokens, QUICK, tmp_path / "out")
    with pytest.raises(ValueError, match="a tokenizer is trained on clips"):
        train_vqvae(fresh_vqvae(), tokens, QUICK, tmp_path / "out")


def test_bad_folders(tmp_path):
    encode_folder(fresh_vqvae(), Clips(size=20), tmp_path / "train")
    for split, options, message in (
        ("val", {}, "has no tokens of split 'val'; it has train"),
        ("train", {"frames": 8}, "holds tokens of clips with frames 4, not 8"),
        ("train", {"fps": 8}, "holds tokens, which have no option 'fps'"),
        ("training", {}, "split is 'training'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset(tmp_path, split, **options)
    with pytest.raises(IndexError, match="no clip 20, there are 20"):
        open_dataset(tmp_path).batch([20])
    (tmp_path / "train" / "label-00001.npy").unlink()
    with pytest.raises(ValueError, match=r"incomplete: label-00001\.npy is missing"):
        open_dataset(tmp_path)
    index = tmp_path / "train" / "index.json"
    index.write_text(json.dumps({"version": 7}))
    with pytest.raises(ValueError, match="is of version 7, this package reads 1"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("lost", ["label-00001.npy", "tokens-00000.npy", "video-00002.npy"])
def test_what_was_lost_later_is_encoded_again(tmp_path, lost):
    vqvae, data, folder = fresh_vqvae(), Clips(size=21), tmp_path / "train"
    encode_folder(vqvae, data, folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / lost).unlink()
    assert encode_folder(vqvae, data, folder) == 21
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_an_encoding_that_was_stopped_is_no_dataset(tmp_path):
    folder = tmp_path / "train"
    encode_folder(fresh_vqvae(), Clips(size=21), folder)
    (folder / "index.json").rename(folder / ".encoding.json")
    with pytest.raises(ValueError, match=r"train is not encoded to its end; run the same"):
        open_dataset(tmp_path)


def test_tokens_are_not_encoded_twice(tmp_path):
    model = fresh_gpt()
    encode_folder(model.vqvae, Clips(), tmp_path / "train", first_frames=0)
    tokens = open_dataset(tmp_path)
    with pytest.raises(ValueError, match="are tokens already"):
        encode_folder(model.vqvae, tokens, tmp_path / "again")
    results = []
    for clips in (0, 100):  # as presets say that train on clips
        config = replace(QUICK, encode_once=clips)
        train_gpt(fresh_gpt(), tokens, config, tmp_path / str(clips))
        results.append((tmp_path / str(clips) / "gpt.safetensors").read_bytes())
    assert results[0] == results[1]


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vqvae, data = fresh_gpt().vqvae, Clips(size=21)
    encode_folder(vqvae, data, tmp_path / "gpu" / "train", device="cuda")
    expected = expected_tokens(vqvae.cpu(), data)
    found = open_dataset(tmp_path / "gpu").batch(range(21), "cuda")["tokens"]
    assert found.is_cuda
    with torch.no_grad():  # where two codes are as near, rounding may choose either
        z = vqvae.features(video.to_model(data.batch(range(21))["video"])).movedim(1, -1)
        nearest = torch.cdist(z.flatten(0, -2), vqvae.codebook.codes).sort(1).values
    clear = (nearest[:, 1] - nearest[:, 0] > 1e-3).view(expected.shape)
    assert clear.float().mean() > 0.3
    assert torch.equal(found.cpu()[clear], expected[clear])
