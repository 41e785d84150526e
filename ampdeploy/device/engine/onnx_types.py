"""An ONNX file's initialisers and what it says of itself, without the onnx package.

A Jetson that builds an engine need not have onnx. Only the shell of the protobuf is walked: weights
are stepped over, not read. Numbers of fields: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ampdeploy.errors import ArtifactError

_GRAPH, _METADATA = 7, 14  # of ModelProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
_INITIALIZER = 5  # of GraphProto
_DIMS, _DATA_TYPE, _NAME = 1, 2, 8  # of TensorProto

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types

# TensorProto.DataType -> name, bytes of one element
_TYPES = {
    1: ("FLOAT", 4),
    2: ("UINT8", 1),
    3: ("INT8", 1),
    5: ("INT16", 2),
    6: ("INT32", 4),
    7: ("INT64", 8),
    9: ("BOOL", 1),
    10: ("FLOAT16", 2),
    11: ("DOUBLE", 8),
    16: ("BFLOAT16", 2),
}


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """One constant tensor of an ONNX graph."""

    name: str
    dtype: str
    """ONNX's name: ``FLOAT16``; ``type 17`` for one that has none here."""
    shape: tuple[int, ...]
    nbytes: int


def initializers(path: Path) -> list[Initializer]:
    """The initialisers of the graph, in its order; those of branches and bodies left out.

    Raises:
        ArtifactError: The file is missing, empty, or no protobuf.
    """
    with _opened(path) as data:
        return [
            _read_tensor(data, *tensor)
            for graph in _messages(data, 0, len(data), _GRAPH)
            for tensor in _messages(data, *graph, _INITIALIZER)
        ]


def metadata(path: Path) -> dict[str, str]:
    """The metadata properties of the file: an export says there how its images are prepared.

    Raises:
        ArtifactError: The file is missing, empty, or no protobuf.
    """
    found = {}
    with _opened(path) as data:
        for entry in _messages(data, 0, len(data), _METADATA):
            texts = {
                number: data[begin:stop].decode()
                for number, _, begin, stop in _fields(data, *entry)
            }
            found[texts.get(_KEY, "")] = texts.get(_VALUE, "")
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[mmap.mmap]:
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            yield data
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}.") from error
    except (IndexError, ValueError) as error:
        raise ArtifactError(
            f"{path} is not an ONNX file, or is damaged: {error}. Export it again."
        ) from error


def _messages(data: mmap.mmap, start: int, end: int, number: int) -> Iterator[tuple[int, int]]:
    """Where each submessage in field `number` begins and ends."""
    for field, wire, begin, stop in _fields(data, start, end):
        if field == number and wire == _BYTES:
            yield begin, stop


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, begin, end) of every field's content between two offsets."""
    at = start
    while at < end:
        key, at = _varint(data, at)
        wire = key & 7
        begin = at
        if wire == _VARINT:
            _, at = _varint(data, at)
        elif wire == _FIXED64:
            at += 8
        elif wire == _FIXED32:
            at += 4
        elif wire == _BYTES:
            length, begin = _varint(data, at)
            at = begin + length
        else:
            raise ValueError(f"byte {begin} has wire type {wire}")
        if at > end:
            raise ValueError(f"the field at byte {begin} ends after its message")
        yield key >> 3, wire, begin, at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _read_tensor(data: mmap.mmap, start: int, end: int) -> Initializer:
    name, number, shape = "", 0, []
    for field, wire, begin, stop in _fields(data, start, end):
        if field == _NAME:
            name = data[begin:stop].decode(errors="replace")
        elif field == _DATA_TYPE:
            number, _ = _varint(data, begin)
        elif field == _DIMS and wire == _VARINT:
            shape.append(_varint(data, begin)[0])
        elif field == _DIMS:  # packed, as proto3 writers may
            while begin < stop:
                dim, begin = _varint(data, begin)
                shape.append(dim)
    dtype, size = _TYPES.get(number, (f"type {number}", 0))
    return Initializer(name=name, dtype=dtype, shape=tuple(shape), nbytes=size * math.prod(shape))
