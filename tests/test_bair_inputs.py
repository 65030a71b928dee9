"""BAIR's recipe given what is not as BAIR's: damage, strange records, tars, paths."""

import io
import re
import shutil
import tarfile

import bair
import numpy as np
import pytest
import tfrecords
from bair_clips import (
    assert_same,
    contents,
    expected,
    features_of,
    make_clip,
    start,
    write_clips,
)

pytest_plugins = ("bair_fixtures",)


def without(key):
    return lambda features: features.pop(key)


def replaced(key, value):
    return lambda features: features.update({key: value})


BAD_RECORDS = {
    "no first image": (without("0/image_aux1/encoded"), "has no key '0/image_aux1/encoded'"),
    "no last image": (without("2/image_aux1/encoded"), "has no key '2/image_aux1/encoded'"),
    "no action": (without("1/action"), "has no key '1/action'"),
    "no position": (without("2/endeffector_pos"), "has no key '2/endeffector_pos'"),
    "a gap": (replaced("99999999/action", [0.0] * 4), "has no key '3/image_aux1/encoded'"),
    "image": (
        replaced("1/image_aux1/encoded", bytes(12_287)),
        "has 12287 bytes, not 12288 bytes, under the key '1/image_aux1/encoded'",
    ),
    "image of floats": (
        replaced("1/image_aux1/encoded", [0.0] * 9),
        "has 9 float32, not 12288 bytes, under the key '1/image_aux1/encoded'",
    ),
    "three actions": (
        replaced("1/action", [0.0] * 3),
        "has 3 float32, not 4 float32, under the key '1/action'",
    ),
    "action of bytes": (
        replaced("1/action", b"four"),
        "has 4 bytes, not 4 float32, under the key '1/action'",
    ),
    "nothing": (dict.clear, "has no key '0/image_aux1/encoded'"),
}


@pytest.mark.parametrize("fault", BAD_RECORDS)
def test_bad_records_are_named(fault, tmp_path):
    damage, words = BAD_RECORDS[fault]
    generator = np.random.default_rng(10)
    features = [features_of(make_clip(3, generator)) for _ in range(3)]
    damage(features[1])
    path = tmp_path / "train" / "a.tfrecords"
    path.parent.mkdir()
    tfrecords.write_records(path, map(tfrecords.encode_example, features))
    with path.open("rb") as file:
        offset = [offset for offset, _, _ in tfrecords.scan_records(file, "a")][1]
    with pytest.raises(ValueError, match=re.escape(f"{path}, the record at byte {offset} {words}")):
        bair.convert([tmp_path], tmp_path / "bair.h5", "image_aux1")
    assert not (tmp_path / "bair.h5").exists()


def test_no_example(tmp_path):
    path = tmp_path / "train" / "a.tfrecords"
    path.parent.mkdir()
    tfrecords.write_records(path, [b"\xff\xff\xff"])
    with pytest.raises(ValueError, match=r"at byte 0: 3 bytes are not a tf\.train\.Example"):
        bair.convert([path], tmp_path / "bair.h5", "image_aux1")


def test_other_keys_are_ignored(tmp_path):
    clip = make_clip(2, np.random.default_rng(11))
    features = features_of(clip) | {"label": b"", "5/image_main/encoded": b"x", "x/action": [1.0]}
    path = tmp_path / "train" / "a.tfrecords"
    path.parent.mkdir()
    tfrecords.write_records(path, [tfrecords.encode_example(features)])
    bair.convert([path], tmp_path / "bair.h5", "image_aux1")
    assert_same(contents(tmp_path / "bair.h5"), expected({"train": [clip]}, "image_aux1"))


def test_records_as_long_with_fewer_frames(tmp_path):
    """Frames are counted once a length; a record that is an exception must not pass."""
    generator = np.random.default_rng(12)
    long, short = (features_of(make_clip(frames, generator)) for frames in (2, 1))
    missing = len(tfrecords.encode_example(long)) - len(
        tfrecords.encode_example(short | {"x": b""})
    )
    short["x"] = bytes(missing)
    while len(tfrecords.encode_example(short)) > len(tfrecords.encode_example(long)):
        short["x"] = short["x"][1:]
    path = tmp_path / "train" / "a.tfrecords"
    path.parent.mkdir()
    tfrecords.write_records(path, map(tfrecords.encode_example, [long, short]))
    with pytest.raises(ValueError, match=r"has 1 frames, others of \d+ bytes in that file have 2"):
        bair.convert([path], tmp_path / "bair.h5", "image_aux1")


def test_damage_is_named_and_never_converted(made, tmp_path):
    """One byte at random offsets of files in a folder: an error that names file and record."""
    folder, _ = made
    copy = tmp_path / "train" / "traj.tfrecords"
    shutil.copytree(folder / "softmotion30_44k" / "train", copy.parent)
    (copy.parent / "traj_4_to_6.tfrecords").rename(copy)
    content = copy.read_bytes()
    with copy.open("rb") as file:
        offsets = [offset for offset, _, _ in tfrecords.scan_records(file, "traj")]
    generator = np.random.default_rng(13)
    for place in generator.integers(len(content), size=20):
        damaged = bytearray(content)
        damaged[place] ^= generator.integers(1, 256)
        copy.write_bytes(damaged)
        offset = offsets[np.searchsorted(offsets, place, side="right") - 1]
        words = rf"traj\.tfrecords is damaged.* of the record at byte {offset} is wrong"
        with pytest.raises(tfrecords.DamagedRecord, match=words):
            bair.convert([tmp_path], tmp_path / "bair.h5", "image_aux1")
    assert not (tmp_path / "bair.h5").exists()


def member(name, **more):
    about = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(about, key, value)
    return about


BAD_MEMBERS = {
    "leads out": member("train/../../a.tfrecords"),
    "absolute": member("/train/a.tfrecords"),
    "link": member("train/a.tfrecords", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member("train/a.tfrecords", type=tarfile.LNKTYPE, linkname="b"),
    "device": member("train/a.tfrecords", type=tarfile.CHRTYPE),
}


@pytest.mark.parametrize("fault", BAD_MEMBERS)
def test_tars_that_are_refused(fault, tar, tmp_path):
    with tarfile.open(tar, "a") as file:
        file.addfile(BAD_MEMBERS[fault], io.BytesIO())
    with pytest.raises(ValueError, match=r"made\.tar is refused"):
        bair.convert([tar], tmp_path / "bair.h5", "image_aux1")
    assert not (tmp_path / "bair.h5").exists()


def test_tars_that_are_not_whole(tar, tmp_path):
    content = tar.read_bytes()
    with tarfile.open(tar) as file:
        members = file.getmembers()
    for cut in (members[-1].offset, members[-1].offset + 700, 1_000, 100):
        tar.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"made\.tar is no TFRecord file .* uncompressed tar"):
            bair.convert([tar], tmp_path / "bair.h5", "image_aux1")
    for about in members[1:]:  # to tarfile a damaged header is the end: what follows would be lost
        damaged = bytearray(content)
        damaged[about.offset + 3] ^= 1
        tar.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"made\.tar .* at byte {about.offset} is neither"):
            bair.convert([tar], tmp_path / "bair.h5", "image_aux1")
    tar.write_bytes(content)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as packed:
        packed.add(tar, "train/a.tfrecords")
    with pytest.raises(ValueError, match=r"packed\.tar is no TFRecord file"):
        bair.convert([tmp_path / "packed.tar"], tmp_path / "bair.h5", "image_aux1")


def test_paths_without_clips(made, tmp_path):
    (tmp_path / "empty").mkdir()
    elsewhere = tmp_path / "elsewhere" / "a.tfrecords"
    write_clips(elsewhere, [])
    out = tmp_path / "bair.h5"
    for paths, words in (
        ([tmp_path / "empty"], r"no TFRecord file \(\*\.tfrecords\) in .*empty"),
        ([elsewhere], r"a\.tfrecords is in no folder named train or test"),
        (
            [made[0], made[0] / "softmotion30_44k" / "test"],
            r"traj_0_to_0\.tfrecords is there twice",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            bair.convert(paths, out, "image_aux1")
    with pytest.raises(FileNotFoundError):
        bair.convert([tmp_path / "nowhere"], out, "image_aux1")
    write_clips(tmp_path / "train" / "empty.tfrecords", [])
    with pytest.raises(ValueError, match=r"no clips in .*train"):
        bair.convert([tmp_path / "train"], out, "image_aux1")


def test_mistakes_are_one_line(made, tmp_path):
    (tmp_path / "file").write_text("in the way")
    process = start("--files", made[0], "--out", tmp_path / "file" / "bair.h5")
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output == ""
    assert re.fullmatch(r"bair\.py: .*file.*", errors.splitlines()[-1])
    assert "Traceback" not in errors
    process = start("--files", tmp_path / "nowhere", "--out", tmp_path / "bair.h5")
    assert "nowhere" in process.communicate()[1]
    assert process.returncode == 2
