"""The ONNX graphs of a pair, made when they are first asked for, and what emulation says of them.

The emulated FP16 of `ampdeploy.precision` decides, on a CPU, whether a typed graph is right. Here
it is held against the FP16 of the device: the same typed graph, node by node.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ampdeploy.artifacts import prepare_folder
from ampdeploy.config import ExportConfig, PrecisionConfig
from ampdeploy.export.names import OUTPUTS
from ampdeploy.export.onnx import export_onnx
from ampdeploy.export.reference import block_references
from ampdeploy.export.write import write_graph
from ampdeploy.precision.compare import Reference, agreement
from ampdeploy.precision.emulate import emulation
from ampdeploy.precision.graph import block_outputs, load_model
from ampdeploy.precision.ranges import measure_ranges
from ampdeploy.precision.repair import Typed, type_graph
from benchmarks.gpu.interpret import InterpretedGraph
from benchmarks.gpu.pairs import Pair, float32_mode

RANGE_IMAGES = 16
JUDGE_IMAGES = 4  # with every block's tokens, emulated on the CPU
BATCH = 2


class Graphs:
    """The files of one pair, in a folder of their own."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self._pair = pair
        self.folder = folder
        self._exported: dict[str, Path] = {}
        self._typed: dict[str, tuple[Path, Typed, Reference]] = {}

    def float32(self, role: str) -> Path:
        """The exported graph of ``dense`` or ``pruned``."""
        if role not in self._exported:
            prepare_folder(self.folder)
            path = self.folder / f"{role}.onnx"
            # On the CPU: the exporter holds tensors of its own, which the GPU need not.
            model = copy.deepcopy(self._pair.models[role]).cpu()
            export_onnx(model, path, opset=ExportConfig().opset)
            self._exported[role] = path
        return self._exported[role]

    def typed(self, role: str) -> Path:
        """The typed FP16 graph, seen to be right by emulation.

        Raises:
            VerificationError: It cannot be typed.
        """
        return self._made(role)[0]

    def verdict(self, role: str) -> dict[str, Any]:
        """How the typed graph was verified, for an engine's manifest."""
        _, typed, _ = self._made(role)
        outputs = typed.judgement.outputs
        return {
            "precision": "fp16",
            "bar": PrecisionConfig().min_cosine_p1,
            "outputs": {name: dataclasses.asdict(seen) for name, seen in outputs.items()},
        }

    def _made(self, role: str) -> tuple[Path, Typed, Reference]:
        if role not in self._typed:
            source = self.float32(role)
            path = source.with_name(f"{role}.fp16.onnx")
            images = self._pair.images[:JUDGE_IMAGES]
            with float32_mode(tf32=False):
                blocks, outputs = block_references(
                    self._pair.models[role], torch.from_numpy(images), batch=BATCH
                )
            reference = Reference(images=images, blocks=blocks, outputs=outputs)
            ranges = measure_ranges(source, self._pair.calib[:RANGE_IMAGES])
            typed = type_graph(source, ranges, reference, PrecisionConfig(precision="fp16"))
            write_graph(typed.model, path)
            self._typed[role] = (path, typed, reference)
        return self._typed[role]

    def compare_emulation(self, role: str) -> dict[str, Any]:
        """Emulated FP16, the device's FP16 and PyTorch's float32, per block and at the outputs.

        Returns:
            ``nodes_fp32`` (how many the rules keep), ``images``, and per output and block the
            cosines of each two of ``emulated``, ``device`` and ``float32``, and the norm of their
            difference over that of the second.
        """
        path, typed, reference = self._made(role)
        model = load_model(path)
        blocks = {block: value.name or "" for block, value in block_outputs(model).items()}
        emulated: dict[str, list[np.ndarray]] = {}
        with emulation(model, near=path, watch=list(blocks.values())) as session:
            for start in range(0, len(reference.images), BATCH):
                for name, value in session.run(reference.images[start : start + BATCH]).items():
                    emulated.setdefault(name, []).append(value)
        real = self._on_device(path, list(blocks.values()), reference.images)

        def row(name: str, float32: np.ndarray) -> dict[str, Any]:
            fake = np.concatenate(emulated[name])
            pairs = {
                "emulated_to_float32": (fake, float32),
                "device_to_float32": (real[name], float32),
                "device_to_emulated": (real[name], fake),
            }
            return {key: _compare(a, b) for key, (a, b) in pairs.items()}

        return {
            "images": len(reference.images),
            "nodes_fp32": len(typed.decisions),
            "islands": {str(block): list(kinds) for block, kinds in typed.islands.items()},
            "outputs": {
                name: row(name, reference.outputs[name])
                for name in OUTPUTS
                if name in reference.outputs
            },
            "blocks": {
                str(block): row(name, reference.blocks[block]) for block, name in blocks.items()
            },
        }

    def _on_device(self, path: Path, watch: list[str], images: np.ndarray) -> dict[str, np.ndarray]:
        graph = InterpretedGraph(path, self._pair.device, watch=watch)
        parts: dict[str, list[np.ndarray]] = {}
        with torch.no_grad(), float32_mode(tf32=False):
            for start in range(0, len(images), BATCH):
                batch = torch.from_numpy(images[start : start + BATCH]).to(self._pair.device)
                for name, value in zip(graph.names, graph(batch), strict=True):
                    parts.setdefault(name, []).append(value.float().cpu().numpy())
        return {name: np.concatenate(values) for name, values in parts.items()}


def _compare(found: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    difference = np.linalg.norm((found - expected).astype(np.float64))
    relative = float(difference / np.linalg.norm(expected.astype(np.float64)))
    return {
        **dataclasses.asdict(agreement(found, expected)),
        # JSON has no infinity; `not_finite` counts what made it one.
        "relative_difference": relative if np.isfinite(relative) else None,
    }
