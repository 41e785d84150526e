"""Tiny models, one per kind of MLP and backbone the project supports."""

from __future__ import annotations

import torch
from timm.layers import Mlp, SwiGLU, SwiGLUPacked
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import nn

from ampdeploy.models.build import wrap_backbone
from ampdeploy.models.vision import VisionModel

SIZE = 56
CFG = {
    "input_size": (3, SIZE, SIZE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "license": "none",
}
_COMMON = {"img_size": SIZE, "patch_size": 14, "num_classes": 0, "embed_dim": 32, "depth": 3}


def _vit(**options) -> nn.Module:
    return VisionTransformer(**{**_COMMON, "num_heads": 2, "mlp_ratio": 4, **options})


def _eva(**options) -> nn.Module:
    return Eva(**{**_COMMON, "num_heads": 2, "mlp_ratio": 2.75, "global_pool": "token", **options})


BACKBONES = {
    "plain": lambda: _vit(mlp_layer=Mlp),
    "packed_swiglu": lambda: _vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, init_values=0.1),
    # As AIMv2: a split gate whose linears have no bias.
    "swiglu_no_bias": lambda: _vit(mlp_layer=SwiGLU, act_layer=nn.SiLU, proj_bias=False),
    "registers": lambda: _vit(reg_tokens=4, no_embed_class=True, init_values=0.1),
    "average_pool": lambda: _vit(global_pool="avg", fc_norm=True),
    "clip_pre_norm": lambda: _vit(pre_norm=True),
    "eva_packed_gate": lambda: _eva(swiglu_mlp=True, use_rot_pos_emb=True),
    "eva_split_gate": lambda: _eva(swiglu_mlp=True, swiglu_align_to=8, use_rot_pos_emb=True),
    "eva_post_norm": lambda: _eva(use_post_norm=True),
    "eva_mixed_rope": lambda: _eva(
        use_rot_pos_emb=True, rope_type="mixed", attn_type="rope", use_abs_pos_emb=False
    ),
}


# A model of that kind that can be built by name, as checkpoints and the command line do it.
NO_BIAS = "timm:vit_swiglu_no_bias"


@register_model
def vit_swiglu_no_bias(pretrained: bool = False, **options) -> VisionTransformer:
    """timm's test model with AIMv2's kind of MLP."""
    tiny = {"patch_size": 16, "embed_dim": 64, "depth": 6, "num_heads": 2, "mlp_ratio": 2}
    kind = {"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "proj_bias": False}
    return _create_vision_transformer("test_vit", pretrained, **{**tiny, **kind, **options})


def make(kind: str, *, seed: int = 0) -> VisionModel:
    """A tiny model of `kind` whose weights are random enough for every neuron to matter."""
    torch.manual_seed(seed)
    backbone = BACKBONES[kind]()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return wrap_backbone(backbone, name=f"test:{kind}", timm_name="test", cfg=CFG)
