"""Which block and which kind an operator belongs to.

ampdeploy names nodes after their module (``blocks.3.mlp.fc1/MatMul``), and runtimes keep the name,
or derive the names of what they fuse from it. A node without such a name is placed by the names
of its weights, and one without either by its neighbours in the order in which they run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ampdeploy.explain import result as kinds
from ampdeploy.explain.work import Operator, is_attention

_SCOPE = re.compile(r"blocks[./](\d+)(?:[./]([\w./]*))?")
_QKV = re.compile(r"(^|\.)(qkv|[qkv]_proj|[qkv])(\.|$)")
_PROJ = re.compile(r"(^|\.)(proj|out_proj|o_proj)(\.|$)")
_NORMS = ("LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization",
          "SkipSimplifiedLayerNormalization", "RMSNormalization")  # fmt: skip

# The linears of an MLP by timm's names (models/sites.py has them as modules).
_MLP = {"fc1": kinds.FC1, "fc1_x": kinds.FC1, "fc1_g": kinds.GATE, "fc2": kinds.FC2}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an operator's time is booked."""

    block: int | None
    kind: str


def split_scope(name: str) -> tuple[int, str] | None:
    """(block, module inside it) of a node's or weight's name; None if it names no block.

    Modules are lower case, and what comes after them, operators and fusions, is not.
    """
    found = _SCOPE.search(name)
    if found is None:
        return None
    parts = re.split(r"[./]+", (found[2] or "").strip("./"))
    modules = itertools.takewhile(lambda part: part[:1].islower(), parts)
    return int(found[1]), ".".join(modules)


def place_all(
    operators: Sequence[Operator], weights: Mapping[str, Sequence[str]]
) -> dict[str, Place]:
    """The place of every operator, by name.

    Args:
        operators: In the order in which they run.
        weights: Node of the original graph -> names of the weights that it reads.
    """
    scopes = [_scope_of(operator, weights) for operator in operators]
    before = _nearest(scopes)
    after = _nearest(scopes[::-1])[::-1]
    places: dict[str, Place] = {}
    past_scores: set[int] = set()
    for operator, scope, left, right in zip(operators, scopes, before, after, strict=True):
        if scope is None:
            places[operator.name] = _place_by_neighbours(operator, left, right)
            continue
        block, module = scope
        kind = _kind(operator, module, block in past_scores)
        if operator.op_type == "Softmax" or is_attention(operator.op_type):
            past_scores.add(block)
        places[operator.name] = Place(block=block, kind=kind)
    return places


def place_name(name: str, op_type: str = "") -> Place:
    """The place of a node known by its name alone, as in an engine's metadata."""
    operator = Operator(name=name, op_type=op_type or _op_type(name), inputs=(), outputs=())
    return place_all([operator], {})[name]


def _op_type(name: str) -> str:
    return re.sub(r"_\d+$", "", name.rpartition("/")[2])


def _scope_of(operator: Operator, weights: Mapping[str, Sequence[str]]) -> tuple[int, str] | None:
    for name in (operator.name, *weights.get(operator.name, ())):
        scope = split_scope(name)
        if scope is not None:
            return scope
    return None


def _nearest(scopes: Sequence[tuple[int, str] | None]) -> list[tuple[int, str] | None]:
    """For each position the last scope that was known before it."""
    last: tuple[int, str] | None = None
    found: list[tuple[int, str] | None] = []
    for scope in scopes:
        found.append(last)
        last = scope or last
    return found


def _place_by_neighbours(
    operator: Operator, left: tuple[int, str] | None, right: tuple[int, str] | None
) -> Place:
    if operator.op_type in _NORMS:
        return Place(block=left[0] if left and right else None, kind=kinds.NORM)
    first = operator.name.partition("/")[0]
    if "patch_embed" in first or operator.op_type in ("Conv", "FusedConv"):
        return Place(block=None, kind=kinds.PATCH_EMBEDDING)
    if left is None or right is None or left[0] != right[0]:
        return Place(block=None, kind=kinds.REST)
    ours = {scope[1].partition(".")[0] for scope in (left, right)}
    if ours == {"attn"}:
        return Place(block=left[0], kind=kinds.SCORES)
    if ours == {"mlp"}:
        return Place(block=left[0], kind=kinds.MLP_ELEMENTWISE)
    return Place(block=left[0], kind=kinds.ELEMENTWISE)


def _kind(operator: Operator, module: str, past_scores: bool) -> str:
    part, _, inner = module.partition(".")
    if operator.op_type in _NORMS or part.startswith("norm"):
        return kinds.NORM
    if part == "mlp":
        return _MLP.get(inner.partition(".")[0], kinds.MLP_ELEMENTWISE)
    if part != "attn":
        return kinds.ELEMENTWISE
    if _QKV.search(inner):
        return kinds.QKV
    if _PROJ.search(inner):
        return kinds.PROJ
    # timm's EVA multiplies with qkv's weights outside of that module, and ONNX Runtime does not
    # list weights that it has repacked: a product of one operand is one with weights.
    if operator.is_product and len(operator.inputs) == 1:
        return kinds.PROJ if past_scores else kinds.QKV
    return kinds.SCORES
