"""Parameters and FLOPs, counted on meta tensors so that a 4-billion model costs no memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ampdeploy.models.vision import VisionModel


@dataclass(frozen=True, kw_only=True)
class BlockProfile:
    """One transformer block."""

    block: int
    hidden: int
    params: int
    mlp_params: int
    mlp_flops: int


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """Size and cost of one model at one image size."""

    params: int
    flops: int
    """2 * multiply-accumulates for one image, attention included."""
    attention_flops: int
    """The part of `flops` spent in the two attention products, which some papers leave out."""
    mlp_params: int
    mlp_flops: int
    image_size: int
    tokens: int
    blocks: tuple[BlockProfile, ...]


def count_params(module: nn.Module) -> int:
    """Number of parameters; a tensor shared by two modules counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def profile_model(model: VisionModel) -> ModelProfile:
    """Count `model` as it stands (slim models give slim numbers).

    FLOPs are 2 * MACs as counted by torch's `FlopCounterMode`: linears, convolutions and both
    attention products; norms, activations and softmax are not counted, which is the convention of
    every published figure in the registry.
    """
    on_meta = _meta_copy(model)
    # The counter sees matmuls only when attention is written out, so fused attention goes off.
    for module in on_meta.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    size = model.spec.image_size
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        tokens = on_meta.forward_tokens(torch.empty(1, 3, size, size, device="meta"))
        on_meta.head(tokens)
    by_operator = counter.get_flop_counts()["Global"]
    attention = int(by_operator.get(torch.ops.aten.bmm, 0))
    count = tokens.shape[1]
    blocks = []
    for site in model.spec.sites:
        mlp = model.backbone.get_submodule(site.name)
        block = model.blocks[site.block]
        # Every MLP weight is used once per token; biases are additions, which are not counted.
        weights = sum(p.numel() for n, p in mlp.named_parameters() if n.endswith("weight"))
        blocks.append(
            BlockProfile(
                block=site.block,
                hidden=site.hidden,
                params=count_params(block),
                mlp_params=count_params(mlp),
                mlp_flops=2 * count * weights,
            )
        )
    return ModelProfile(
        params=count_params(model),
        flops=int(counter.get_total_flops()),
        attention_flops=attention,
        mlp_params=sum(b.mlp_params for b in blocks),
        mlp_flops=sum(b.mlp_flops for b in blocks),
        image_size=size,
        tokens=count,
        blocks=tuple(blocks),
    )


def _meta_copy(model: VisionModel) -> VisionModel:
    """A copy whose tensors have shapes but no memory; the weights are never copied."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)
