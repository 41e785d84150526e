"""The key of the bench stage: another meter is another measurement."""

from __future__ import annotations

from ampdeploy.bench.sensors import rapl
from ampdeploy.config import BenchConfig, BuildConfig, DataConfig, ModelConfig
from ampdeploy.run import MACHINE
from ampdeploy.stages.measure import bench_options
from tests.bench.machines import plant


def test_a_meter_that_becomes_readable_changes_what_belongs_to_the_machine(monkeypatch, tmp_path):
    model, data = ModelConfig(name="timm:test_vit"), DataConfig(calib=tmp_path)
    config = BuildConfig(model=model, data=data)
    monkeypatch.setattr(rapl, "_POWERCAP", tmp_path / "sys/class/powercap")
    without = bench_options(config)
    assert without == bench_options(config)
    assert "no energy counter (RAPL)" in without[MACHINE]["meters"]["cpu"]["why"]
    plant("x86_server", tmp_path)
    found = bench_options(config)
    assert found[MACHINE]["meters"]["cpu"]["source"] == "RAPL package-0 + dram + package-1"
    assert {**found, MACHINE: None} == {**without, MACHINE: None}
    off = BuildConfig(model=model, data=data, bench=BenchConfig(energy_seconds=0))
    assert "meters" not in bench_options(off)[MACHINE]
