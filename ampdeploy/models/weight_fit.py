"""Fit a checkpoint to a timm backbone: timm's own conversion, then a check of every tensor."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ampdeploy.errors import WeightsError
from ampdeploy.models.vision import VisionModel
from ampdeploy.models.weight_file import WeightFile
from ampdeploy.progress import log

_MAX_LISTED = 20
_MAX_PROBLEMS = 5  # who took the wrong file learns no more from the rest
# Names of the image position embedding: timm's and Meta's, OpenAI's and OpenCLIP's.
_POSITIONS = ("pos_embed", "visual.positional_embedding", "module.visual.positional_embedding")


def fit_weights(model: VisionModel, file: WeightFile, source: str) -> tuple[dict[str, Tensor], str]:
    """A state dict that fills `model.backbone` exactly; the model is not touched.

    Args:
        model: A model with the final architecture, any weights.
        file: What was read.
        source: What to call it in messages.

    Returns:
        The state dict, in the model's dtypes, and a note on what was converted ("" if nothing).

    Raises:
        WeightsError: Names missing, unexpected, of another shape, of another kind of number, or
            not finite: all of them in one message.
    """
    expected: dict[str, Tensor] = model.backbone.state_dict()
    state = _convert(model, file, source)
    heads = _drop_heads(model, state, expected)
    if ignored := [*file.ignored, *heads]:
        more = f" and {len(ignored) - _MAX_LISTED} more" if len(ignored) > _MAX_LISTED else ""
        log.info("weights: ignored beside the backbone: %s%s", _join(ignored), more)

    problems = [f"missing: {name}" for name in expected if name not in state]
    problems += [f"unexpected: {name}" for name in state if name not in expected]
    problems += [f"unexpected, not a tensor: {name}" for name in file.not_tensors]
    misshapen = [n for n in expected if n in state and state[n].shape != expected[n].shape]
    problems += [
        f"other shape: {name} is {tuple(state[name].shape)}, the model has "
        f"{tuple(expected[name].shape)}"
        for name in misshapen
    ]
    fitted = {}
    for name in expected:
        if name not in state or name in misshapen:
            continue
        if state[name].is_floating_point() != expected[name].is_floating_point():
            problems.append(
                f"other kind: {name} is {state[name].dtype}, the model has {expected[name].dtype}"
            )
            continue
        fitted[name] = state[name].to(expected[name].dtype)
        if not torch.isfinite(fitted[name]).all():
            problems.append(f"NaN or infinite: {name}")
    if problems:
        raise _does_not_fit(model, file, source, problems, slim=bool(misshapen))
    return fitted, _resampled(file, fitted)


def _join(names: list[str]) -> str:
    return ", ".join(names[:_MAX_LISTED])


def _convert(model: VisionModel, file: WeightFile, source: str) -> dict[str, Tensor]:
    """timm's own conversion of original checkpoints, position resampling included."""
    convert = _timm_filter(model)
    try:
        return dict(convert(dict(file.tensors), model.backbone))
    except Exception as error:  # timm indexes and reshapes foreign tensors unchecked
        cause, _ = _cause(model, file, slim=False)
        raise WeightsError(
            f"timm cannot convert {source} to {model.spec.timm_name}{cause}: "
            f"{type(error).__name__}: {error}. The file holds "
            f"{_join(sorted(file.tensors))}, ...; is it a checkpoint of this model?"
        ) from error


def _timm_filter(model: VisionModel) -> Callable[..., dict[str, Tensor]]:
    """`checkpoint_filter_fn` of the module that defines the backbone's class, as timm calls it."""
    for kind in type(model.backbone).__mro__:
        function = getattr(sys.modules[kind.__module__], "checkpoint_filter_fn", None)
        if function is not None:
            break
    else:
        return lambda state, backbone: state
    options: dict[str, Any] = {}
    if "adapt_layer_scale" in inspect.signature(function).parameters:
        options["adapt_layer_scale"] = True  # deit3's original names; no other ViT has them
    if "flexi" in model.spec.timm_name:  # timm resamples FlexiViT this way
        options.update(interpolation="bilinear", antialias=False)
    return lambda state, backbone: function(state, backbone, **options)


def _drop_heads(
    model: VisionModel, state: dict[str, Tensor], expected: dict[str, Tensor]
) -> list[str]:
    """Remove from `state` the classification heads that the headless model has no place for."""
    classifier = getattr(model.backbone, "pretrained_cfg", {}).get("classifier") or ()
    names = {"head", "head_dist", "fc"} | set(
        (classifier,) if isinstance(classifier, str) else classifier
    )
    if "siglip" in model.spec.timm_name:
        names.add("attn_pool")  # timm drops it too where SigLIP is built without attention pooling
    prefixes = tuple(f"{name}." for name in names)
    heads = [name for name in state if name.startswith(prefixes) and name not in expected]
    for name in heads:
        del state[name]
    return heads


def _does_not_fit(
    model: VisionModel, file: WeightFile, source: str, problems: list[str], *, slim: bool
) -> WeightsError:
    more = len(problems) - _MAX_PROBLEMS
    lines = problems[:_MAX_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
    cause, advice = _cause(model, file, slim=slim)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    body = "\n".join(f"  {line}" for line in lines)
    return WeightsError(
        f"weights {source} do not fit {model.spec.name}{cause} ({count}); nothing was loaded:\n"
        f"{body}\n{advice}"
    )


def _cause(model: VisionModel, file: WeightFile, *, slim: bool) -> tuple[str, str]:
    """Why weights do not fit, as far as the file says it, and what to do."""
    name = model.spec.name
    facts = _own_facts(file)
    written = facts.get("model")
    if facts and facts.get("kept", slim):
        what = f"a slimmed {written}" if written else "a slimmed model"
        return (
            f": this file is {what} that ampdeploy wrote",
            "Its MLPs are narrower than the dense model's. Use its run folder, or "
            "ampdeploy.load_slim(path); --weights takes dense weights.",
        )
    if written and written != name:
        return (
            f": this file is {written}, not {name}",
            f"Give --model {written}, or weights of {name}.",
        )
    return "", f"Are they weights of {model.spec.timm_name}?"


def _own_facts(file: WeightFile) -> dict[str, Any]:
    """What ampdeploy wrote into a checkpoint of its own; empty for any other file."""
    try:
        facts = json.loads(file.ampdeploy or "{}")
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _resampled(file: WeightFile, fitted: dict[str, Tensor]) -> str:
    """A note when the position embedding was stored for another number of tokens."""
    stored = next((file.tensors[name] for name in _POSITIONS if name in file.tensors), None)
    if stored is None or "pos_embed" not in fitted:
        return ""
    old, new = stored.shape[-2], fitted["pos_embed"].shape[-2]
    if "register_tokens" in file.tensors:
        old -= 1  # Meta's form counts the CLS position, which timm folds into the CLS token
    if old == new:
        return ""
    return f"position embedding resampled from {old} to {new} tokens"
