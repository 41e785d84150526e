"""The only gate to optional dependencies.

Heavy packages are imported at the point of use, through `require()`, so that `ampdeploy --help`
stays fast and a device without torch can still run its side of the tool. The error says who
needed the package, why the import failed, and the install line that brings it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

from ampdeploy.errors import MissingDependencyError

# import name -> extra of this project that brings it
_EXTRA_OF = {
    "torch": "cpu",
    "torchvision": "cpu",
    "timm": "cpu",
    "safetensors": "cpu",
    "scipy": "cpu",
    "sklearn": "cpu",
    "PIL": "cpu",
    "onnx": "cpu",
    "onnxscript": "cpu",
    "onnxruntime": "cpu",
    "matplotlib": "bench",
    "skimage": "bench",
    "torch_pruning": "bench",
    "tensorrt": "trt",
    "tensorrt_bindings": "trt",
    "tensorrt_libs": "trt",
    "tensorrt_rtx": "trt-rtx",
}

# What a device takes alone: the extra that has it would bring torch along, and gigabytes.
_ALONE = {"onnxruntime", "PIL"}
# import name -> what pip calls it, where that is another
_DISTRIBUTION_OF = {
    "PIL": "pillow",
    "cuda": "cuda-python",
    "pynvml": "nvidia-ml-py",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}

# What a Jetson's system image has, in a container or not.
L4T_RELEASE = Path("/etc/nv_tegra_release")
DEVICE_TREE_COMPATIBLE = Path("/proc/device-tree/compatible")

# Start of a shared library's name -> who brings it. The first that fits is meant.
_BRINGS = (
    ("libcuda.so", "the NVIDIA driver; a container needs to be started with access to the GPU"),
    ("libnvidia", "the NVIDIA driver; a container needs to be started with access to the GPU"),
    ("libnvdla", "JetPack's system packages"),
    ("libcudla", "JetPack's system packages"),
    ("libnvinfer", "TensorRT, whose parts must all be of one version"),
    ("libnvonnxparser", "TensorRT, whose parts must all be of one version"),
    ("libtensorrt", "TensorRT, whose parts must all be of one version"),
    ("libcudnn", "cuDNN"),
    ("libcu", "the CUDA toolkit, in the version that the package was built for"),
    ("libnv", "the CUDA toolkit, in the version that the package was built for"),
)


def is_jetson() -> bool:
    """Whether this is a Jetson, whose TensorRT and CUDA come with JetPack."""
    if L4T_RELEASE.exists():
        return True
    try:
        return b"nvidia,tegra" in DEVICE_TREE_COMPATIBLE.read_bytes()
    except OSError:
        return False


def install_line(module: str) -> str:
    """The command that installs `module`, as a user would type it."""
    top = module.split(".")[0]
    if _EXTRA_OF.get(top) == "trt" and is_jetson():
        return (
            "sudo apt-get install tensorrt python3-libnvinfer (JetPack's own packages; never pip, "
            "whose TensorRT does not fit JetPack's). In a virtual environment, make it with "
            "--system-site-packages, or it does not see them. What runs engines is not in JetPack: "
            "pip install 'cuda-python>=12.6,<13' (JetPack 7: 'cuda-python<14')"
        )
    extra = _EXTRA_OF.get(top)
    if extra is None or top in _ALONE:
        line = f"pip install {distribution_of(module)}"
        return line + " (onnxruntime-gpu for ort-cuda)" if top == "onnxruntime" else line
    line = install_extra(extra)
    return line + " ('.[gpu]' on an NVIDIA host)" if extra == "cpu" else line


def distribution_of(module: str) -> str:
    """What pip calls the package of `module`."""
    top = module.split(".")[0]
    return _DISTRIBUTION_OF.get(top, top)


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
            f"{needed_by} needs the package {distribution_of(module)!r}, which is not installed "
            f"here. Run: {install_line(module)}"
        ) from error
    except Exception as error:
        # Not only ImportError: packages built for each other's other versions fail as they like.
        raise MissingDependencyError(
            f"{needed_by} needs {module}, which is installed but does not load: "
            f"{_why_not_loaded(error)}"
        ) from error


def _why_not_loaded(error: Exception) -> str:
    """The reason in words; a shared library that is missing is named, with who brings it."""
    text = str(error) or "no reason given"
    kind = "" if isinstance(error, ImportError | OSError) else f"{type(error).__name__}: "
    library = missing_library(text)
    if library is None:
        return kind + text
    owner = next((who for start, who in _BRINGS if library.startswith(start)), None)
    whose = f" It comes with {owner}." if owner else ""
    return (
        f"the shared library {library} is missing ({kind}{text}).{whose} Install it, or put its "
        "folder into LD_LIBRARY_PATH."
    )


def missing_library(message: str) -> str | None:
    """``libnvinfer.so.10`` of a loader's message that it cannot find it; None if it says other.

    Other failures name libraries, too: a symbol that one lacks, a version that another wants.
    """
    found = re.search(
        r"([\w.+-]+\.so(?:\.[\w.]+)*)['\"]?: cannot open(?!.*Permission denied)", message
    )
    return found[1] if found else None


# Everything between a model name and a report.
BUILD_HOST_MODULES = (
    "torch",
    "torchvision",
    "timm",
    "safetensors",
    "sklearn",
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
    missing = [distribution_of(m) for m in BUILD_HOST_MODULES if not available(m)]
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
