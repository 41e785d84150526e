"""Operator times from ONNX Runtime's own profiler, both models turn and turn about.

https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.errors import AmpDeployError, ArtifactError, ConfigError
from ampdeploy.explain import result as kinds
from ampdeploy.explain.interleave import WARMUP_PAIRS, run_pairs
from ampdeploy.explain.places import Place, place_all
from ampdeploy.explain.profiled import ProfiledModel, Timed
from ampdeploy.explain.work import Operator, Tensor, inner_size, is_attention, work_of
from ampdeploy.export.names import IMAGES
from ampdeploy.export.session import image_input, open_session
from ampdeploy.optional import require
from ampdeploy.progress import log

CLOCK = (
    "ONNX Runtime's profiler: wall time inside each operator's kernel, whole microseconds. It "
    "costs time itself; latency is measured without it"
)
_SUFFIX = "_kernel_time"


def profile_pair(
    baseline: Path, pruned: Path, *, batch: int, threads: int | None, runs: int
) -> tuple[ProfiledModel, ProfiledModel]:
    """Profile two ONNX files on the CPU, after timing them without the profiler.

    Images are seeded noise of the spread of normalised images: nothing in these graphs depends on
    what is in them.

    Args:
        baseline: The dense model.
        pruned: The pruned one.
        batch: Images per call.
        threads: CPU threads; None: ONNX Runtime's choice.
        runs: Calls of each, apart from warm-up.

    Raises:
        ArtifactError: A file is no export of ampdeploy, or the two take other images.
        ConfigError: A file does not take such a batch.
        AmpDeployError: The profile cannot be read.
    """
    files = (baseline, pruned)
    images = _images(files, batch, threads)
    latency_ms = _latency(files, images, threads=threads, runs=runs)
    with tempfile.TemporaryDirectory(prefix="ampdeploy-explain-") as folder:
        sessions = [
            open_session(file, threads=threads, profile_to=Path(folder) / f"{number}")
            for number, file in enumerate(files)
        ]
        run_pairs(_call(sessions[0], images), _call(sessions[1], images), runs)
        events = [_read_events(Path(session.end_profiling())) for session in sessions]
    models = [
        _profiled(file, found, runs, latency_ms[:, column])
        for column, (file, found) in enumerate(zip(files, events, strict=True))
    ]
    return models[0], models[1]


def latency_pair(
    baseline: Path, pruned: Path, *, batch: int, threads: int | None, runs: int
) -> np.ndarray:
    """(runs, 2) milliseconds of a call without the profiler, at another batch size."""
    files = (baseline, pruned)
    return _latency(files, _images(files, batch, threads), threads=threads, runs=runs)


def is_dynamic(*files: Path) -> bool:
    """Whether all of these ONNX files take batches of any size."""
    return all(
        image_input(open_session(file, optimise=False), file.name).batch is None for file in files
    )


def _latency(
    files: Sequence[Path], images: np.ndarray, *, threads: int | None, runs: int
) -> np.ndarray:
    sessions = [open_session(file, threads=threads) for file in files]
    return run_pairs(_call(sessions[0], images), _call(sessions[1], images), runs)


def _call(session: Any, images: np.ndarray) -> Any:
    return lambda: session.run(None, {IMAGES: images})


def _images(files: Sequence[Path], batch: int, threads: int | None) -> np.ndarray:
    takes = [
        image_input(open_session(file, threads=threads, optimise=False), file.name)
        for file in files
    ]
    if takes[0].size != takes[1].size:
        raise ArtifactError(
            f"{files[1].name} takes images of {takes[1].size} px, {files[0].name} of "
            f"{takes[0].size} px. Compare a model with its own baseline."
        )
    for file, take in zip(files, takes, strict=True):
        if take.batch not in (None, batch):
            raise ConfigError(
                f"{file.name} takes batches of {take.batch} alone, and --batch is {batch}. Give "
                f"--batch {take.batch}."
            )
    shape = (batch, 3, takes[0].size, takes[0].size)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _read_events(path: Path) -> list[dict[str, Any]]:
    try:
        events: list[dict[str, Any]] = json.loads(path.read_text())
    except ValueError as error:
        raise AmpDeployError(
            f"ONNX Runtime's profile cannot be read: {error}. The disk of the temporary folder "
            "may be full; set TMPDIR to another one."
        ) from error
    return events


def split_runs(events: Sequence[dict[str, Any]], runs: int) -> tuple[list[list[Any]], np.ndarray]:
    """Kernel events of each call, in order, and milliseconds of each call (runs,).

    Args:
        events: The profile.
        runs: Calls apart from warm-up.

    Raises:
        AmpDeployError: It holds another number of calls, or they ran different operators.
    """
    calls = [event for event in events if event["name"] == "model_run"]
    calls = sorted(calls, key=lambda event: event["ts"])[WARMUP_PAIRS:]
    kernels = [e for e in events if e["cat"] == "Node" and e["name"].endswith(_SUFFIX)]
    kernels.sort(key=lambda event: event["ts"])
    parts = [
        [k for k in kernels if call["ts"] <= k["ts"] < call["ts"] + call["dur"]] for call in calls
    ]
    names = {tuple(event["name"] for event in part) for part in parts}
    if len(calls) != runs or len(names) != 1 or not parts[0]:
        raise AmpDeployError(
            f"ONNX Runtime's profile holds {len(calls)} calls of {len(names)} different lists of "
            f"operators, and {runs} calls of one list were made. Give fewer --runs: it keeps a "
            "million events."
        )
    return parts, np.array([call["dur"] for call in calls]) / 1e3


def operator_of(event: dict[str, Any]) -> Operator:
    """The operator that a kernel event is about."""
    args = event["args"]
    return Operator(
        name=event["name"].removesuffix(_SUFFIX),
        op_type=args["op_name"],
        inputs=_tensors(args.get("input_type_shape", [])),
        outputs=_tensors(args.get("output_type_shape", [])),
    )


def _tensors(listed: Sequence[dict[str, list[int]]]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(dtype=dtype, shape=tuple(shape)) for one in listed for dtype, shape in one.items()
    )


def _profiled(
    file: Path, events: list[dict[str, Any]], runs: int, latency_ms: np.ndarray
) -> ProfiledModel:
    parts, run_ms = split_runs(events, runs)
    operators = [operator_of(event) for event in parts[0]]
    graph = read_graph(file)
    places = place_all(operators, graph.weights)
    ms = np.array([[event["dur"] for event in part] for part in parts]) / 1e3
    log.debug("%s: %d operators", file.name, len(operators))
    timed = tuple(
        Timed(
            name=operator.name,
            op_type=operator.op_type,
            place=places[operator.name],
            work=work_of(operator),
            ms=ms[:, column],
        )
        for column, operator in enumerate(operators)
    )
    executed = Counter(operator.op_type for operator in operators)
    new = {name: count for name, count in executed.items() if name not in graph.op_types}
    widths, token_width, tokens = mlp_shapes(operators, places)
    return ProfiledModel(
        operators=timed,
        run_ms=run_ms,
        latency_ms=latency_ms,
        fused=new,
        widths=widths,
        token_width=token_width,
        tokens=tokens,
        fused_attention=sum(count for name, count in executed.items() if is_attention(name)),
    )


def mlp_shapes(
    operators: Sequence[Operator], places: dict[str, Place]
) -> tuple[dict[int, int], int, int]:
    """Hidden width of each block's MLP, width of the tokens, and how many there are per call."""
    widths: dict[int, int] = {}
    token_width = tokens = 0
    for operator in operators:
        place = places[operator.name]
        if place.kind == kinds.FC2 and place.block is not None and inner_size(operator):
            out = operator.outputs[0]
            widths[place.block] = inner_size(operator)
            token_width, tokens = out.shape[-1], out.size // out.shape[-1]
    return widths, token_width, tokens


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What an ONNX file says before a runtime rewrites it."""

    op_types: frozenset[str]
    weights: dict[str, list[str]]
    """Node -> weights that it reads."""


def read_graph(file: Path) -> Graph:
    """Operator types of an ONNX file, and the weights that each node names."""
    onnx = require("onnx", needed_by="ampdeploy explain")
    graph = onnx.load(str(file), load_external_data=False).graph
    weights = {weight.name for weight in graph.initializer}
    return Graph(
        op_types=frozenset(node.op_type for node in graph.node),
        weights={node.name: [n for n in node.input if n in weights] for node in graph.node},
    )
