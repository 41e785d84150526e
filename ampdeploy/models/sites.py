"""Where the prunable neurons are. The only place that knows the kinds of MLP."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ampdeploy.errors import UnsupportedModelError
from ampdeploy.models.spec import MlpSite


def _refuse(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} cannot be slimmed exactly: {reason}. Nothing was changed; choose a model whose "
        "MLPs are linear -> activation (or gate) -> linear."
    )


def _linear(mlp: nn.Module, attribute: str, name: str) -> nn.Linear:
    module = getattr(mlp, attribute)
    if not isinstance(module, nn.Linear):
        raise _refuse(f"{name}.{attribute}", f"it is a {type(module).__name__}, not a Linear")
    return module


def _check_no_inner_norm(mlp: nn.Module, name: str) -> None:
    norm = getattr(mlp, "norm", None)
    if norm is not None and not isinstance(norm, nn.Identity):
        raise _refuse(
            name,
            f"{type(norm).__name__} over the hidden neurons stands before the second linear, so "
            "removing one neuron changes all the others (EVA-02 with scale_mlp)",
        )


class _Kind(NamedTuple):
    """Where one of timm's MLP classes keeps its linears."""

    fc_in: tuple[str, ...]
    gated: bool = False
    packed: bool = False


_FC_OUT = "fc2"
_KINDS = {
    "Mlp": _Kind(("fc1",)),
    "GluMlp": _Kind(("fc1",), gated=True, packed=True),  # SwiGLUPacked: DINOv2-g
    "SwiGLU": _Kind(("fc1_g", "fc1_x"), gated=True),  # split gate: EVA, DINOv3
}


def find_site(mlp: nn.Module, block: int, name: str) -> MlpSite:
    """The `MlpSite` of one timm MLP module.

    Args:
        mlp: The module.
        block: Index of the block it sits in.
        name: Its path inside the backbone.

    Raises:
        UnsupportedModelError: It cannot be slimmed exactly, with the reason.
    """
    kind = _KINDS.get(type(mlp).__name__)
    if kind is None:
        raise _refuse(name, f"{type(mlp).__name__} is not an MLP this tool knows")
    _check_no_inner_norm(mlp, name)
    for attribute in kind.fc_in:
        _linear(mlp, attribute, name)
    return MlpSite(
        block=block,
        name=name,
        fc_in=tuple(f"{name}.{attribute}" for attribute in kind.fc_in),
        fc_out=f"{name}.{_FC_OUT}",
        hidden=_linear(mlp, _FC_OUT, name).in_features,
        gated=kind.gated,
        packed=kind.packed,
    )


def find_sites(backbone: nn.Module) -> tuple[MlpSite, ...]:
    """The sites of every block, first to last.

    Raises:
        UnsupportedModelError: A block has no single `mlp`, or an MLP that must be refused.
    """
    sites = []
    for index, block in enumerate(backbone.blocks):  # type: ignore[arg-type]
        name = f"blocks.{index}"
        if not isinstance(getattr(block, "mlp", None), nn.Module):
            raise _refuse(name, f"{type(block).__name__} has no separate `mlp`")
        sites.append(find_site(block.mlp, index, f"{name}.mlp"))
    if not sites:
        raise _refuse("blocks", "the model has no blocks")
    return tuple(sites)
