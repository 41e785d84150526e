"""Read the DINOv2-style backbone out of an ONNX file, into timm's names.

torch's exporter keeps the names of biases, norms and embeddings (Hugging Face's
``encoder.layer.N...``) but folds each linear weight into an anonymous, transposed initialiser
(``onnx::MatMul_1966``), and the position embedding into two (CLS and grid). Nothing here relies
on those numbers or on their order: a weight is found through the node that adds its bias.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from ampdeploy.errors import WeightsError

_BLOCK = re.compile(r"^(?P<prefix>(?:.*\.)?)encoder\.layer\.(?P<index>\d+)\.norm1\.weight$")

# Parameters of one block that keep their names: Hugging Face -> timm.
_NAMED = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_LINEAR = {"attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
# timm fuses the three in this order.
_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))

# Between the stored position grid and the tokens stand only these when the grid is interpolated.
_GRID_PATH = {"Reshape", "Transpose", "Cast", "Resize"}

_MAX_LISTED = 20


class _Graph:
    """Initialisers by name, and who makes and who reads each tensor."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.maker: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.output:
                self.maker[name] = node
            for name in node.input:
                self.readers[name].append(node)
        self.nodes = list(graph.node)
        self.used: set[str] = set()
        self.missing: list[str] = []

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor; () for anything that is not one."""
        return tuple(self.stored[name].dims) if name in self.stored else ()

    def take(self, name: str) -> Tensor:
        """A stored tensor; an absent one is noted in `missing` and comes back empty."""
        if name not in self.stored:
            self.missing.append(name)
            return torch.empty(0)
        self.used.add(name)
        return torch.from_numpy(numpy_helper.to_array(self.stored[name]).copy())

    def linear_weight(self, name: str) -> Tensor:
        """Weight (out, in) of the linear whose bias is ``<name>.bias``."""
        if f"{name}.weight" in self.stored:
            return self.take(f"{name}.weight")
        bias = f"{name}.bias"
        for node in self.readers[bias]:
            if node.op_type == "Gemm" and node.input[2] == bias and node.input[1] in self.stored:
                transposed = any(a.name == "transB" and a.i for a in node.attribute)
                weight = self.take(node.input[1])
                return weight if transposed else weight.T
            if node.op_type != "Add":
                continue
            product = next((self.maker.get(name) for name in node.input if name != bias), None)
            if product is None or product.op_type != "MatMul":
                continue
            if product.input[1] in self.stored:
                return self.take(product.input[1]).T  # MatMul stores (in, out)
        self.missing.append(f"{name}.weight (no MatMul or Gemm with {bias})")
        return torch.empty(0)

    def split_position(self) -> tuple[str, str] | None:
        """Names of the CLS position (1, 1, C) and the grid (1, side**2, C), if stored apart.

        They are what a Concat joins: one stored tensor, and another one that reaches the Concat
        through the interpolation. The CLS token's own Concat is told apart by its other input,
        which comes from the image.
        """
        found = []
        for node in self.nodes:
            if node.op_type != "Concat" or len(node.input) != 2:
                continue
            cls, grid = node.input
            while grid in self.maker and self.maker[grid].op_type in _GRID_PATH:
                grid = self.maker[grid].input[0]
            cls_shape, grid_shape = self.shape(cls), self.shape(grid)
            if len(cls_shape) != 3 or len(grid_shape) != 3 or cls_shape[:2] != (1, 1):
                continue
            square = math.isqrt(grid_shape[1]) ** 2 == grid_shape[1]
            if square and grid_shape[0] == 1 and grid_shape[2] == cls_shape[2]:
                found.append((cls, grid))
        return found[0] if len(found) == 1 else None


def read_onnx_backbone(path: Path) -> dict[str, Tensor]:
    """The backbone of an ONNX file as a timm ``VisionTransformer`` state dict.

    Args:
        path: A model exported by torch from Hugging Face's ``Dinov2Model``, alone or inside a
            larger model; what is around the backbone is ignored.

    Returns:
        timm name -> tensor. ``pos_embed`` is (1, 1 + side**2, C) at the stored grid size.

    Raises:
        WeightsError: Not an ONNX file, or without such a backbone, or with one that has parts
            this reader does not know; every name is listed.
    """
    graph = _Graph(_load(path).graph)
    prefix, depth = _find_blocks(graph, path)
    state: dict[str, Tensor] = _embeddings(graph, prefix)
    for index in range(depth):
        old, new = f"{prefix}encoder.layer.{index}.", f"blocks.{index}."
        for theirs, ours in _NAMED.items():
            state[new + ours] = graph.take(old + theirs)
        for theirs, ours in _LINEAR.items():
            state[f"{new}{ours}.weight"] = graph.linear_weight(old + theirs)
            state[f"{new}{ours}.bias"] = graph.take(f"{old}{theirs}.bias")
        weights = [graph.linear_weight(old + part) for part in _QKV]
        biases = [graph.take(f"{old}{part}.bias") for part in _QKV]
        if not graph.missing:
            state[f"{new}attn.qkv.weight"] = torch.cat(weights)
            state[f"{new}attn.qkv.bias"] = torch.cat(biases)
    for part in ("weight", "bias"):
        state[f"norm.{part}"] = graph.take(f"{prefix}layernorm.{part}")
    _check_complete(graph, prefix, path)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf and onnx raise types of their own, by version
        raise WeightsError(
            f"{path} is not a readable ONNX file: {error}. It may be cut short or be something "
            "else under that name; fetch or export it again."
        ) from error
    if not model.graph.node:
        raise WeightsError(f"{path} is not an ONNX model: it holds no graph. Export it again.")
    outside = [t.name for t in model.graph.initializer if t.data_location == t.EXTERNAL]
    if outside:
        raise WeightsError(
            f"{path} keeps {len(outside)} tensors in other files (ONNX external data), which its "
            "hash would not cover. Merge it into one file with onnx.load and onnx.save first."
        )
    return model


def _find_blocks(graph: _Graph, path: Path) -> tuple[str, int]:
    """Prefix of the backbone's names, and its number of blocks."""
    blocks: dict[str, set[int]] = defaultdict(set)
    for name in graph.stored:
        if match := _BLOCK.match(name):
            blocks[match["prefix"]].add(int(match["index"]))
    if len(blocks) == 1:
        prefix, indices = next(iter(blocks.items()))
        if indices == set(range(len(indices))):
            return prefix, len(indices)
        raise WeightsError(
            f"{path}: blocks of {prefix}encoder.layer are numbered {sorted(indices)}, with gaps. "
            "Export the whole model."
        )
    names = sorted(graph.stored)
    shown = ", ".join(names[:_MAX_LISTED]) or "none"
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    found = f"several ({', '.join(sorted(blocks))})" if blocks else "none"
    raise WeightsError(
        f"{path} holds no single DINOv2 backbone that can be mapped: looked for tensors named "
        f"[prefix]encoder.layer.0.norm1.weight (Hugging Face's Dinov2Model), found {found}. Its "
        f"tensors: {shown}{more}. Give the original checkpoint (.safetensors or .pth) instead."
    )


def _embeddings(graph: _Graph, prefix: str) -> dict[str, Tensor]:
    embeddings = f"{prefix}embeddings."
    state = {"cls_token": graph.take(f"{embeddings}cls_token")}
    for part in ("weight", "bias"):
        name = f"{embeddings}patch_embeddings.projection.{part}"
        state[f"patch_embed.proj.{part}"] = graph.take(name)
    named = f"{embeddings}position_embeddings"
    if named in graph.stored:  # exported at the grid's own size: nothing was folded
        state["pos_embed"] = graph.take(named)
    elif split := graph.split_position():
        state["pos_embed"] = torch.cat([graph.take(name) for name in split], dim=1)
    else:
        graph.missing.append(f"{named} (nor its CLS and grid parts joined by one Concat)")
    return state


def _check_complete(graph: _Graph, prefix: str, path: Path) -> None:
    """Every part was found, and the backbone has no part that was left behind (registers, ...)."""
    graph.used.add(f"{prefix}embeddings.mask_token")  # pretraining only
    parts = tuple(prefix + part for part in ("embeddings.", "encoder.", "layernorm."))
    left = [name for name in graph.stored if name.startswith(parts) and name not in graph.used]
    problems = [f"  missing: {name}" for name in graph.missing]
    problems += [f"  not understood: {name}" for name in left]
    if problems:
        more = len(problems) - _MAX_LISTED
        lines = problems[:_MAX_LISTED] + ([f"  ... and {more} more"] if more > 0 else [])
        raise WeightsError(
            f"the backbone in {path} cannot be mapped to timm's ViT ({len(problems)} problems):\n"
            + "\n".join(lines)
            + "\nGive the original checkpoint (.safetensors or .pth) instead."
        )
