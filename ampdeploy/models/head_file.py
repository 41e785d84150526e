"""Read a classification head from a file: the head alone, or out of a whole checkpoint."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.artifacts import sha256_file
from ampdeploy.bench.tasks import Head
from ampdeploy.errors import ArtifactError
from ampdeploy.optional import require

SUFFIXES = (".safetensors", ".pth", ".pt", ".npz")
# What stands before `weight` and `bias`: nothing, or what timm and training scripts call a head.
PREFIXES = ("", "head.", "fc.", "classifier.", "linear.", "linear_head.")
CLASSES = "classes"


def read_head(path: Path) -> Head:
    """The head in a ``.safetensors``, ``.pth``, ``.pt`` or ``.npz`` file.

    It holds ``weight`` (K, C) and ``bias`` (K,), alone or under one of `PREFIXES`, so timm's own
    checkpoint of a classifier will do: `features` is exactly what timm's ``head`` reads. Optional
    is ``classes``, K names: a JSON list in safetensors' metadata, a list in a pickle, an array of
    strings in an ``.npz``.

    Raises:
        ArtifactError: It is missing, damaged, of another kind, or holds no head.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ArtifactError(f"head {path} is no {', '.join(SUFFIXES)} file. Save it as one.")
    if not path.is_file():
        raise ArtifactError(f"there is no head file {path}. Check the path.")
    try:
        if suffix == ".npz":
            tensors, classes = _read_npz(path)
        elif suffix == ".safetensors":
            tensors, classes = _read_safetensors(path)
        else:
            tensors, classes = _read_pickle(path)
    except ArtifactError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(
            f"head {path} cannot be read: {reason}. It may be cut short, or be something else "
            "under that name; save it again."
        ) from error
    return _find_head(path, tensors, classes)


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    if not zipfile.is_zipfile(path):
        raise ArtifactError(f"head {path} is not an npz archive. Write it with numpy.savez.")
    with np.load(path, allow_pickle=False) as opened:
        arrays = {name: opened[name] for name in opened.files}
    classes = arrays.pop(CLASSES, None)
    return arrays, None if classes is None else classes.tolist()


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    # Through torch: numpy has no bfloat16.
    safetensors = require("safetensors", needed_by=f"reading {path.name}")
    require("torch", needed_by=f"reading {path.name}")
    with safetensors.safe_open(path, framework="pt") as opened:
        metadata = opened.metadata() or {}
        names = [name for name in opened.keys() if _may_be_head(name)]  # noqa: SIM118
        tensors = {name: opened.get_tensor(name).float().numpy() for name in names}
    return tensors, json.loads(metadata[CLASSES]) if CLASSES in metadata else None


def _read_pickle(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    torch = require("torch", needed_by=f"reading {path.name}")
    # weights_only: nothing in the file is run.
    data = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(data, Mapping):
        raise ArtifactError(
            f"head {path} holds a {type(data).__name__}, not a state dict. Save head.state_dict()."
        )
    classes = data.get(CLASSES)
    for wrapper in ("state_dict", "model"):
        if isinstance(data.get(wrapper), Mapping):
            data = data[wrapper]
    tensors = {
        str(name): value.detach().float().numpy()
        for name, value in data.items()
        if isinstance(value, torch.Tensor) and _may_be_head(str(name))
    }
    return tensors, classes


def _may_be_head(name: str) -> bool:
    return any(name in (f"{prefix}weight", f"{prefix}bias") for prefix in PREFIXES)


def _find_head(path: Path, tensors: Mapping[str, np.ndarray], classes: Any) -> Head:
    found = [prefix for prefix in PREFIXES if f"{prefix}weight" in tensors]
    if len(found) != 1:
        named = " and ".join(f"{prefix}weight" for prefix in found)
        raise ArtifactError(
            f"{path} holds {f'several heads, {named}' if found else 'no classification head'}: "
            f"one of {', '.join(f'{prefix}weight' for prefix in PREFIXES)} is wanted, with its "
            "bias. The weights of DINOv2, DINOv3 and CLIP come without one: "
            "train one, or use the tasks knn and probe."
        )
    weight = tensors[f"{found[0]}weight"].astype(np.float64)
    bias = tensors.get(f"{found[0]}bias")
    if weight.ndim != 2 or len(weight) < 2 or bias is None or bias.shape != (len(weight),):
        shape = None if bias is None else bias.shape
        raise ArtifactError(
            f"head {path} has a weight of shape {weight.shape} and a bias of shape {shape}; it "
            "takes (K, C) and (K,), K classes of two or more. Save zeros where there is no "
            "bias."
        )
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise ArtifactError(f"head {path} holds values that are NaN or infinite. Save it again.")
    return Head(
        name=path.name,
        sha256=sha256_file(path),
        weight=weight,
        bias=bias.astype(np.float64),
        classes=_class_names(path, classes, len(weight)),
    )


def _class_names(path: Path, classes: Any, count: int) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        raise ArtifactError(
            f'"{CLASSES}" of head {path} is not a list of names. Write one name per row.'
        )
    if len(classes) != count or len(set(classes)) != count:
        raise ArtifactError(
            f'"{CLASSES}" of head {path} has {len(set(classes))} different names for {count} rows. '
            "Write one name per row."
        )
    return tuple(classes)
