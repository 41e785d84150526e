"""PyTorch to ONNX: one self-describing file that every runtime in scope computes right.

What the graph looks like is decided here, because TensorRT's known failures on ViTs come from it:
attention is written out with q scaled once before q k^T, every norm is one LayerNormalization,
rotary and position embeddings are constants at the chosen image size, and only the batch is
dynamic. `graph.check_graph` holds the file to that.

Tensor legend: B images, S image side, P patches, C model width.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxscript import ir
from torch import Tensor, nn

from ampdeploy.errors import UnsupportedModelError
from ampdeploy.export.names import IMAGES, OUTPUTS
from ampdeploy.export.write import SINGLE_FILE_LIMIT, write_graph
from ampdeploy.models.vision import BlockState, VisionModel
from ampdeploy.progress import log

# The exporter specialises a batch of 1 into the graph, so the example has two images.
EXAMPLE_BATCH = 2
# Bounded only for torch 2.6, which refuses a dimension without an upper end. The graph is not.
MAX_BATCH = 2**20
# How the exporter sees the timm module inside `_Deployable`.
BACKBONE_SCOPE = "model.backbone."
REFERENCE_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class ExportFacts:
    """What was written."""

    file_bytes: int
    """Size of the ``.onnx`` file and, where there is one, its ``.data`` file."""
    opset: int
    nodes: dict[str, int]
    """Operator type -> number of nodes."""
    external_data: bool
    """The weights are in ``<name>.data`` next to the file: both must travel together."""
    outputs: tuple[str, ...]


class _Deployable(nn.Module):
    """The model with its rotary embedding as a constant; also what names the outputs."""

    rope: Tensor | None

    def __init__(self, model: VisionModel, rope: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("rope", rope)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        # Whatever the stem traced to make its own rope is dead code now and is dropped.
        tokens = self.model.stem(images).tokens
        features, patches = self.model.head(
            self.model.run_blocks(BlockState(tokens, self.rope)).tokens
        )
        return (features,) if patches is None else (features, patches)


def export_onnx(
    model: VisionModel, path: Path, *, opset: int, single_file_limit: int = SINGLE_FILE_LIMIT
) -> ExportFacts:
    """Write `model` as ONNX with a dynamic batch; the same model gives the same bytes.

    The graph maps ``images`` (B, 3, S, S), float32, normalised, to ``features`` (B, C) and, where
    the model has them, ``patch_features`` (B, P, C). The file's metadata name the model, its
    licence and the preprocessing. `model` is left as it was.

    Args:
        model: Dense or slim; float32.
        path: The ``.onnx`` file; replaced only once the new one is complete.
        opset: ONNX operator set, 18 or newer.
        single_file_limit: Above this many bytes of weights they go to `data_path(path)`.

    Raises:
        UnsupportedModelError: The weights are not float32.
        AmpDeployError: The file cannot be written.
    """
    _check_float32(model)
    names = OUTPUTS if model.spec.has_patch_features else OUTPUTS[:1]
    graph_model = _to_ir(model, names, opset)
    _name_nodes(graph_model)
    _strip_traces(graph_model)
    _describe(graph_model, model)
    file_bytes, external = write_graph(graph_model, path, single_file_limit=single_file_limit)
    facts = ExportFacts(
        file_bytes=file_bytes,
        opset=graph_model.opset_imports[""],
        nodes=dict(Counter(node.op_type for node in graph_model.graph).most_common()),
        external_data=external,
        outputs=names,
    )
    log.info("wrote %s: %.1f MB, opset %d", path.name, file_bytes / 1e6, facts.opset)
    return facts


def reference_outputs(model: VisionModel, images: Tensor) -> dict[str, np.ndarray]:
    """What PyTorch computes, by output name: the truth that an export is compared with.

    Args:
        model: Run as it is (fused attention stays on), in eval mode, on its own device.
        images: (B, 3, S, S), float32, normalised.
    """
    device = next(model.parameters()).device
    parts: dict[str, list[Tensor]] = {}
    with _eval_mode(model), torch.inference_mode():
        for batch in images.split(REFERENCE_BATCH):
            for name, output in zip(OUTPUTS, model(batch.to(device)), strict=True):
                if output is not None:
                    parts.setdefault(name, []).append(output.float().cpu())
    return {name: torch.cat(outputs).numpy() for name, outputs in parts.items()}


def _check_float32(model: VisionModel) -> None:
    others = Counter(
        str(parameter.dtype).removeprefix("torch.")
        for parameter in model.parameters()
        if parameter.dtype != torch.float32
    )
    if others:
        raise UnsupportedModelError(
            f"cannot export {model.spec.name}: {sum(others.values())} of its parameters are "
            f"{', '.join(others)}. Export from float32 (`model.float()`); lower precision is a "
            "later step, so that it can be verified by itself."
        )


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, each module's own mode again after it."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def explicit_attention(model: nn.Module) -> Iterator[None]:
    """Attention written out (q * scale, q k^T, softmax, v) inside the block; restored after it.

    From a fused SDPA the exporter multiplies q and k by sqrt(scale) each, which TensorRT 10.7
    gets wrong (github.com/NVIDIA/TensorRT/issues/4333), and which is one rounding more in FP16.
    """
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    try:
        for module in fused:
            module.fused_attn = False  # type: ignore[assignment]
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter off the terminal; errors pass, the text goes to the debug log."""
    chatter = io.StringIO()
    silenced = logging.root.manager.disable
    # torch's and onnxscript's log handlers hold on to the real stderr, so they are told apart.
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(chatter),
            contextlib.redirect_stderr(chatter),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(silenced)
        if chatter.tell():
            log.debug("torch.onnx: %s", chatter.getvalue().strip())


def _to_ir(model: VisionModel, names: tuple[str, ...], opset: int) -> ir.Model:
    size = model.spec.image_size
    device = next(model.parameters()).device
    images = torch.zeros(EXAMPLE_BATCH, 3, size, size, device=device)
    with _eval_mode(model), explicit_attention(model), torch.no_grad(), _quiet():
        deployable = _Deployable(model, model.stem(images).rope).eval()
        # Captured here, not inside torch.onnx.export: on failure torch 2.6 would go on to trace,
        # which freezes whatever depends on the example images, without a word.
        program = torch.onnx.export(
            torch.export.export(
                deployable,
                (images,),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},),
                strict=False,
            ),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[IMAGES],
            output_names=list(names),
            **_known_options(torch.onnx.export, optimize=True, fallback=False),
        )
        if program is None:
            raise RuntimeError("torch.onnx.export returned nothing for dynamo=True")
        return program.model


def _known_options(function: Any, **options: Any) -> dict[str, Any]:
    """Those of `options` that `function` takes: torch added and removed some between releases."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def _name_nodes(graph_model: ir.Model) -> None:
    """Name nodes after the module they come from, e.g. ``blocks.3.mlp.fc1/MatMul``.

    Per-layer reports of every runtime print these names. Nodes without a trace keep theirs.
    """
    used: Counter[str] = Counter()
    for node in graph_model.graph:
        # The path of modules, outermost first, and last the traced operation itself.
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        scope = scopes[-2] if len(scopes) > 1 else ""
        module = scope.removeprefix(BACKBONE_SCOPE) if scope.startswith(BACKBONE_SCOPE) else ""
        stem = f"{module}/{node.op_type}" if module else node.op_type
        used[stem] += 1
        node.name = stem if used[stem] == 1 else f"{stem}_{used[stem]}"


def _strip_traces(graph_model: ir.Model) -> None:
    """Drop what the exporter notes for debugging: stack traces hold paths of this machine."""
    graph = graph_model.graph
    graph_model.metadata_props.clear()
    graph_model.doc_string = graph.doc_string = None
    graph.metadata_props.clear()
    graph.name = "ampdeploy"
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is not None:
            value.const_value.metadata_props.clear()


def _describe(graph_model: ir.Model, model: VisionModel) -> None:
    """Let the file say what it is and which images it wants."""
    spec = model.spec
    graph_model.producer_name = "ampdeploy"
    graph_model.producer_version = None
    facts = {
        "model": spec.name,
        "timm_name": spec.timm_name,
        "licence": spec.licence,
        "image_size": spec.image_size,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "crop_pct": spec.crop_pct,
        "crop_mode": spec.crop_mode,
        "interpolation": spec.interpolation,
        "pooling": spec.pooling,
        "exporter": f"torch {torch.__version__}",
    }
    for name, value in facts.items():
        graph_model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
