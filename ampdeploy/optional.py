"""The only gate to optional dependencies.

Heavy packages are imported at the point of use, through `require()`, so that `ampdeploy --help`
stays fast and a device without torch can still run its side of the tool. The error says who
needed the package, why the import failed, and the install line that brings it.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from ampdeploy.errors import MissingDependencyError

# import name -> extra of this project that brings it
_EXTRA_OF = {
    "torch": "cpu",
    "torchvision": "cpu",
    "timm": "cpu",
    "safetensors": "cpu",
    "PIL": "cpu",
    "onnx": "cpu",
    "onnxscript": "cpu",
    "onnxruntime": "cpu",
    "matplotlib": "bench",
    "skimage": "bench",
    "torch_pruning": "bench",
    "tensorrt": "trt",
    "tensorrt_rtx": "trt-rtx",
}


def install_line(module: str) -> str:
    """The command that installs `module`, as a user would type it."""
    extra = _EXTRA_OF.get(module.split(".")[0])
    if extra is None:
        return f"pip install {module}"
    line = install_extra(extra)
    return line + " ('.[gpu]' on an NVIDIA host)" if extra == "cpu" else line


def install_extra(extra: str) -> str:
    """The command that installs an extra of this project."""
    # By path, not by name: the name may be a stranger's wherever this project is not published.
    return f"pip install '.[{extra}]' in a checkout of ampdeploy"


def require(module: str, *, needed_by: str) -> ModuleType:
    """Import `module`, or say who needed it and how to get it.

    Args:
        module: Dotted module name.
        needed_by: What the user asked for, e.g. ``"ampdeploy build"``.

    Raises:
        MissingDependencyError: It is not installed, or it is installed and fails to import.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != module.split(".")[0]:
            # The package is here but one of *its* dependencies is not: name the real one.
            raise MissingDependencyError(
                f"{needed_by} needs {module}, which is installed but misses the package "
                f"{error.name!r}. Run: {install_line(error.name)}"
            ) from error
        raise MissingDependencyError(
            f"{needed_by} needs the package {module!r}, which is not installed here. "
            f"Run: {install_line(module)}"
        ) from error
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"{needed_by} needs {module}, which is installed but does not load: {error}"
        ) from error


# Everything between a model name and a report.
BUILD_HOST_MODULES = (
    "torch",
    "torchvision",
    "timm",
    "safetensors",
    "PIL",
    "onnx",
    "onnxscript",
    "onnxruntime",
)


def require_build_host(needed_by: str) -> None:
    """Check that this installation can build, before anything expensive starts.

    Raises:
        MissingDependencyError: Naming every package that is missing and the one line to install.
    """
    missing = [module for module in BUILD_HOST_MODULES if not available(module)]
    if missing:
        raise MissingDependencyError(
            f"{needed_by} needs a build host, and this installation has no {', '.join(missing)}. "
            f"Run: {install_line('torch')}"
        )


def available(module: str) -> bool:
    """Whether `module` can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
