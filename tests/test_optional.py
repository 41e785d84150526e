"""Why an import fails, in words: the missing library by name, and who brings it."""

from __future__ import annotations

import sys

import pytest

from ampdeploy import optional
from ampdeploy.errors import MissingDependencyError
from ampdeploy.optional import (
    install_line,
    is_jetson,
    missing_library,
    require,
    require_build_host,
)

NOT_FOUND = "cannot open shared object file: No such file or directory"


@pytest.fixture
def pc(monkeypatch, tmp_path):
    monkeypatch.setattr(optional, "L4T_RELEASE", tmp_path / "nv_tegra_release")
    monkeypatch.setattr(optional, "DEVICE_TREE_COMPATIBLE", tmp_path / "compatible")
    return tmp_path


@pytest.mark.parametrize(
    ("message", "library"),
    [
        (f"libnvinfer.so.10: {NOT_FOUND}", "libnvinfer.so.10"),
        (f"libnvdla_compiler.so: {NOT_FOUND}", "libnvdla_compiler.so"),
        (f"/opt/x/libc++-1.so.1.2: {NOT_FOUND}", "libc++-1.so.1.2"),
        ("libcudart.so.12: cannot open", "libcudart.so.12"),
        ("libx.so: cannot open shared object file: Permission denied", None),
        ("/lib/libm.so.6: version `GLIBC_2.38' not found (required by libnvinfer.so.10)", None),
        ("libnvinfer.so.10: undefined symbol: cublasLtCreate", None),
        ("", None),
    ],
)
def test_only_a_library_that_is_missing_is_called_missing(message, library):
    assert missing_library(message) == library


@pytest.mark.parametrize(
    ("library", "brings"),
    [
        ("libcuda.so.1", "the NVIDIA driver"),
        ("libcudart.so.12", "the CUDA toolkit"),
        ("libcudnn.so.9", "cuDNN"),
        ("libnvinfer_plugin.so.10", "TensorRT"),
        ("libnvdla_compiler.so", "JetPack's system packages"),
        ("libgomp.so.1", None),
    ],
)
def test_who_brings_a_library(library, brings, tmp_path, monkeypatch):
    name = "needs_" + library.split(".")[0]
    (tmp_path / f"{name}.py").write_text(f"raise ImportError({library + ': ' + NOT_FOUND!r})")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError) as caught:
        require(name, needed_by="a test")
    said = str(caught.value)
    assert f"the shared library {library} is missing" in said
    assert ("It comes with" in said) == (brings is not None)
    assert brings is None or f"It comes with {brings}" in said
    assert caught.value.exit_code == 4


def test_whatever_a_package_raises_is_an_error_of_that_package(tmp_path, monkeypatch):
    (tmp_path / "raises_anything.py").write_text("raise RuntimeError('built for another numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match="RuntimeError: built for another numpy"):
        require("raises_anything", needed_by="a test")


def test_what_a_device_takes_brings_no_torch():
    """The extra that has them is 6 GB."""
    assert install_line("onnxruntime").startswith("pip install onnxruntime ")
    assert install_line("PIL.Image") == "pip install pillow"
    for module in ("torch", "timm", "onnx"):
        assert install_line(module).startswith("pip install '.[cpu]'")


def test_a_package_is_called_what_pip_calls_it(monkeypatch):
    for module in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(MissingDependencyError) as caught:
        require("PIL.Image", needed_by="a test")
    assert str(caught.value) == (
        "a test needs the package 'pillow', which is not installed here. Run: pip install pillow"
    )
    with pytest.raises(MissingDependencyError, match=r"has no pillow\. Run: .*\.\[cpu\]"):
        require_build_host("a test")


def test_on_a_jetson_tensorrt_is_a_system_package(pc):
    assert not is_jetson()
    for module in ("tensorrt", "tensorrt_libs"):
        assert "pip install '.[trt]'" in install_line(module)
    (pc / "compatible").write_bytes(b"nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0")
    assert is_jetson()
    for module in ("tensorrt", "tensorrt.sub", "tensorrt_libs"):
        line = install_line(module)
        assert line.startswith("sudo apt-get install tensorrt python3-libnvinfer")
        assert "never pip" in line
        # All that is to come from pip is what JetPack has not.
        assert line.count("pip install") == line.count("pip install 'cuda-python>=12.6,<13'") == 1
    assert "apt" not in install_line("onnx")
    (pc / "compatible").write_bytes(b"raspberrypi,4-model-b\0")
    assert not is_jetson()
    (pc / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.3")
    assert is_jetson()
