"""TFRecord files and tf.train.Example messages without TensorFlow.

A TFRecord file is records one after another, little-endian, with no header and no index:

    uint64 length · uint32 masked CRC-32C of it · the data · uint32 masked CRC-32C of the data

where mask(c) = ((c >> 15) | (c << 17)) + 0xa282ead8 modulo 2³². Format:
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details. Every byte is
under one of the two checksums, so damage is found and never read as data. In BAIR's files each
record is a tf.train.Example: a map from names to lists of bytes, floats or integers, as in
tensorflow/core/example/example.proto, whose messages are declared here when the module loads.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from recipe import replacing

HEADER = struct.Struct("<QI")  # length of the data, masked checksum of that length
FOOTER = struct.Struct("<I")  # masked checksum of the data
LARGEST_RECORD = 1 << 28  # bytes; BAIR's take 0.74 MB. A length beyond it is not believed


class DamagedRecord(ValueError):
    """A TFRecord file is not what was written; the message names the file and the byte offset."""


def masked_crc(data: bytes) -> int:
    """CRC-32C of `data`, rotated and shifted as TFRecord files store it."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """Writes a TFRecord file under a temporary name beside `path`, then renames it.

    Raises:
        OSError: if writing fails; a file that was at `path` stays as it was.
    """
    with replacing(path) as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(HEADER.pack(len(record), masked_crc(length)))
            file.write(record)
            file.write(FOOTER.pack(masked_crc(record)))


def read_records(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Yields the records of a TFRecord file, each once both of its checksums are verified.

    Args:
        file: opened for reading bytes, buffered, at the start of a record. Reading goes on to its
            end; one record is in memory at a time.
        name: what errors call the file.

    Yields:
        byte offset of the record in the file, and its data.

    Raises:
        DamagedRecord: a checksum is wrong, or the file ends inside a record. The records before
            it have been yielded.
    """
    offset = file.tell()
    while (length := read_length(file, name, offset)) is not None:
        body = file.read(length + FOOTER.size)
        if len(body) < length + FOOTER.size:
            _cut(name, offset, len(body), length + FOOTER.size)
        data = body[:length]
        if FOOTER.unpack_from(body, length)[0] != masked_crc(data):
            raise DamagedRecord(
                f"{name} is damaged: the checksum of the data ({length} bytes) of the record "
                f"at byte {offset} is wrong"
            )
        yield offset, data
        offset += HEADER.size + len(body)


def scan_records(file: BinaryIO, name: str) -> Iterator[tuple[int, int, int]]:
    """Yields where records are without reading their data: from length to length.

    Args:
        file: opened for reading bytes, at the start of a record.
        name: what errors call the file.

    Yields:
        byte offset of the record in the file, how many bytes of data it has, and the masked
        checksum that stands there for them.

    Raises:
        DamagedRecord: a length's checksum is wrong, or the file ends inside a record.
    """
    offset = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(offset)
    while (length := read_length(file, name, offset)) is not None:
        end = offset + HEADER.size + length + FOOTER.size
        if end > size:
            _cut(name, offset, size - offset - HEADER.size, length + FOOTER.size)
        file.seek(end - FOOTER.size)
        yield offset, length, *FOOTER.unpack(file.read(FOOTER.size))
        offset = file.seek(end)


def read_length(file: BinaryIO, name: str, offset: int) -> int | None:
    """Bytes of data in the record that starts here; None at the file's end.

    Args:
        file: as `read_records` takes it; stands at the record's data afterwards.
        name: what errors call the file.
        offset: where the record starts, for errors.

    Raises:
        DamagedRecord: the header is cut, its checksum wrong or its length beyond LARGEST_RECORD.
    """
    header = file.read(HEADER.size)
    if not header:
        return None
    if len(header) < HEADER.size:
        _cut(name, offset, len(header), HEADER.size)
    length, checksum = HEADER.unpack(header)
    if checksum != masked_crc(header[:8]):
        raise DamagedRecord(
            f"{name} is damaged, or not a TFRecord file: the checksum of the length of the "
            f"record at byte {offset} is wrong"
        )
    if length > LARGEST_RECORD:
        raise DamagedRecord(
            f"{name}: the record at byte {offset} claims {length} bytes, "
            f"more than {LARGEST_RECORD} are not read"
        )
    return length


def _cut(name: str, offset: int, there: int, expected: int) -> NoReturn:
    raise DamagedRecord(
        f"{name} ends inside the record at byte {offset}: "
        f"{there} of the next {expected} bytes are there"
    )


def encode_example(features: Mapping[str, bytes | Sequence[float] | np.ndarray]) -> bytes:
    """Serialises a tf.train.Example; the same features always give the same bytes.

    Args:
        features: by name, either bytes (stored as a bytes_list of one) or numbers in one
            dimension (stored as a float_list, so in float32).

    Raises:
        ValueError: numbers are not in one dimension.
    """
    example = Example()
    for name, value in features.items():
        feature = example.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
            continue
        numbers = np.asarray(value, dtype=np.float32)
        if numbers.ndim != 1:
            raise ValueError(f"feature {name!r} has shape {numbers.shape}, one axis is expected")
        feature.float_list.value.extend(numbers.tolist())
    return example.SerializeToString(deterministic=True)


def decode_example(
    payload: bytes, endings: tuple[str, ...] | None = None
) -> dict[str, bytes | np.ndarray]:
    """Reads a tf.train.Example, its lists packed or not.

    Args:
        payload: the serialised message.
        endings: if given, only features whose name ends in one of these are decoded.

    Returns:
        by name bytes for a bytes_list of one, float32 (n,) for a float_list of n, int64 (n,) for
        an int64_list of n.

    Raises:
        ValueError: the payload is no tf.train.Example, or a feature is empty or a list of several
            byte strings.
    """
    example = Example()
    try:
        example.ParseFromString(payload)
    except DecodeError:
        raise ValueError(f"{len(payload)} bytes are not a tf.train.Example") from None
    return {
        name: _decode_feature(name, feature)
        for name, feature in example.features.feature.items()
        if endings is None or name.endswith(endings)
    }


def _decode_feature(name, feature) -> bytes | np.ndarray:
    kind = feature.WhichOneof("kind")
    if kind is None:
        raise ValueError(f"feature {name!r} holds nothing")
    values = getattr(feature, kind).value
    if kind == "float_list":
        return np.fromiter(values, np.float32, len(values))
    if kind == "int64_list":
        return np.fromiter(values, np.int64, len(values))
    if len(values) != 1:
        raise ValueError(f"feature {name!r} is a list of {len(values)} byte strings, not of one")
    return values[0]


def _example_class():
    """Declares example.proto's messages; returns the class of tf.train.Example."""
    file = descriptor_pb2.FileDescriptorProto(
        name="example.proto", package="tensorflow", syntax="proto3"
    )
    field = descriptor_pb2.FieldDescriptorProto

    def add(to, name, number, kind, label=field.LABEL_OPTIONAL, **more):
        kind = {"type_name": f".tensorflow.{kind}"} if isinstance(kind, str) else {"type": kind}
        return to.field.add(name=name, number=number, label=label, **kind, **more)

    lists = {"Bytes": field.TYPE_BYTES, "Float": field.TYPE_FLOAT, "Int64": field.TYPE_INT64}
    feature = descriptor_pb2.DescriptorProto(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(lists.items(), 1):
        add(file.message_type.add(name=f"{name}List"), "value", 1, kind, field.LABEL_REPEATED)
        add(feature, f"{name.lower()}_list", number, f"{name}List", oneof_index=0)
    file.message_type.append(feature)

    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")  # what map<string, Feature> stands for
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, "Feature")
    add(features, "feature", 1, "Features.FeatureEntry", field.LABEL_REPEATED)
    add(file.message_type.add(name="Example"), "features", 1, "Features")

    pool = descriptor_pool.DescriptorPool()  # its own, so that TensorFlow may be loaded beside it
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


Example = _example_class()
