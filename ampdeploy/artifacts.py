"""Names of everything on disk, the manifest, hashing, and writes that never leave half a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ampdeploy.disk import file_limit, free_near, megabytes
from ampdeploy.errors import AmpDeployError, ArtifactError

SCHEMA_VERSION = 1

MANIFEST = "manifest.json"
BASELINE = "baseline.safetensors"  # the unpruned model, as loaded
MOMENTS = "moments.safetensors"  # how the hidden neurons go together, for search and repair
SCORES = "scores.safetensors"
WIDTHS = "widths.json"
REPAIR = "repair.json"  # what the fold and the re-fit did, on images that they did not see
SLIM = "slim.safetensors"
DISTILLED = "distilled.safetensors"
DISTILL = "distill.json"  # loss, rate and weight decay of every step
DISTILL_STATE = "distill.state.pt"  # trainer state while distillation is under way
MODEL_ONNX = "model.onnx"
BASELINE_ONNX = "baseline.onnx"
EXPORT = "export.json"  # numerical verification of both ONNX files
MODEL_FP16_ONNX = "model.fp16.onnx"  # strongly typed: every tensor says its precision
BASELINE_FP16_ONNX = "baseline.fp16.onnx"
PRECISION = "precision.json"  # every node that is not FP16, why, and the proof that it is right
ENGINE_PLAN = "engine.plan"
ENGINE_JSON = "engine.json"
BASELINE_PLAN = "baseline.plan"
BASELINE_ENGINE_JSON = "baseline.json"
EVAL = "eval.json"
BENCH = "bench.json"
REPORT_JSON = "report.json"
REPORT_MD = "report.md"
REPORT_HTML = "report.html"
REPORT_VIEWS = (REPORT_MD, REPORT_HTML)  # of report.json: written anew at any time

# No space, quota used up: the two ways a disk says it is full.
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def explain_os_errors(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into an error that a user can act on.

    Args:
        path: What is written.
        needed: Its bytes, where that is known.

    Raises:
        AmpDeployError: Disk full, file too large, permission denied, read-only or vanished folder.
    """
    try:
        yield
    except OSError as error:
        size = "" if needed is None else f"It takes {megabytes(needed)}. "
        if error.errno in _DISK_FULL:
            raise AmpDeployError(
                f"cannot write {path}: the disk is full ({error.strerror}{free_near(path)}). "
                f"{size}Nothing was left half-written; free some space, or choose another --out, "
                "and run it again."
            ) from error
        if error.errno == errno.EFBIG:
            raise AmpDeployError(
                f"cannot write {path}: a file may not be as large as that here{file_limit()}. "
                f"{size}Nothing was left half-written; raise the limit (`ulimit -f`), or choose an "
                "--out on a file system that takes larger files, and run it again."
            ) from error
        reason = error.strerror or str(error)
        raise AmpDeployError(
            f"cannot write {path}: {reason}. Check the folder's permissions or choose another "
            "--out."
        ) from error


@contextlib.contextmanager
def atomic_path(path: Path, *, needed: int | None = None) -> Iterator[Path]:
    """A temporary path in `path`'s folder, renamed to `path` when the block ends without error.

    A crash, Ctrl-C or a full disk leaves the old file, or no file, but never half of one.

    Args:
        path: The file to be.
        needed: Its bytes, where that is known.

    Raises:
        AmpDeployError: The folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explain_os_errors(path, needed=needed):
        try:
            yield temporary
            # Some libraries create private files; others must be able to read a model.
            temporary.chmod(0o666 & ~_umask())
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it but to set it
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    data = text.encode()
    with atomic_path(path, needed=len(data)) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, data: Any) -> None:
    """Write `data` to `path` atomically. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse `path`.

    Raises:
        ArtifactError: It is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist. Is this the folder of a run?") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ArtifactError(
            f"{path} is not JSON, or is damaged: {error}. Check that it is the file you mean; if "
            "ampdeploy wrote it, run the command that wrote it again."
        ) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(data: Any) -> str:
    """SHA-256 of plain data, independent of key order."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(kw_only=True)
class StageRecord:
    """What the manifest keeps of one finished stage."""

    fingerprint: str
    """Hash of the stage's options, its inputs' hashes and the versions that matter."""
    options: dict[str, Any]
    inputs: dict[str, str]
    """Name -> sha256 of artifacts, or of the facts of the stages it follows."""
    outputs: dict[str, str]
    versions: dict[str, str]
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    """What the stage found out and later stages or readers need."""


class Manifest:
    """`manifest.json` of a run directory, saved after every stage."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data

    @classmethod
    def create(cls, folder: Path, *, model: str, tool_version: str) -> Manifest:
        """A manifest with no stages; nothing is written yet."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "tool": "ampdeploy",
            "tool_version": tool_version,
            "model": model,
            "weights": None,
            "stages": {},
        }
        return cls(folder / MANIFEST, data)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a run directory.

        Raises:
            ArtifactError: There is none, it is damaged, or a newer version wrote it.
        """
        path = folder / MANIFEST
        try:
            exists = path.exists()
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror}.") from error
        if not exists:
            raise ArtifactError(
                f"{folder} holds no {MANIFEST}, so it is not a run of ampdeploy. "
                "Give the --out folder of a build."
            )
        data = read_json(path)
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path} has schema version {version!r}; this ampdeploy reads {SCHEMA_VERSION}. "
                "Rebuild the run with this version, or read it with the one that wrote it."
            )
        return cls(path, data)

    @property
    def model(self) -> str:
        """The model's name as the user gave it."""
        return str(self.data["model"])

    def stage(self, name: str) -> StageRecord | None:
        """The record of a finished stage."""
        record = self.data["stages"].get(name)
        return StageRecord(**record) if record else None

    def facts(self, name: str) -> dict[str, Any]:
        """The facts of a finished stage.

        Raises:
            ArtifactError: The stage has not been run in this folder.
        """
        record = self.stage(name)
        if record is None:
            raise ArtifactError(
                f"{self.path.parent} has no finished stage {name!r}. Run `ampdeploy build` (or "
                f"`ampdeploy prune`) on it first."
            )
        return record.facts

    def put(self, name: str, record: StageRecord) -> None:
        """Store a stage's record; `save` writes it."""
        self.data["stages"][name] = vars(record)

    def save(self) -> None:
        """Write the manifest atomically."""
        write_json(self.path, self.data)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run directory: two builds into one folder would overwrite each other.

    Raises:
        AmpDeployError: Another process holds it.
    """
    import fcntl

    with explain_os_errors(folder / ".lock"):
        handle = open(folder / ".lock", "w")  # noqa: SIM115 - closed below, after the yield
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AmpDeployError(
                f"another ampdeploy is at work in {folder}. Wait for it, or choose another --out."
            ) from error
        yield
    finally:
        handle.close()  # releases the lock; the kernel does the same if we are killed


def prepare_folder(folder: Path) -> None:
    """Create a run directory and prove that it can be written.

    Raises:
        AmpDeployError: It cannot be made or written.
    """
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def remove_stale_temporaries(folder: Path) -> None:
    """Delete what a killed process left behind; call it only while holding `run_lock`."""
    for stale in folder.glob(".*.tmp"):
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale, ignore_errors=True)
            continue
        with contextlib.suppress(OSError):
            stale.unlink()


@contextlib.contextmanager
def scratch_folder(near: Path) -> Iterator[Path]:
    """A folder beside `near` for as long as the block runs: there is room for files of its size.

    Raises:
        AmpDeployError: It cannot be made.
    """
    with explain_os_errors(near.parent):
        folder = Path(tempfile.mkdtemp(prefix=".scratch-", suffix=".tmp", dir=near.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


Writer = Callable[[Path], None]


def write_with(path: Path, writer: Writer, *, needed: int | None = None) -> None:
    """Let `writer` fill a temporary file, of `needed` bytes if known, that then becomes `path`."""
    with atomic_path(path, needed=needed) as temporary:
        writer(temporary)
