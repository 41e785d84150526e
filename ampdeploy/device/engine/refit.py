"""Plans without weights: the ONNX file that completes one, and putting its weights into the engine.

Such a plan is a fraction of the size, and several share one weight file. It stays as it is on disk:
each time that it is opened, the engine gets its weights in memory, from the very file it was built
from, which lies beside the plan.

Not run on a GPU: TensorRT must deserialise the plan for it. Tried here is all that comes before,
and the rest against recording stand-ins of TensorRT's module.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/refitting-engines.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ampdeploy.artifacts import sha256_file
from ampdeploy.device.engine.log import TrtLogger
from ampdeploy.device.engine.manifest import EngineManifest, manifest_path
from ampdeploy.errors import AmpDeployError, ArtifactError
from ampdeploy.export.names import data_path


def data_sha256(onnx: Path) -> str | None:
    """SHA-256 of the ``.data`` file of `onnx`; None: it has none."""
    data = data_path(onnx)
    return sha256_file(data) if data.is_file() else None


def weights_file(plan: Path, manifest: EngineManifest) -> Path | None:
    """The ONNX file that holds the weights of `plan`; None: the plan has them.

    Raises:
        ArtifactError: The manifest names a file of another folder.
    """
    if not manifest.stripped:
        return None
    if manifest.onnx in ("", "..") or Path(manifest.onnx).name != manifest.onnx:
        raise ArtifactError(
            f"{manifest_path(plan)} names {manifest.onnx!r} as the ONNX file; it must be a file "
            "beside the plan. Build the engine again."
        )
    return plan.with_name(manifest.onnx)


def check_weights(plan: Path, manifest: EngineManifest) -> None:
    """Make sure that a plan without weights has the right ones beside it.

    Other weights would be taken, and give wrong results unnoticed: NVIDIA calls what an engine
    built with REFIT_IDENTICAL then does unpredictable.

    Args:
        plan: The file; one with weights passes.
        manifest: Its manifest.

    Raises:
        ArtifactError: The ONNX file is missing or another one, or its ``.data`` file is.
    """
    onnx = weights_file(plan, manifest)
    if onnx is None:
        return
    needed = [onnx] if manifest.onnx_data_sha256 is None else [onnx, data_path(onnx)]
    for path in needed:
        if not path.is_file():
            raise ArtifactError(
                f"{plan} holds no weights, and {path.name}, where they are, is not beside it. Copy "
                "it there, or build the engine without --strip-weights."
            )
    if (sha256_file(onnx), data_sha256(onnx)) != (manifest.onnx_sha256, manifest.onnx_data_sha256):
        raise ArtifactError(
            f"{plan} holds no weights, and {onnx.name} beside it is not the one that it was built "
            "from (its sha256 differs). Copy that one there, or build the engine again from this "
            "one."
        )


def put_weights_back(trt: Any, engine: Any, onnx: Path, logger: TrtLogger, *, name: str) -> None:
    """Give an engine that was built without weights those of its ONNX file. Nothing runs on it yet.

    Args:
        trt: The TensorRT module.
        engine: Deserialised.
        onnx: Seen to be the file that it was built from.
        logger: That TensorRT writes to.
        name: What to call the engine in messages.

    Raises:
        AmpDeployError: TensorRT does not take them, or they are not all that is missing.
    """

    def failed(what: str) -> AmpDeployError:
        return AmpDeployError(
            f"{name} holds no weights, and {what}. {logger.explain()} Build the engine without "
            "--strip-weights."
        )

    refitter = parser = None
    try:
        refitter = trt.Refitter(engine, logger)
        parser = trt.OnnxParserRefitter(refitter, logger)
        if not parser.refit_from_file(str(onnx)):
            errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise failed(f"TensorRT does not take those of {onnx.name} ({errors or 'no error'})")
        missing = list(refitter.get_missing_weights())
        if missing:
            raise failed(f"{onnx.name} lacks {len(missing)} of them, {missing[0]!r} among them")
        if not refitter.refit_cuda_engine():
            raise failed(f"refitting it with those of {onnx.name} failed")
    finally:
        # The parser holds the weights until they are in the engine. An exception would keep this
        # frame with all three, and they must not outlive the runtime, which the caller closes.
        del parser, refitter, engine
