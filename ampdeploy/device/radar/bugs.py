"""Known TensorRT bugs: which concern a build, and what is done about them.

`known_bugs.json` holds one entry per bug: TensorRT versions x GPUs x graph patterns -> symptom,
workaround, link, and what the thread behind the link says. A range runs from the first version
reported wrong up to, not including, the first one reported right.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ampdeploy.config import EngineConfig
from ampdeploy.device.radar.graph_patterns import PATTERNS
from ampdeploy.device.radar.graph_patterns import graph_patterns as graph_patterns
from ampdeploy.errors import ArtifactError, VerificationError
from ampdeploy.report.codec import from_plain

SCHEMA_VERSION = 1
DATA_FILE = "known_bugs.json"
TARGETS = ("trt", "trt-rtx")


@dataclass(frozen=True, kw_only=True)
class Bug:
    """One entry of `known_bugs.json`."""

    id: str
    targets: tuple[str, ...]
    tensorrt_from: str | None
    """First version with the bug; None: since ever."""
    tensorrt_below: str | None
    """First version without it; None: no version is known to be right."""
    compute_capabilities: tuple[str, ...]
    """GPUs it shows on, e.g. ``8.7``; empty: any."""
    patterns: tuple[str, ...]
    """What the graph must have, all of them: names of `graph_patterns.PATTERNS`."""
    symptom: str
    workaround: str
    applies: str
    """A name of `WORKAROUNDS`."""
    link: str
    more_links: tuple[str, ...]
    verified: str
    """What the threads behind the links say, and what they do not."""
    certain: bool = True
    """Not in the file: False where TensorRT's version or the GPU is not known yet."""

    @property
    def versions(self) -> str:
        """``10.3 to before 10.5`` or ``all versions``, for people."""
        if self.tensorrt_from and self.tensorrt_below:
            return f"{self.tensorrt_from} to before {self.tensorrt_below}"
        if self.tensorrt_below:
            return f"before {self.tensorrt_below}"
        return f"{self.tensorrt_from} and newer" if self.tensorrt_from else "all versions"

    @property
    def gpus(self) -> str:
        """``SM 11.0``, or ``any GPU``."""
        if not self.compute_capabilities:
            return "any GPU"
        return "SM " + ", ".join(self.compute_capabilities)


@dataclass(frozen=True, kw_only=True)
class BugTable:
    """`known_bugs.json`, read."""

    schema_version: int
    data_version: int
    """Counts up with every change of the entries."""
    bugs: tuple[Bug, ...]


@functools.cache
def bug_table() -> BugTable:
    """The entries that come with this version of ampdeploy.

    Raises:
        ValueError: The shipped file is not as it should be: our bug, not the user's.
    """
    text = (
        importlib.resources.files("ampdeploy.device.radar").joinpath(DATA_FILE).read_text("utf-8")
    )
    return read_table(text)


def read_table(text: str) -> BugTable:
    """Parse and check the text of a bug table.

    Raises:
        ValueError: Another schema, a missing or unknown key, an unknown target, pattern or
            workaround, a version that is none, or two entries with one id.
    """
    data = json.loads(text)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{DATA_FILE} has schema version {version!r}, not {SCHEMA_VERSION}")
    try:
        entries = [{**entry, "certain": True} for entry in data["bugs"]]
        table = from_plain(BugTable, {**data, "bugs": entries}, where=DATA_FILE)
    except (ArtifactError, KeyError, TypeError) as error:
        raise ValueError(f"{DATA_FILE} is damaged: {error}") from error
    problems = [f"{bug.id}: {problem}" for bug in table.bugs for problem in _problems(bug)]
    ids = [bug.id for bug in table.bugs]
    problems += [f"{name}: the id is used twice" for name in {*ids} if ids.count(name) > 1]
    if problems:
        raise ValueError(f"{DATA_FILE} is not consistent: {'; '.join(problems)}")
    return table


def _problems(bug: Bug) -> Iterable[str]:
    for what, values, known in (
        ("target", bug.targets, TARGETS),
        ("pattern", bug.patterns, PATTERNS),
        ("workaround", (bug.applies,), WORKAROUNDS),
    ):
        for value in values:
            if value not in known:
                yield f"unknown {what} {value!r}"
    if not bug.targets or not bug.patterns:
        yield "it needs a target and a pattern"
    ends = [end for end in (bug.tensorrt_from, bug.tensorrt_below) if end is not None]
    numbers = [_numbers(end) for end in ends]
    if None in numbers:
        yield f"{' and '.join(ends)} are no versions"
    elif len(ends) == 2 and not numbers[0] < numbers[1]:  # type: ignore[operator]
        yield f"the range {bug.versions} is empty"
    for capability in bug.compute_capabilities:
        if not re.fullmatch(r"\d+\.\d", capability):
            yield f"{capability!r} is no compute capability"
    for text in (bug.symptom, bug.workaround, bug.verified):
        if not text.strip():
            yield "a text is empty"
    for link in (bug.link, *bug.more_links):
        if not link.startswith("https://"):
            yield f"{link!r} is no link"


def _numbers(version: str) -> tuple[int, ...] | None:
    """(10, 13, 3, 9) of ``10.13.3.9``; None where it does not begin with a number."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else None


def find_bugs(
    *,
    tensorrt_version: str | None,
    target: str,
    compute_capability: str | None,
    patterns: set[str],
) -> list[Bug]:
    """The known bugs that a build meets.

    Args:
        tensorrt_version: Of TensorRT, or of TensorRT for RTX; None: not known yet.
        target: ``trt`` or ``trt-rtx``.
        compute_capability: Of the GPU, e.g. ``8.7``; None: not known yet.
        patterns: What the graph has, by `graph_patterns`.

    Returns:
        In the order of the file. Where what is not known decides, ``certain`` is False.
    """
    found = []
    for bug in bug_table().bugs:
        if target not in bug.targets or not patterns.issuperset(bug.patterns):
            continue
        answers = (_in_range(bug, tensorrt_version), _on_gpu(bug, compute_capability))
        if False not in answers:
            found.append(dataclasses.replace(bug, certain=None not in answers))
    return found


def _in_range(bug: Bug, version: str | None) -> bool | None:
    """Whether `version` has the bug; None where that is not known."""
    if bug.tensorrt_from is None and bug.tensorrt_below is None:
        return True
    numbers = _numbers(version) if version else None
    if numbers is None:
        return None
    first = _numbers(bug.tensorrt_from) if bug.tensorrt_from else None
    right = _numbers(bug.tensorrt_below) if bug.tensorrt_below else None
    return (first is None or first <= numbers) and (right is None or numbers < right)


def _on_gpu(bug: Bug, capability: str | None) -> bool | None:
    """Whether that GPU shows the bug; None where that is not known."""
    if not bug.compute_capabilities:
        return True
    return None if capability is None else capability in bug.compute_capabilities


# A workaround's answer: the config as it is or as changed, and what to say, if anything.
_Answer = tuple[EngineConfig, str | None]


def _advise(config: EngineConfig, bug: Bug) -> _Answer:
    return config, f"Known bug {bug.id}: {bug.symptom}. Advice: {bug.workaround}. See {bug.link}"


def _advise_at_batch_1(config: EngineConfig, bug: Bug) -> _Answer:
    return _advise(config, bug) if config.batch[2] == 1 else (config, None)


def _static_batch(config: EngineConfig, bug: Bug) -> _Answer:
    usual = config.batch[1]
    return _with_batch(config, (usual, usual, usual), bug)


def _min_max_batch_2(config: EngineConfig, bug: Bug) -> _Answer:
    smallest, usual, largest = config.batch
    return _with_batch(config, (smallest, usual, max(largest, 2)), bug)


def _with_batch(config: EngineConfig, batch: tuple[int, ...], bug: Bug) -> _Answer:
    if batch == config.batch:
        return config, None
    before, after = (",".join(map(str, sizes)) for sizes in (config.batch, batch))
    return dataclasses.replace(config, batch=batch), (
        f"Batch {before} became {after} because of known bug {bug.id}: {bug.symptom}. "
        f"See {bug.link}"
    )


def _refuse(config: EngineConfig, bug: Bug) -> _Answer:
    raise VerificationError(
        f"known bug {bug.id} of TensorRT ({bug.versions}; {bug.gpus}): {bug.symptom}. "
        f"What to do: {bug.workaround}. See {bug.link}"
    )


def _refuse_batched(config: EngineConfig, bug: Bug) -> _Answer:
    return (config, None) if config.batch[2] == 1 else _refuse(config, bug)


# What `applies` may say. Refusals are first: there is nothing to change in a build that stops.
WORKAROUNDS: dict[str, Callable[[EngineConfig, Bug], _Answer]] = {
    "refuse": _refuse,
    "refuse-batched": _refuse_batched,
    "static-batch": _static_batch,
    "min-max-batch-2": _min_max_batch_2,
    "advise-at-batch-1": _advise_at_batch_1,
    "advise": _advise,
}


def apply_workarounds(config: EngineConfig, bugs: Iterable[Bug]) -> tuple[EngineConfig, list[str]]:
    """Change what avoids the bugs that are certain; say what may be met.

    Args:
        config: What was asked for.
        bugs: From `find_bugs`.

    Returns:
        The config to build with, and one sentence for each change and each piece of advice.

    Raises:
        VerificationError: A bug makes the engine wrong and nothing is known to avoid it. All such
            bugs are named, each with its link.
    """
    order = list(WORKAROUNDS)
    notes: list[str] = []
    refusals: list[VerificationError] = []
    for bug in sorted(bugs, key=lambda bug: order.index(bug.applies)):
        if not bug.certain:
            # Nothing is changed or refused on a guess; the machine that builds will know.
            notes.append(
                f"Known bug {bug.id} may be met ({bug.versions}; {bug.gpus}): {bug.symptom}. "
                f"Way out: {bug.workaround}. See {bug.link}"
            )
            continue
        try:
            config, note = WORKAROUNDS[bug.applies](config, bug)
        except VerificationError as error:
            refusals.append(error)
            continue
        if note:
            notes.append(note)
    if refusals:
        listed = "\n".join(f"  - {error}" for error in refusals)
        raise VerificationError(f"no engine is built, because it would be wrong:\n{listed}")
    return config, notes
