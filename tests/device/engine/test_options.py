"""What is refused before a build, and what the builder is told. `trt` here is a stand-in."""

import dataclasses
import sys
import types

import pytest

from ampdeploy.config import EngineConfig
from ampdeploy.device.engine import options
from ampdeploy.device.engine.flavour import describe_flavour, find_flavour
from ampdeploy.device.engine.memory_budget import MemoryBudget
from ampdeploy.errors import AmpDeployError, ConfigError, MissingDependencyError
from tests.device.engine_samples import ADA, NO_GPU, ORIN, trt_with_a_gpu

TURING = dataclasses.replace(ADA, gpu="NVIDIA T4", compute_capability="7.5")
VOLTA = dataclasses.replace(ADA, gpu="NVIDIA V100", compute_capability="7.0")
HOPPER = dataclasses.replace(ADA, gpu="NVIDIA H200", compute_capability="9.0")


@pytest.fixture
def trt():
    return describe_flavour("trt", trt_with_a_gpu())


@pytest.fixture(scope="module")
def rtx():
    return find_flavour("trt-rtx", needed_by="a test")


@pytest.mark.parametrize(
    ("changes", "here", "match"),
    [
        ({"portable": "same-cc"}, ORIN, "neither JetPack nor DRIVE OS"),
        ({"portable": "ampere-plus"}, ORIN, "neither JetPack nor DRIVE OS"),
        ({"portable": "ampere-plus"}, TURING, r"capability 8\.0 and newer; .* has 7\.5"),
        ({"portable": "same-cc"}, VOLTA, r"capability 7\.5 and newer; .* has 7\.0"),
        ({"portable": "version", "strip_weights": True}, ADA, "exclude each other"),
        ({"compute_capabilities": ("8.9",)}, ADA, "builds for the GPU it runs on"),
    ],
)
def test_what_the_documentation_excludes_is_refused(changes, here, match, trt):
    with pytest.raises(ConfigError, match=match):
        options.check_can_build(trt, EngineConfig(**changes), here)


@pytest.mark.parametrize(
    ("target", "changes", "match"),
    [
        ("trt-rtx", {"portable": "same-cc"}, "--portable same-cc is not for target trt-rtx"),
        ("trt-rtx", {"portable": "version"}, "--portable version is not for target trt-rtx"),
        ("trt", {"compute_capabilities": ("8.9",)}, "use --target trt-rtx"),
        ("trt", {"portable": "version", "strip_weights": True}, "exclude each other"),
        (
            "trt-rtx",
            {"compute_capabilities": ("8.6", "8.9"), "strip_weights": True},
            "one compute capability at a time",
        ),
    ],
)
def test_some_options_fit_no_machine_and_take_no_tensorrt_to_tell(target, changes, match):
    with pytest.raises(ConfigError, match=match):
        options.check_options(target, EngineConfig(**changes))
    for fine in (EngineConfig(), EngineConfig(strip_weights=True)):
        options.check_options(target, fine)


@pytest.mark.parametrize(
    ("changes", "here"),
    [
        ({"portable": "version"}, ORIN),
        ({"portable": "same-cc"}, TURING),
        ({"portable": "ampere-plus"}, ADA),
        ({"strip_weights": True, "portable": "ampere-plus"}, ADA),
        ({"strip_weights": True}, ORIN),
    ],
)
def test_what_it_allows_is_not(changes, here, trt):
    options.check_can_build(trt, EngineConfig(**changes), here)


@pytest.mark.parametrize(
    ("lacks", "changes", "match"),
    [
        ({"hardware_levels": ("AMPERE_PLUS",)}, {"portable": "same-cc"}, "has no SAME_COMPUTE"),
        ({"has_version_compatible": False}, {"portable": "version"}, "cannot build such plans"),
        ({"can_strip_weights": False}, {"strip_weights": True}, "cannot leave weights out"),
    ],
)
def test_what_this_tensorrt_lacks_is_refused(lacks, changes, match, trt):
    with pytest.raises(ConfigError, match=match):
        options.check_can_build(dataclasses.replace(trt, **lacks), EngineConfig(**changes), ADA)


def test_stripped_engines_of_tensorrt_for_rtx_are_for_one_gpu(rtx):
    two = EngineConfig(strip_weights=True, compute_capabilities=("8.6", "8.9"))
    with pytest.raises(ConfigError, match=r"one compute capability at a time; 8\.6, 8\.9"):
        options.check_can_build(rtx, two, ADA)
    with pytest.raises(MissingDependencyError, match="none was put in"):
        options.check_can_build(rtx, EngineConfig(strip_weights=True), NO_GPU)


@pytest.mark.parametrize(
    ("asked", "strip", "here", "chosen"),
    [
        ((), False, NO_GPU, ["SM80", "SM86", "SM89", "SM120", "SM121"]),
        ((), False, ADA, ["SM80", "SM86", "SM89", "SM120", "SM121"]),
        ((), False, TURING, ["SM75"]),
        ((), False, HOPPER, ["CURRENT"]),
        (("9.0",), False, HOPPER, ["CURRENT"]),
        ((), True, ADA, ["SM89"]),
        (("12.0", "8.9"), False, NO_GPU, ["SM120", "SM89"]),
    ],
)
def test_the_gpus_that_an_engine_is_for(asked, strip, here, chosen, rtx):
    config = EngineConfig(compute_capabilities=asked, strip_weights=strip)
    assert list(options.choose_compute_capabilities(rtx, config, here).values()) == chosen


def test_a_gpu_that_is_neither_here_nor_known_is_refused(rtx):
    with pytest.raises(ConfigError, match=r"9\.0; it knows 7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1"):
        options.check_can_build(rtx, EngineConfig(compute_capabilities=("8.9", "9.0")), HOPPER)


def test_the_builder_of_tensorrt_for_rtx_takes_them(rtx):
    builder_config = rtx.trt.Builder(rtx.trt.Logger()).create_builder_config()
    options.set_compute_capabilities(rtx, builder_config, {"8.6": "SM86", "12.0": "SM120"})
    found = [builder_config.get_compute_capability(i).name for i in range(2)]
    assert found == ["SM86", "SM120"]


class Recorded:
    """A builder config that keeps what it is told."""

    def __init__(self):
        self.flags = {"TF32"}
        self.pools = {}
        self.hardware_compatibility_level = None

    def set_flag(self, flag):
        self.flags.add(flag.name)

    def clear_flag(self, flag):
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool, limit):
        self.pools[pool.name] = limit

    def get_memory_pool_limit(self, pool):
        return self.pools[pool.name]


@pytest.mark.parametrize(
    ("changes", "flags", "level"),
    [
        ({}, set(), "NONE"),
        ({"portable": "version"}, {"VERSION_COMPATIBLE"}, "NONE"),
        ({"portable": "same-cc"}, set(), "SAME_COMPUTE_CAPABILITY"),
        (
            {"portable": "ampere-plus", "strip_weights": True},
            {"STRIP_PLAN", "REFIT_IDENTICAL"},
            "AMPERE_PLUS",
        ),
    ],
)
def test_flags(changes, flags, level, trt):
    told = Recorded()
    said = options.set_flags(trt, told, EngineConfig(**changes))
    assert told.flags == flags  # and TF32 is off: what was verified was FP32
    assert getattr(told.hardware_compatibility_level, "name", "NONE") == level
    assert said == {"strongly_typed": True, "tf32": False, "hardware_compatibility": level}
    assert told.profiling_verbosity.name == "DETAILED"


def test_a_level_that_is_not_taken_is_an_error(trt, rtx):
    # As TensorRT for RTX does: it warns, and stays at NONE.
    real = rtx.trt.Builder(rtx.trt.Logger()).create_builder_config()
    with pytest.raises(AmpDeployError, match="did not take AMPERE_PLUS"):
        options.set_flags(trt, real, EngineConfig(portable="ampere-plus"))


def test_memory_limits_are_read_back(trt, rtx):
    told = Recorded()
    budget = MemoryBudget(workspace_bytes=5, tactic_bytes=8, reason="a test")
    said = options.set_memory(trt, told, budget)
    assert told.pools == {"WORKSPACE": 5, "TACTIC_DRAM": 8}
    assert said == {"memory": "a test", "workspace_bytes": 5, "tactic_bytes": 8}
    real = rtx.trt.Builder(rtx.trt.Logger()).create_builder_config()
    odd = MemoryBudget(workspace_bytes=None, tactic_bytes=3 << 30, reason="no power of two")
    with pytest.raises(AmpDeployError, match="did not take TACTIC_DRAM of 3221225472 bytes"):
        options.set_memory(rtx, real, odd)


def test_a_tensorrt_without_a_pool_goes_without(trt):
    pools = types.SimpleNamespace(WORKSPACE=types.SimpleNamespace(name="WORKSPACE"))
    older = dataclasses.replace(trt, trt=types.SimpleNamespace(MemoryPoolType=pools))
    budget = MemoryBudget(workspace_bytes=5, tactic_bytes=8, reason="a test")
    assert "tactic_bytes" not in options.set_memory(older, Recorded(), budget)


class Cache:
    def __init__(self, blob, taken):
        self.blob, self.taken = blob, taken

    def serialize(self):
        return b"timings"


class CachingConfig:
    """Takes only the caches in `takes`."""

    def __init__(self, *takes):
        self.takes = takes
        self.offered = []

    def create_timing_cache(self, blob):
        self.offered.append(blob)
        return Cache(blob, blob in self.takes)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch  # timings of another GPU are not this one's
        self.cache = cache
        return cache.taken

    def get_timing_cache(self):
        return self.cache


def test_timings_are_kept_for_one_build_gpu_and_driver(tmp_path, trt):
    names = {
        options.timing_cache_file(tmp_path, flavour, here).name
        for flavour in (trt, dataclasses.replace(trt, version="10.3.0"))
        for here in (ADA, HOPPER, dataclasses.replace(ADA, driver="580.1"))
    }
    assert len(names) == 6
    path = tmp_path / "new" / "a.timing"
    told = CachingConfig(b"", b"timings")
    options.load_timing_cache(told, path)
    options.save_timing_cache(told, path)
    assert path.read_bytes() == b"timings"
    options.load_timing_cache(told, path)
    assert told.offered == [b"", b"timings"]


def test_unusable_timings_are_dropped_with_a_warning(tmp_path, caplog):
    path = tmp_path / "a.timing"
    path.write_bytes(b"of another GPU")
    told = CachingConfig(b"")
    options.load_timing_cache(told, path)
    assert told.offered == [b"of another GPU", b""]
    assert "of another machine" in caplog.text
    with pytest.raises(AmpDeployError, match="refused an empty timing cache"):
        options.load_timing_cache(CachingConfig(), path)


def test_a_disk_that_takes_no_timings_is_only_a_warning(tmp_path, caplog):
    told = CachingConfig(b"")
    options.load_timing_cache(told, tmp_path / "none")
    (tmp_path / "file").write_bytes(b"")
    options.save_timing_cache(told, tmp_path / "file" / "a.timing")
    assert "the timing cache is not kept" in caplog.text


def test_tensorrt_for_rtx_is_not_imported_by_asking_for_trt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError):
        find_flavour("trt", needed_by="a test")
