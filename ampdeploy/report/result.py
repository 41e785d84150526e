"""`report.json` as types. Units are in the names; what was not measured is None with a reason.

Markdown and the terminal are views of this; gates and comparisons read it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ampdeploy.artifacts import read_json, write_text
from ampdeploy.errors import ArtifactError
from ampdeploy.report.codec import from_plain, to_plain

SCHEMA_VERSION = 6  # of report.json; raise it when a field changes


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A field that is None must have an entry in `why`, so that no number is missing silently."""

    why: dict[str, str] = field(default_factory=dict)
    """Field -> why it is None."""

    def __post_init__(self) -> None:
        names = [f.name for f in dataclasses.fields(self)]
        silent = [n for n in names if getattr(self, n) is None and n not in self.why]
        if silent:
            raise ValueError(f"{type(self).__name__}: {', '.join(silent)} is null without a why")
        for name, reason in self.why.items():
            if not isinstance(reason, str) or not reason.strip():
                raise ValueError(
                    f"{type(self).__name__}: why {name} is null is {reason!r}, no text"
                )


@dataclass(frozen=True, kw_only=True)
class LatencyStats(Explained):
    """Milliseconds of one call, over all timed calls; nothing is clipped."""

    p50: float
    p90: float
    p99: float | None
    mean: float
    min: float
    max: float
    n: int
    """Timed calls."""
    quantiles: tuple[float, ...]
    """Shortest, 5%, 10%, ... 95%, longest: the distribution, in 21 numbers."""


@dataclass(frozen=True, kw_only=True)
class Interval(Explained):
    """A number with its 95% interval.

    One end alone may be missing, and nothing bounds the number on that side then. With both
    missing there is no interval.
    """

    value: float
    ci95_low: float | None
    ci95_high: float | None

    @property
    def lost(self) -> bool:
        """Whether there is no interval at all."""
        return self.ci95_low is None and self.ci95_high is None

    @property
    def why_open(self) -> str:
        """Why an end is missing; empty: none is."""
        return self.why.get("ci95_low") or self.why.get("ci95_high") or ""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How one batch size was timed by one clock, both models together."""

    clock: str
    """What was timed, in words: clocks of different kinds are never compared."""
    order: str
    loads: int
    """Times that both files were opened anew; the pairs are spread over them."""
    warmup_pairs: int
    warmup_seconds: float
    warmup_stable: bool
    """Whether three successive warm-up windows agreed before the first timed call."""
    pairs: int
    seconds: float
    capped: bool
    """Stopped by the hard time limit before the asked-for number of pairs."""
    buffers: int
    """Different input batches that were rotated."""


@dataclass(frozen=True, kw_only=True)
class ThroughputTiming:
    """How throughput was counted at one batch size: the models take turns, a window each."""

    in_flight: int
    """Batches that were under way at once."""
    loads: int
    """Times that both files were opened anew; the windows are spread over them."""
    windows: int
    """Windows of each model."""
    window_seconds: float
    seconds: float
    """All windows of both."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What one sensor said while latency was measured."""

    min: float
    median: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Telemetry(Explained):
    """The machine while latency was measured. Sensors are read, never set."""

    samples: int
    seconds: float
    power_mode: str | None
    """nvpmodel's mode on a Jetson, the GPU's power limit, or the CPU's frequency governor."""
    clocks_mhz: dict[str, Spread]
    """Clock, e.g. ``cpu``, ``gpu``, ``gpu_memory`` -> what it ran at."""
    temperature_c: dict[str, Spread]
    """Sensor -> degrees Celsius."""
    throttled: tuple[str, ...] | None
    """Reasons for lower clocks that were seen; empty: none was."""
    other_load: float | None
    """Share of the machine's CPU time that other processes took."""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy of one model's runs, the idle power of the machine taken off."""

    batch_size: int
    images: int
    seconds: float
    mean_watts: float
    """While it ran, idle power included."""
    idle_watts: float
    source: str
    """What was read, e.g. ``NVML total energy counter`` or ``INA3221 VDD_IN``."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where the dense model's weights came from."""

    source: str
    sha256: str
    """Of the file they were read from."""
    licence: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images that were used for one purpose."""

    name: str
    """Folder name, not its path."""
    sha256: str
    images: int
    skipped: dict[str, str]
    """Image, relative to the folder -> why it could not be used."""


@dataclass(frozen=True, kw_only=True)
class Data(Explained):
    """The images that calibrated and those that judged."""

    calib: Dataset
    eval: Dataset
    bank: Dataset | None
    """Labelled images that accuracy is judged with: neighbours that vote, a probe's training."""


@dataclass(frozen=True, kw_only=True)
class BlockWidth:
    """Hidden width of one MLP."""

    block: int
    hidden: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """How the model was made smaller."""

    search: str
    """``divergence``, or ``amp`` as published."""
    asked: dict[str, float]
    """The budget, e.g. params_cut, or AMP's threshold, batch_size and inv_temperature."""
    criterion: str
    """What the search bounds or minimises."""
    repair: str
    """What made up for the pruned neurons, as it is in the model: ``refit``, ``least-squares``,
    ``mean-shift`` or ``none``."""
    distill_epochs: int
    widths: tuple[BlockWidth, ...]


@dataclass(frozen=True, kw_only=True)
class Measured(Explained):
    """One model. Batch sizes are string keys, as JSON wants them."""

    params: int
    flops: int
    """2 * multiply-accumulates of one image."""
    file_bytes: int
    latency_ms: dict[str, LatencyStats] | None
    """End to end: host memory to host memory, one call at a time."""
    compute_ms: dict[str, LatencyStats] | None
    """The device's part of it: CUDA events around the engine; on a CPU the runtime's own call."""
    cuda_graph_compute_ms: dict[str, LatencyStats] | None
    """As `compute_ms`, launched as one CUDA graph."""
    throughput_img_s: dict[str, float] | None
    """Images per second with several batches in flight."""
    memory_bytes: int | None
    """Peak minus what the process had after importing the runtime, in a fresh process; on a GPU
    with memory of its own, what it took of that."""
    weight_bytes: int | None
    """Of the file's tensors, as stored."""
    activation_bytes: int | None
    """Working memory beyond the loaded model: of the engine's context, or of the runtime."""
    peak_rss_bytes: int | None
    memory_batch_size: int | None
    """Images per call while memory was measured."""
    energy_j_per_image: float | None
    """Idle power taken off."""
    energy: Energy | None
    accuracy: dict[str, float] | None
    """Metric -> value in [0, 1]."""


# The smallest cosine has none: nothing seen bounds the worst image that was not seen, and
# resampling never draws one below it.
INTERVAL_FIELDS = (
    "cosine_mean",
    "cosine_p1",
    "patch_cosine_mean",
    "patch_cosine_p1",
    "knn_agreement",
)


@dataclass(frozen=True, kw_only=True)
class Fidelity(Explained):
    """Pruned against dense on the same images; see `ampdeploy.bench.accuracy`."""

    images: int
    cosine_mean: float
    cosine_p1: float
    cosine_min: float
    patch_cosine_mean: float | None
    patch_cosine_p1: float | None
    knn_agreement: float | None
    knn_k: int
    intervals: dict[str, Interval]
    """Field of this -> what other images of the same kind would give: all but the smallest cosine,
    and what is null; see `ampdeploy.bench.fidelity_intervals`."""

    def interval(self, name: str) -> Interval | None:
        """A field of `INTERVAL_FIELDS` with its interval; None: it was not measured."""
        value: float | None = getattr(self, name)
        if value is None:
            return None
        found = self.intervals.get(name)
        if found is None:
            why = dict.fromkeys(("ci95_low", "ci95_high"), "the report has none for it")
            return Interval(value=value, ci95_low=None, ci95_high=None, why=why)
        # The field is the number, also in a file where the two do not agree.
        return dataclasses.replace(found, value=value)


@dataclass(frozen=True, kw_only=True)
class Task(Explained):
    """How one metric of accuracy came about."""

    protocol: str
    """In words, with its constants and source."""
    images: int
    bank_images: int | None
    """Images of the bank; None: each image is judged by the others, or no bank is needed."""
    classes: int | None
    chance: float | None
    """What guessing gives."""


@dataclass(frozen=True, kw_only=True)
class Ratios(Explained):
    """Pruned / baseline; below 1 is smaller or faster."""

    params: float
    flops: float
    file_bytes: float
    memory: float | None
    latency: dict[str, Interval] | None
    """Per batch size: ratio of median latencies, end to end; the geometric mean over the loads."""
    compute: dict[str, Interval] | None
    """As `latency`, of `compute_ms`."""
    cuda_graph_compute: dict[str, Interval] | None
    throughput: dict[str, Interval] | None
    """Per batch size; above 1 is more images per second."""
    energy: float | None
    accuracy_difference: dict[str, Interval] | None
    """Metric -> pruned minus baseline."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """An exported artifact against PyTorch on real images."""

    artifact: str
    """File name."""
    runtime: str
    batch_sizes: tuple[int, ...]
    images: int
    max_abs_diff: dict[str, float]
    """Output -> largest difference of any element, over all batch sizes."""
    min_cosine: dict[str, float]
    """Output -> smallest cosine of any vector."""


@dataclass(frozen=True, kw_only=True)
class PrecisionProof:
    """How the FP16 graph was checked: real FP16 arithmetic against PyTorch in float32."""

    bar_cosine_p1: float
    images: int
    """Images that judged it; others set the ranges."""
    nodes_fp32: int
    """Nodes that a rule or the repair keeps in FP32."""
    nodes_scaled: int
    """Products in FP16 whose input is scaled down around them."""
    islands: dict[str, tuple[str, ...]]
    """Block -> kinds of nodes that the repair moved to FP32."""
    cosine_p1: dict[str, float]
    """Output -> 1st percentile of the cosine of its vectors to PyTorch's."""
    cosine_min: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class EngineTest:
    """The engine itself against its float32 graph, on real images."""

    bar_cosine_p1: float
    images: int
    reference: str
    """What computed the expected outputs."""
    cosine_p1: dict[str, dict[str, float]]
    """Batch size -> output -> 1st percentile of the cosine of its vectors to the reference."""
    cosine_min: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class EngineFacts(Explained):
    """The engine that was built; all of it is in engine.json."""

    tensorrt: str
    """Flavour and build, e.g. ``trt-rtx 1.7.1.116``."""
    compute_capabilities: tuple[str, ...]
    batch: tuple[int, ...]
    """Smallest, usual and largest."""
    half_share: float
    """Share of the weights of matrix products that are multiplied in FP16."""
    sha256: str
    test: EngineTest | None
    """None with a why: no machine that runs it has built it."""


@dataclass(frozen=True, kw_only=True)
class Report(Explained):
    """Everything `report.json` holds."""

    schema_version: int = SCHEMA_VERSION
    tool_version: str
    model: str
    target: str
    image_size: int
    """Side of the square input, pixels."""
    threads: int | None
    """CPU threads of the runtime that was timed; None with a why: the runtime's default."""
    device: str | None
    """Where both models were timed: ``cpu`` or ``cuda``."""
    judged_on: str
    """The target that fidelity and accuracy were computed with."""
    precision: dict[str, PrecisionProof] | None
    """"baseline" and "pruned"."""
    engine: dict[str, EngineFacts] | None
    """"baseline" and "pruned"."""
    host: dict[str, Any]
    """The machine that was measured; see `ampdeploy.bench.host.host_facts`."""
    weights: Weights
    data: Data
    method: Method
    baseline: Measured
    pruned: Measured
    fidelity: Fidelity | None
    ratio: Ratios
    tasks: dict[str, Task] | None
    """Metric of `accuracy` -> what it is."""
    tasks_left_out: dict[str, str]
    """Task that was asked for -> why it gave no metric."""
    timing: dict[str, Timing] | None
    """Per batch size, of `latency_ms` and `compute_ms`, which are parts of the same calls."""
    cuda_graph_timing: dict[str, Timing] | None
    throughput_timing: dict[str, ThroughputTiming] | None
    telemetry: Telemetry | None
    not_timed: dict[str, str]
    """Batch size that was asked for -> why the engine does not take it."""
    verification: tuple[Verification, ...] | None
    stages_seconds: dict[str, float]

    def to_json(self) -> str:
        """The text of report.json."""
        return json.dumps(to_plain(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "report.json") -> Report:
        """Parse and check the text of a report.json.

        Raises:
            ArtifactError: Not JSON, another schema version, a key missing or of another type.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ArtifactError(
                f"{where} is damaged: {error}. Run the command that wrote it again."
            ) from error
        return cls._from_data(data, where)

    @classmethod
    def read(cls, path: Path) -> Report:
        """`from_json` of a file.

        Raises:
            ArtifactError: As `from_json`, or the file is missing.
        """
        return cls._from_data(read_json(path), path.name)

    @classmethod
    def _from_data(cls, data: Any, where: str) -> Report:
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{where} has schema version {version!r}; this ampdeploy reads {SCHEMA_VERSION}. "
                "Read it with the version that wrote it, or build it again."
            )
        return from_plain(cls, data, where=where)

    def write(self, path: Path) -> None:
        """Write report.json atomically."""
        write_text(path, self.to_json())


def unmeasured(value: Any, where: str = "") -> list[tuple[str, str]]:
    """Every (field path, reason) in a report that is null, for people to read."""
    found: list[tuple[str, str]] = []
    if isinstance(value, dict):
        for key, item in value.items():
            found += unmeasured(item, f"{where}[{key}]")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            found += unmeasured(item, f"{where}[{index}]")
    elif dataclasses.is_dataclass(value):
        prefix = f"{where}." if where else ""
        reasons = getattr(value, "why", {})
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            if f.name == "why":
                continue
            if item is None:
                found.append((prefix + f.name, reasons[f.name]))
            else:
                found += unmeasured(item, prefix + f.name)
    return found
