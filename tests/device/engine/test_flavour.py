import sys
import types

import pytest

from ampdeploy import optional
from ampdeploy.device.engine.flavour import describe_flavour, find_flavour
from ampdeploy.errors import ConfigError, MissingDependencyError
from tests.device.engine_samples import trt_with_a_gpu


def names(**members):
    return types.SimpleNamespace(**members)


def module(version, **parts):
    """The skeleton of a `tensorrt` module, with the classes that ampdeploy calls."""
    common = {
        "Builder": names(build_serialized_network=1),
        "OnnxParser": names(parse_from_file=1),
        "IExecutionContext": names(execute_async_v3=1),
        "ICudaEngine": names(num_io_tensors=1),
    }
    made = types.ModuleType("tensorrt")
    vars(made).update({"__version__": version, **common, **parts})
    return made


def test_the_installed_tensorrt_for_rtx():
    flavour = find_flavour("trt-rtx", needed_by="a test")
    assert flavour.trt.__name__ == "tensorrt_rtx"
    assert flavour.version == flavour.trt.__version__
    assert flavour.is_rtx
    assert flavour.can_build_without_gpu
    assert not flavour.takes_timing_cache
    assert flavour.has_progress_monitor
    assert flavour.can_strip_weights
    # It has the names for these, and ignores them or fails.
    assert flavour.hardware_levels == ()
    assert not flavour.has_version_compatible
    network = flavour.trt.Builder(flavour.trt.Logger()).create_network(flavour.network_flags)
    assert network.get_flag(flavour.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_tensorrt_10_by_its_features():
    flavour = describe_flavour(
        "trt",
        module(
            "10.3.0",
            NetworkDefinitionCreationFlag=names(EXPLICIT_BATCH=0, STRONGLY_TYPED=1),
            BuilderFlag=names(FP16=0, VERSION_COMPATIBLE=13, STRIP_PLAN=19, REFIT_IDENTICAL=20),
            HardwareCompatibilityLevel=names(NONE=0, AMPERE_PLUS=1),
            OnnxParserRefitter=1,
            IProgressMonitor=1,
        ),
    )
    assert flavour.network_flags == 2
    assert not flavour.is_rtx
    assert not flavour.can_build_without_gpu
    assert flavour.takes_timing_cache
    assert flavour.hardware_levels == ("AMPERE_PLUS",)
    assert flavour.has_version_compatible
    assert flavour.can_strip_weights


def test_tensorrt_11_needs_no_flag_for_strong_typing(monkeypatch):
    newer = module("11.4.1", NetworkDefinitionCreationFlag=names(), BuilderFlag=names(REFIT=1))
    monkeypatch.setitem(sys.modules, "tensorrt", newer)
    flavour = find_flavour("trt", needed_by="a test")
    assert flavour.network_flags == 0
    assert not flavour.has_progress_monitor


@pytest.mark.parametrize(("jetson", "advice"), [(True, "JetPack 6.1"), (False, "pip install")])
def test_tensorrt_8_is_refused_with_its_version(monkeypatch, tmp_path, jetson, advice):
    old = module(
        "8.6.2",
        NetworkDefinitionCreationFlag=names(EXPLICIT_BATCH=0),
        BuilderFlag=names(FP16=0),
    )
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    release = tmp_path / "nv_tegra_release"
    if jetson:
        release.touch()
    monkeypatch.setattr(optional, "L4T_RELEASE", release)
    monkeypatch.setattr(optional, "DEVICE_TREE_COMPATIBLE", tmp_path / "none")
    with pytest.raises(MissingDependencyError, match=r"STRONGLY_TYPED.*8\.6\.2") as raised:
        find_flavour("trt", needed_by="a test")
    assert advice in str(raised.value)
    assert ("pip install" in str(raised.value)) is not jetson


def test_a_stub_without_its_libraries_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    with pytest.raises(MissingDependencyError, match=r"Builder\.build_serialized_network"):
        find_flavour("trt", needed_by="a test")


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"a test needs .*tensorrt"):
        find_flavour("trt", needed_by="a test")


def test_another_target():
    with pytest.raises(ConfigError, match="'ort' is no TensorRT target"):
        find_flavour("ort", needed_by="a test")


def test_the_stand_in_of_other_tests_passes_for_tensorrt_10(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", trt_with_a_gpu())
    flavour = find_flavour("trt", needed_by="a test")
    assert not flavour.is_rtx
    assert flavour.hardware_levels == ("SAME_COMPUTE_CAPABILITY", "AMPERE_PLUS")
