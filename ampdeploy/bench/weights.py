"""Bytes of the weights in an artifact, without loading it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from ampdeploy.device.engine.manifest import read_manifest
from ampdeploy.device.engine.onnx_types import initializers
from ampdeploy.errors import ArtifactError
from ampdeploy.export.names import data_path
from ampdeploy.targets.base import ENGINE_SUFFIXES

_HEADER_LENGTH = struct.Struct("<Q")  # of a safetensors file, before its JSON header
_LONGEST_HEADER = 100_000_000  # what the format allows


def weight_bytes(artifact: Path) -> int | str:
    """Bytes of the tensors in a file, as they are stored, or why they are not known.

    Of an ONNX file the initialisers, wherever their data lies; of an engine the constants of the
    network that it was built from, by its manifest, since a plan does not say.

    Raises:
        ArtifactError: The file is damaged, or of another kind.
    """
    if artifact.suffix == ".onnx":
        return _of_onnx(artifact)
    if artifact.suffix == ".safetensors":
        return _of_safetensors(artifact)
    if artifact.suffix in ENGINE_SUFFIXES:
        by_type = read_manifest(artifact).precision.weight_bytes
        return sum(by_type.values()) if by_type else "the engine's manifest does not say"
    raise ArtifactError(
        f"the weights of {artifact.name} cannot be counted; give an .onnx, .safetensors or "
        f"{' or '.join(ENGINE_SUFFIXES)} file."
    )


def file_bytes(artifact: Path) -> int:
    """On disk, with the data file of an ONNX file above 2 GB."""
    data = data_path(artifact)
    return artifact.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def _of_onnx(artifact: Path) -> int | str:
    found = initializers(artifact)
    # A type without a size here has 0 bytes for all its elements.
    unsized = {tensor.dtype for tensor in found if tensor.dtype.startswith("type ")}
    if unsized:
        return f"the size of ONNX's {', '.join(sorted(unsized))} is not known here"
    return sum(tensor.nbytes for tensor in found)


def _of_safetensors(artifact: Path) -> int:
    """By the header: https://github.com/huggingface/safetensors#format."""
    try:
        with open(artifact, "rb") as file:
            (length,) = _HEADER_LENGTH.unpack(file.read(_HEADER_LENGTH.size))
            if length > _LONGEST_HEADER:
                raise ValueError(f"its header has {length} bytes")
            header = json.loads(file.read(length))
        tensors = [facts for name, facts in header.items() if name != "__metadata__"]
        return sum(end - begin for begin, end in (facts["data_offsets"] for facts in tensors))
    except OSError as error:
        raise ArtifactError(f"cannot read {artifact}: {error.strerror}.") from error
    except (struct.error, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{artifact} is not a safetensors file, or is damaged: {error}. Write it again."
        ) from error
