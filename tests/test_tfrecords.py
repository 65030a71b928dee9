"""TFRecord files: bytes by hand, round trips, and damage that must never be read as data."""

import io
import struct
import tracemalloc

import numpy as np
import pytest
import tfrecords
from hypothesis import given, settings
from hypothesis import strategies as st
from tfrecords import DamagedRecord

PAYLOADS = [b"first", b"", bytes(range(256)) * 40, b"last"]


def crc32c(data):
    """CRC-32C bit by bit: reflected, polynomial 0x1edc6f41."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def by_hand(data, length=None):
    """A record's bytes; with another length than the data's, that length's checksum is right."""
    header = struct.pack("<Q", len(data) if length is None else length)
    return header + masked(header) + data + masked(data)


def read(content, name="some.tfrecords"):
    return list(tfrecords.read_records(io.BytesIO(content), name))


def read_until_damage(content):
    """The records before the damage, and the error if there is one."""
    records = []
    try:
        for _, data in tfrecords.read_records(io.BytesIO(content), "some.tfrecords"):
            records.append(data)
    except DamagedRecord as error:
        return records, error
    return records, None


def test_known_checksums():
    """Of RFC 3720, B.4; and the first bytes of every TensorBoard event file."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert tfrecords.masked_crc(struct.pack("<Q", 24)) == 0x224B7FA3


@given(st.binary(max_size=40))
def test_checksums(data):
    assert struct.pack("<I", tfrecords.masked_crc(data)) == masked(data)


def test_files_have_the_bytes_of_the_format(tmp_path):
    path = tmp_path / "some.tfrecords"
    tfrecords.write_records(path, PAYLOADS)
    assert path.read_bytes() == b"".join(map(by_hand, PAYLOADS))
    assert [file.name for file in tmp_path.iterdir()] == ["some.tfrecords"]


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_what_is_written_is_read(tmp_path_factory, payloads):
    path = tmp_path_factory.mktemp("records") / "some.tfrecords"
    tfrecords.write_records(path, iter(payloads))
    with path.open("rb") as file:
        records = list(tfrecords.read_records(file, path.name))
        file.seek(0)
        scanned = list(tfrecords.scan_records(file, path.name))
    assert [data for _, data in records] == payloads
    assert scanned == [(offset, len(data), tfrecords.masked_crc(data)) for offset, data in records]
    content = path.read_bytes()
    assert all(content[offset + 12 :].startswith(data) for offset, data in records)


def test_reading_begins_where_the_file_stands():
    content = b"".join(map(by_hand, PAYLOADS))
    (second, _), *_ = read(content)[1:]
    file = io.BytesIO(content)
    file.seek(second)
    assert list(tfrecords.read_records(file, "some")) == read(content)[1:]


def test_a_damaged_byte_is_never_read():
    """At 200 random offsets, and everywhere in the small records."""
    content = b"".join(map(by_hand, PAYLOADS))
    offsets = [offset for offset, _ in read(content)]
    generator = np.random.default_rng(3)
    places = [*generator.integers(len(content), size=200), *range(60), *range(-30, 0)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= generator.integers(1, 256)
        records, error = read_until_damage(bytes(damaged))
        at = np.searchsorted(offsets, place % len(content), side="right") - 1
        assert records == PAYLOADS[:at]
        assert "some.tfrecords" in str(error)
        assert f"record at byte {offsets[at]} is wrong" in str(error)


def test_a_truncated_file_gives_its_whole_records():
    content = b"".join(map(by_hand, PAYLOADS))
    ends = [len(by_hand(data)) for data in PAYLOADS]
    ends = [0, *np.cumsum(ends)]
    cuts = [*np.random.default_rng(4).integers(len(content), size=100), *range(60), *ends]
    for cut in cuts:
        whole = np.searchsorted(ends, cut, side="right") - 1
        records, error = read_until_damage(content[:cut])
        assert records == PAYLOADS[:whole]
        if cut in ends:
            assert error is None
        else:
            assert f"some.tfrecords ends inside the record at byte {ends[whole]}:" in str(error)
            with pytest.raises(DamagedRecord, match=f"record at byte {ends[whole]}:"):
                list(tfrecords.scan_records(io.BytesIO(content[:cut]), "some.tfrecords"))


@pytest.mark.parametrize("length", [2**63, 2**40, tfrecords.LARGEST_RECORD + 1])
def test_an_absurd_length_takes_no_memory(length):
    """Even one whose own checksum is right."""
    content = by_hand(b"ok") + by_hand(b"tiny", length)
    tracemalloc.start()
    records, error = read_until_damage(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert records == [b"ok"]
    assert f"record at byte 18 claims {length} bytes" in str(error)
    assert peak < 1_000_000


def test_no_tfrecord_file():
    with pytest.raises(DamagedRecord, match=r"page\.html is damaged, or not a TFRecord file"):
        read(b"<html><body>404</body></html>", "page.html")


def test_failing_to_write_changes_nothing(tmp_path, file_limit):
    path = tmp_path / "some.tfrecords"
    path.write_bytes(b"before")
    with file_limit(10_000), pytest.raises(OSError, match="too large"):
        tfrecords.write_records(path, [bytes(20_000)])

    def broken():
        yield b"one"
        raise RuntimeError("the simulator fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        tfrecords.write_records(path, broken())
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["some.tfrecords"]


def message(*fields):
    """Protocol buffer wire format: fields of (number, bytes), all of the length-delimited kind."""
    return b"".join(bytes([number << 3 | 2, len(value)]) + value for number, value in fields)


def example(name, feature):
    return message((1, message((1, message((1, name), (2, feature))))))


ONE, TWO_AND_A_HALF = b"\x00\x00\x80?", b"\x00\x00 @"
BY_HAND = {
    "bytes": (example(b"a", message((1, message((1, b"xyz"))))), b"xyz"),
    "packed floats": (
        example(b"a", message((2, message((1, ONE + TWO_AND_A_HALF))))),
        np.array([1, 2.5], np.float32),
    ),
    "unpacked floats": (
        example(b"a", message((2, b"\x0d" + ONE + b"\x0d" + TWO_AND_A_HALF))),
        np.array([1, 2.5], np.float32),
    ),
    "no floats": (example(b"a", message((2, b""))), np.array([], np.float32)),
    "packed integers": (
        example(b"a", message((3, message((1, b"\x05\xac\x02"))))),
        np.array([5, 300]),
    ),
    "unpacked integers": (example(b"a", message((3, b"\x08\x05\x08\xac\x02"))), np.array([5, 300])),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_examples_by_hand(kind):
    payload, value = BY_HAND[kind]
    decoded = tfrecords.decode_example(payload)
    assert list(decoded) == ["a"]
    assert type(decoded["a"]) is type(value)
    if isinstance(value, np.ndarray):
        assert decoded["a"].dtype == value.dtype
        np.testing.assert_array_equal(decoded["a"], value)
    else:
        assert decoded["a"] == value
    if not kind.startswith("unpacked") and "integers" not in kind:
        assert tfrecords.encode_example({"a": value}) == payload


FLOATS = st.lists(st.floats(width=32), max_size=5)


@given(st.dictionaries(st.text(max_size=8), st.binary(max_size=20) | FLOATS, max_size=5))
def test_examples_round_trip(features):
    payload = tfrecords.encode_example(features)
    decoded = tfrecords.decode_example(payload)
    assert decoded.keys() == features.keys()
    for name, value in features.items():
        if isinstance(value, bytes):
            assert decoded[name] == value
        else:
            assert decoded[name].dtype == np.float32
            np.testing.assert_array_equal(decoded[name], np.array(value, np.float32))
    backwards = dict(reversed(features.items()))
    assert tfrecords.encode_example(backwards) == payload


def test_only_the_endings_that_are_asked_for():
    payload = tfrecords.encode_example({"0/action": [1.0], "0/image": b"x", "1/action": [2.0]})
    assert tfrecords.decode_example(payload, ("/action",)).keys() == {"0/action", "1/action"}


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_whatever_the_bytes_are(payload):
    """Decoding gives a dict or one clear error."""
    try:
        outcome = tfrecords.decode_example(payload)
    except ValueError as error:
        outcome = str(error)
    assert isinstance(outcome, dict) or "tf.train.Example" in outcome or "feature" in outcome


BAD_FEATURES = {
    "two byte strings": (message((1, message((1, b"x"), (1, b"y")))), "a list of 2 byte strings"),
    "no byte string": (message((1, b"")), "a list of 0 byte strings"),
    "nothing": (b"", "feature 'a' holds nothing"),
}


@pytest.mark.parametrize("fault", BAD_FEATURES)
def test_bad_features(fault):
    feature, words = BAD_FEATURES[fault]
    with pytest.raises(ValueError, match=words):
        tfrecords.decode_example(example(b"a", feature))


def test_no_example():
    with pytest.raises(ValueError, match=r"5 bytes are not a tf\.train\.Example"):
        tfrecords.decode_example(b"\xff\xff\xff\xff\xff")


def test_numbers_have_one_axis():
    with pytest.raises(ValueError, match=r"feature 'a' has shape \(2, 2\), one axis is expected"):
        tfrecords.encode_example({"a": np.zeros((2, 2))})
