"""An ONNX file as a TensorRT network, every parser error told, and its signature checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ampdeploy.device.engine.flavour import Flavour
from ampdeploy.device.engine.manifest import TensorFacts
from ampdeploy.errors import AmpDeployError, ArtifactError
from ampdeploy.export.names import FEATURES, IMAGES, OUTPUTS

CHANNELS = 3
DYNAMIC = -1


def parse_network(flavour: Flavour, builder: Any, logger: Any, onnx: Path) -> tuple[Any, Any]:
    """Parse an ONNX file into a strongly typed network.

    Args:
        flavour: The TensorRT.
        builder: Its builder.
        logger: What `make_logger` gave.
        onnx: The file; its ``.data`` file, if it has one, lies next to it.

    Returns:
        The network, and the parser: it owns weights that the network points to, and must live until
        the engine is built.

    Raises:
        ArtifactError: TensorRT cannot parse it; every error is in the message.
        AmpDeployError: TensorRT made no network.
    """
    network = builder.create_network(flavour.network_flags)
    if network is None:
        raise AmpDeployError(f"TensorRT made no network. {logger.explain()}")
    parser = flavour.trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(onnx))
    errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
    if not parsed or errors:
        listed = "".join(f"\n  - {error}" for error in errors) or f" {logger.explain()}"
        raise ArtifactError(
            f"TensorRT {flavour.version} cannot parse {onnx}:{listed}\nExport it again with "
            "`ampdeploy export`; if it stays, this TensorRT does not know an operator of it."
        )
    return network, parser


def _parser_error(error: Any) -> str:
    if error.node() < 0:  # about the file, not about a node
        return str(error.desc())
    return f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): {error.desc()}"


def check_interface(network: Any, image_size: int, onnx: Path) -> tuple[TensorFacts, ...]:
    """Make sure that a network takes and gives what ampdeploy's exports do.

    That is `images` in, `features` and perhaps `patch_features` out, float32, with a dynamic batch.

    Raises:
        ArtifactError: It does not; `onnx` names the file it came from.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    tensors = tuple(
        TensorFacts(name=tensor.name, mode=mode, dtype=tensor.dtype.name, shape=tuple(tensor.shape))
        for mode, group in (("input", inputs), ("output", outputs))
        for tensor in group
    )
    names = [fact.name for fact in tensors]
    known = ([IMAGES, *OUTPUTS], [IMAGES, FEATURES])
    wanted = (DYNAMIC, CHANNELS, image_size, image_size)
    problem = None
    if names not in known:  # what is no ONNX at all can parse as an empty network
        problem = f"its inputs and outputs are {names}, expected {known[0]} or {known[1]}"
    elif tensors[0].shape != wanted:
        problem = f"{IMAGES} has the shape {tensors[0].shape}, expected {wanted}: a dynamic batch"
    elif any(fact.dtype != "FLOAT" for fact in tensors):
        problem = f"types are {[fact.dtype for fact in tensors]}, expected FLOAT inputs and outputs"
    if problem:
        raise ArtifactError(f"{onnx}: {problem}. Export it with `ampdeploy export`.")
    return tensors
