"""The bundle: everything that a device needs to build an engine and to prove it, and its check.

A folder, or a tar of it (`archive.py`). `bundle.json` says what every file is, with size and
SHA-256; `bundle.json.sha256` says the same of `bundle.json`, in the form of ``sha256sum``. That
finds damage and mix-ups. It is no signature: who can replace all files can replace these two, so
over a channel that is not trusted compare the checksum that `ampdeploy bundle` prints.

Nothing here imports more than numpy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import ampdeploy
from ampdeploy.artifacts import sha256_file, write_json, write_text
from ampdeploy.config import ENGINE_TARGETS, PRECISIONS, EngineConfig
from ampdeploy.errors import ArtifactError, ConfigError
from ampdeploy.report.codec import from_plain, to_plain

if TYPE_CHECKING:
    from ampdeploy.device.platform import DeviceFacts

BUNDLE_SCHEMA_VERSION = 1

BUNDLE_JSON = "bundle.json"
CHECKSUM = "bundle.json.sha256"
README = "README.md"
GOLDENS = "goldens.npz"
BANK = "bank.npz"
HEAD = (BUNDLE_JSON, CHECKSUM)

# Names of a few files and numbers: more than this is no bundle.json.
MAX_HEAD_BYTES = 1 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AGAIN = "Copy the bundle again, or pack it again with `ampdeploy bundle`."


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class BundleManifest:
    """The content of `bundle.json`."""

    schema_version: int = BUNDLE_SCHEMA_VERSION
    tool_version: str
    model: str
    image_size: int
    preprocessing: dict[str, Any]
    """How the images of the model are prepared: the fields of `ModelSpec` that say so."""
    target: str
    """What the run was built for; another one can be chosen on the device."""
    precision: str
    """Of both graphs, ``fp16`` or ``fp32``."""
    onnx: str
    """The graph that the engine is built from."""
    baseline_onnx: str
    """The unpruned model in the same precision, to compare with."""
    verdict: dict[str, Any]
    """Role -> how its graph was verified where it was built."""
    patterns: tuple[str, ...]
    """What known TensorRT bugs depend on, by `radar.graph_patterns`: a device has no onnx."""
    engine: EngineConfig
    min_cosine_p1: float
    """What the engine's outputs must reach against the golden ones, per vector."""
    golden_images: int
    bank_images: int
    """Labelled images in the feature bank; 0: the run's images have no labels, so there is none."""
    files: dict[str, FileFacts]
    """Every file but `bundle.json` and its checksum."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle in a folder, its `bundle.json` read and in agreement with its checksum."""

    folder: Path
    manifest: BundleManifest
    sha256: str
    """Of `bundle.json`: it identifies the bundle."""

    def path(self, name: str) -> Path:
        """Where one of its files lies."""
        return self.folder / name

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of one of its ``.npz`` files.

        Raises:
            ArtifactError: It is no such file.
        """
        try:
            with np.load(self.path(name), allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ArtifactError(f"{self.path(name)} holds no arrays: {error}. {_AGAIN}") from error


def seal(folder: Path, **facts: Any) -> Bundle:
    """Write `bundle.json` and its checksum for the files in `folder`.

    Args:
        folder: Holds all other files of the bundle, and nothing else.
        facts: Fields of `BundleManifest` but versions and files.

    Raises:
        AmpDeployError: The folder cannot be written.
        ArtifactError: The device would refuse it: a name that no bundle has, or facts that do not
            fit together.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.name not in HEAD)
    files = {
        name: FileFacts(bytes=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
        for name in names
    }
    manifest = BundleManifest(tool_version=ampdeploy.__version__, files=files, **facts)
    write_json(folder / BUNDLE_JSON, to_plain(manifest))
    digest = sha256_file(folder / BUNDLE_JSON)
    write_text(folder / CHECKSUM, checksum_text(digest))
    return read_bundle(folder)


def checksum_text(digest: str) -> str:
    """The content of `bundle.json.sha256`, as ``sha256sum --check`` reads it."""
    return f"{digest}  {BUNDLE_JSON}\n"


def read_bundle(folder: Path) -> Bundle:
    """The head of the bundle in `folder`. Its other files are not looked at: see `check_files`.

    Raises:
        ArtifactError: There is no bundle, its head is damaged, or a newer ampdeploy wrote it.
    """
    head = {}
    for name in HEAD:
        path = folder / name
        if not stat.S_ISREG(_mode(path)):
            raise ArtifactError(f"{path} is missing or no plain file. {_AGAIN}")
        try:
            if path.stat().st_size > MAX_HEAD_BYTES:
                raise ArtifactError(
                    f"{path} has {path.stat().st_size} bytes, more than any. {_AGAIN}"
                )
            head[name] = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror}.") from error
    manifest = parse_head(head, where=folder)
    digest = hashlib.sha256(head[BUNDLE_JSON]).hexdigest()
    return Bundle(folder=folder, manifest=manifest, sha256=digest)


def parse_head(head: dict[str, bytes], *, where: Path) -> BundleManifest:
    """The manifest in the two files of `HEAD`, wherever they come from.

    Args:
        head: Their names and contents.
        where: The bundle, for messages.

    Raises:
        ArtifactError: They do not agree, are damaged, or of a newer ampdeploy.
    """
    digest = hashlib.sha256(head[BUNDLE_JSON]).hexdigest()
    if head[CHECKSUM] != checksum_text(digest).encode():
        raise ArtifactError(
            f"{where}: {BUNDLE_JSON} has sha256 {digest}, and {CHECKSUM} does not say so: one of "
            f"the two was changed or damaged. {_AGAIN}"
        )
    try:
        data = json.loads(head[BUNDLE_JSON])
    except ValueError as error:
        raise ArtifactError(f"{where}: {BUNDLE_JSON} is not JSON: {error}. {_AGAIN}") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != BUNDLE_SCHEMA_VERSION:
        raise ArtifactError(
            f"{where}: {BUNDLE_JSON} has schema version {version!r}; this ampdeploy "
            f"({ampdeploy.__version__}) reads {BUNDLE_SCHEMA_VERSION}. Install the version that "
            "packed it, or pack it again with this one."
        )
    try:
        manifest = from_plain(BundleManifest, data, where=f"{where}: {BUNDLE_JSON}")
    except ConfigError as error:
        raise ArtifactError(f"{where}: {BUNDLE_JSON} asks for what is not: {error}") from error
    problems = _inconsistent(manifest)
    if problems:
        raise ArtifactError(f"{where}: {BUNDLE_JSON} {'; '.join(problems)}. {_AGAIN}")
    return manifest


def _inconsistent(manifest: BundleManifest) -> list[str]:
    problems = []
    for name, facts in manifest.files.items():
        # A name is a file in this folder and nothing else: no slash, no dots in front, no option.
        if not _NAME.fullmatch(name) or name in HEAD:
            problems.append(f"lists the file {name!r}, which no bundle has")
        if facts.bytes < 0 or not _SHA256.fullmatch(facts.sha256):
            problems.append(f"says nothing sensible about {name!r}")
    for name in (manifest.onnx, manifest.baseline_onnx, GOLDENS):
        if name not in manifest.files:
            problems.append(f"does not list {name!r}")
    if manifest.precision not in PRECISIONS:
        problems.append(f"has precision {manifest.precision!r}")
    if not 0 < manifest.min_cosine_p1 <= 1:
        problems.append(f"has a bar of {manifest.min_cosine_p1}")
    if manifest.golden_images < 1 or manifest.image_size < 1:
        problems.append("has no golden images")
    return problems


def check_files(bundle: Bundle, here: DeviceFacts, *, called: Path | None = None) -> None:
    """Make sure that every file is there, whole and unchanged, and that there is no other.

    Args:
        bundle: In its folder.
        here: This machine.
        called: What the user knows it as, if not by its folder.

    Raises:
        ArtifactError: Names every file that is not as `bundle.json` says. An engine among files
            that do not belong there is compared with this machine, and the mismatch named.
    """
    files = bundle.manifest.files
    extra = sorted(set(_entries(bundle.folder)) - {*files, *HEAD})
    _refuse_engines(bundle, extra, here)
    problems = [f"{name}: not part of the bundle" for name in extra]
    for name, facts in files.items():
        problem = _problem(bundle.path(name), facts)
        if problem:
            problems.append(f"{name}: {problem}")
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ArtifactError(
            f"{called or bundle.folder} is not the bundle that was packed, and nothing was built "
            "from it:\n"
            f"{listed}\n{_AGAIN}"
        )


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise ArtifactError(f"cannot read {folder}: {error.strerror}.") from error


def _mode(path: Path) -> int:
    """Type of what is at `path`, links not followed; 0 where there is nothing."""
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def _problem(path: Path, facts: FileFacts) -> str | None:
    mode = _mode(path)
    if not mode:
        return "missing"
    if not stat.S_ISREG(mode):
        return "not a plain file"
    try:
        size = path.stat().st_size
        if size < facts.bytes:
            return f"cut short, {size} bytes of {facts.bytes}"
        if size > facts.bytes:
            return f"{size} bytes instead of {facts.bytes}"
        return None if sha256_file(path) == facts.sha256 else "changed, another sha256"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _refuse_engines(bundle: Bundle, extra: list[str], here: DeviceFacts) -> None:
    """Somebody put an engine into the bundle: say whether it could run here at all."""
    from ampdeploy.device.engine.manifest import check_fits, manifest_path, read_manifest

    for name in extra:
        plan = bundle.path(name)
        if plan.suffix not in (".plan", ".engine") or not manifest_path(plan).is_file():
            continue
        manifest = read_manifest(plan)
        target = bundle.manifest.target
        wanted = target if target in ENGINE_TARGETS else manifest.target
        check_fits(manifest, here, manifest.tensorrt_version, wanted)
