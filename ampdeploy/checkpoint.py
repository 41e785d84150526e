"""Checkpoints of dense and slim models: safetensors whose metadata rebuilds the architecture.

A pruned architecture is data: the widths are re-applied to a fresh model, then the weights fill
it (the habit of timm's `models/_prune.py`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ampdeploy.artifacts import write_with
from ampdeploy.errors import ArtifactError
from ampdeploy.models.build import build_model
from ampdeploy.models.vision import VisionModel
from ampdeploy.prune.slim import slim

METADATA_KEY = "ampdeploy"
FORMAT_VERSION = 1


def save_model(model: VisionModel, path: Path, *, kept: Sequence[Tensor] | None = None) -> None:
    """Write `model` to `path` atomically.

    Args:
        model: Dense or slim.
        path: A ``.safetensors`` file.
        kept: Per block, which neurons of the dense model are left; None for a dense model.
    """
    facts = {
        "format": FORMAT_VERSION,
        "model": model.spec.name,
        "timm_name": model.spec.timm_name,
        "image_size": model.spec.image_size,
        "hidden": [site.hidden for site in model.spec.sites],
        "kept": None if kept is None else [indices.tolist() for indices in kept],
    }
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.backbone.state_dict().items()
    }
    write_safetensors(path, tensors, {METADATA_KEY: json.dumps(facts)})


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises:
        AmpDeployError: The disk is full or the folder cannot be written.
    """

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            # The library writes in Rust and hides the operating system's error in its text.
            found = re.search(r"(?:os error|code:) (\d+)", str(error))
            if found is None:
                raise
            number = int(found.group(1))
            raise OSError(number, os.strerror(number), str(path)) from error

    write_with(path, write, needed=sum(tensor.nbytes for tensor in tensors.values()))


def read_facts(path: Path) -> dict[str, Any]:
    """The metadata `save_model` wrote.

    Raises:
        ArtifactError: Missing, damaged, or not a checkpoint of ampdeploy.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist.") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is not a readable safetensors file: {error}. It may be cut short; "
            "run the command that wrote it again."
        ) from error
    if METADATA_KEY not in metadata:
        raise ArtifactError(
            f"{path} is a safetensors file, but not a checkpoint of ampdeploy (no "
            f"{METADATA_KEY!r} in its metadata). Weights from elsewhere go through --weights."
        )
    facts: dict[str, Any] = json.loads(metadata[METADATA_KEY])
    if facts.get("format") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has checkpoint format {facts.get('format')!r}; this ampdeploy reads "
            f"{FORMAT_VERSION}. Rebuild it with this version."
        )
    return facts


def load_model(path: Path | str) -> VisionModel:
    """The model in a checkpoint, dense or slim, in eval mode on the CPU.

    Raises:
        ArtifactError: The file is missing, damaged or not one of ours.
    """
    path = Path(path)
    facts = read_facts(path)
    model = build_model(facts["model"], image_size=facts["image_size"], device="meta")
    # Which neurons stay does not matter on meta tensors, only how many.
    slim(model, [torch.arange(width) for width in facts["hidden"]])
    with safe_open(path, framework="pt") as handle:
        state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    _make_room_for_biases(model, state)
    try:
        model.backbone.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} does not fit {facts['model']} as this timm builds it: {error}"
        ) from error
    _materialise_buffers(model, facts)
    return model.eval()


def _make_room_for_biases(model: VisionModel, state: Mapping[str, Tensor]) -> None:
    """The fold makes up for the mean of pruned neurons in a bias, which the model may not have
    had at that place."""
    for site in model.spec.sites:
        linear = model.backbone.get_submodule(site.fc_out)
        assert isinstance(linear, nn.Linear)
        if linear.bias is None and f"{site.fc_out}.bias" in state:
            linear.bias = nn.Parameter(torch.empty(linear.out_features, device="meta"))


def _materialise_buffers(model: VisionModel, facts: dict[str, Any]) -> None:
    """Give non-persistent buffers (RoPE tables), which no checkpoint holds, their values."""
    missing = [name for name, buffer in model.backbone.named_buffers() if buffer.is_meta]
    if not missing:
        return
    fresh = build_model(facts["model"], image_size=facts["image_size"])
    for name in missing:
        parent, _, attribute = name.rpartition(".")
        module = model.backbone.get_submodule(parent)
        module.register_buffer(attribute, fresh.backbone.get_buffer(name), persistent=False)


def kept_indices(path: Path) -> list[list[int]] | None:
    """Per block, the dense model's neurons that a slim checkpoint kept; None for a dense one."""
    kept: list[list[int]] | None = read_facts(path)["kept"]
    return kept
