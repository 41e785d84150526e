"""Engines, on a recording stand-in of TensorRT (tests/device/stand_ins.py); nothing ran on a GPU.

The stand-in's profiler and inspector report layers in the documented form, made of the nodes of a
real export: which nodes a layer joins, and how long it takes, is the test's choice.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from ampdeploy.artifacts import sha256_file
from ampdeploy.device import platform
from ampdeploy.errors import AmpDeployError, ArtifactError
from ampdeploy.explain import result as kinds
from ampdeploy.explain.engine_profile import place_layer, profile_pair, read_layers
from ampdeploy.explain.graph_work import operators_of_graph
from ampdeploy.explain.places import Place, place_all
from ampdeploy.explain.result import Work
from ampdeploy.explain.run import MIN_RUNS, explain_pair
from ampdeploy.models.profile import profile_model
from ampdeploy.targets.base import get_target
from tests.device import stand_ins as nvidia
from tests.targets.test_tensorrt import write_engine

LAYER_MS = 0.25


class Profiler:
    """What TensorRT's IProfiler is, as far as a subclass sees."""

    def __init__(self):
        pass


def tensor(shape, said="Row major linear FP16 format"):
    return {"Name": "t", "Location": "Device", "Dimensions": list(shape), "Format/Datatype": said}


def layers_of(onnx, joins):
    """A layer for each group of nodes that `joins` names, and one for each other node."""
    operators = operators_of_graph(onnx, 1)
    rest = [o for o in operators if not any(o.name in group for group in joins)]
    groups = [*joins, *([o.name] for o in rest)]
    return [
        {
            "Name": f"layer {number}",
            "LayerType": "kgen",
            "Inputs": [tensor((1, 17, 32))],
            "Outputs": [tensor((1, 17, 32))],
            "Metadata": "\u001e".join(f"[ONNX Layer: {name}]" for name in group),
        }
        for number, group in enumerate(groups)
    ]


def attention_of(onnx, block):
    places = place_all(operators_of_graph(onnx, 1), {})
    return [n for n, p in places.items() if p.kind == kinds.SCORES and p.block == block]


@pytest.fixture
def engines(monkeypatch, tmp_path, pair_of):
    """Two engines that the stand-in runs, their graphs beside them; changes are the test's."""
    pair = pair_of("plain")
    gpu = nvidia.Gpu()
    state = nvidia.TensorRt(gpu)
    nvidia.install_cuda(monkeypatch, gpu)
    nvidia.install_driver(monkeypatch)
    trt = nvidia.install_tensorrt(monkeypatch, state)
    trt.IProfiler = Profiler
    trt.LayerInformationFormat = SimpleNamespace(JSON="json")
    described, plans = {}, {}
    for role, onnx in (("baseline", pair.baseline), ("pruned", pair.slim)):
        folder = tmp_path / role
        folder.mkdir()
        beside = folder / "model.onnx"
        shutil.copy(onnx, beside)
        plans[role] = write_engine(
            folder, role.encode(), onnx="model.onnx", onnx_sha256=sha256_file(beside)
        )
        joins = [attention_of(onnx, 0)] if role == "pruned" else []
        described[role.encode()] = {"Layers": layers_of(onnx, joins), "Bindings": []}

    class Inspector:
        execution_context = None

        def __init__(self, plan):
            self.plan = plan

        def get_engine_information(self, form):
            assert form == "json"
            assert self.execution_context is not None
            return json.dumps(described[self.plan])

    plain_engine, execute = nvidia.Engine.__init__, nvidia.Context.execute_async_v3

    def remember(self, state):
        plain_engine(self, state)
        self.plan = state.plan

    def context(self, config=None):
        made = nvidia.Context(self.state)
        made.plan = self.plan
        return made

    def run(self, stream):
        done = execute(self, stream)
        if getattr(self, "profiler", None) is not None:
            assert self.enqueue_emits_profile
            for layer in described[self.plan]["Layers"]:
                self.profiler.report_layer_time(layer["Name"], LAYER_MS)
        return done

    monkeypatch.setattr(nvidia.Engine, "__init__", remember)
    monkeypatch.setattr(nvidia.Engine, "create_execution_context", context)
    monkeypatch.setattr(
        nvidia.Engine, "create_engine_inspector", lambda self: Inspector(self.plan), raising=False
    )
    monkeypatch.setattr(nvidia.Context, "execute_async_v3", run)
    return SimpleNamespace(pair=pair, plans=plans, described=described, gpu=gpu)


def explain(engines):
    return explain_pair("trt", engines.plans["baseline"], engines.plans["pruned"], runs=MIN_RUNS)


def test_layers_are_booked_by_the_nodes_that_they_were_made_from(engines):
    found = explain(engines)
    assert found.target == "trt"
    assert found.total.baseline.flops == profile_model(engines.pair.dense).flops
    assert found.total.pruned.flops == profile_model(engines.pair.pruned).flops
    layers = engines.described[b"pruned"]["Layers"]
    assert found.total.pruned_ms == pytest.approx(LAYER_MS * len(layers))
    assert found.widths == ((0, 128, 50), (1, 128, 64), (2, 128, 128))
    scores = {c.block: c.pruned_ms for c in found.cells if c.kind == kinds.SCORES}
    assert scores[0] == LAYER_MS  # one fused layer
    assert scores[1] > LAYER_MS


def test_fused_attention_and_what_is_not_measured_are_said(engines):
    found = explain(engines)
    by_code = {finding.code: finding for finding in found.findings}
    assert by_code["attention"].numbers["fused_blocks"] == 1
    assert "fused in 1 of 3 blocks" in by_code["attention"].says
    assert "50 -> 64" in by_code["widths"].says
    assert found.machine is None
    assert "says nothing about a GPU" in found.why["machine"]
    assert "memory_bound" not in by_code


def test_everything_is_given_back_to_the_gpu(engines):
    explain(engines)
    assert engines.gpu.live == {}


def test_a_layer_that_only_the_profiler_knows_is_refused(engines, monkeypatch):
    listed = engines.described[b"pruned"]["Layers"]
    monkeypatch.setattr(
        "ampdeploy.explain.engine_profile.read_layers",
        lambda text, name: read_layers(json.dumps({"Layers": listed[:3]}), name),
    )
    with pytest.raises(AmpDeployError, match="layers that its inspector does not list"):
        explain(engines)


def test_an_engine_without_detailed_verbosity_is_refused(engines):
    engines.described[b"baseline"] = {"Layers": []}
    with pytest.raises(ArtifactError, match="not built with detailed profiling verbosity"):
        explain(engines)


def test_an_engine_without_its_graph_is_refused(engines):
    (engines.plans["pruned"].parent / "model.onnx").unlink()
    target = get_target("trt")
    with pytest.raises(ArtifactError, match=r"built from model\.onnx, which is not beside it"):
        profile_pair(target, *engines.plans.values(), batch=1, threads=None, runs=MIN_RUNS)


@pytest.mark.skipif(platform.device_facts().gpu is not None, reason="this machine has a GPU")
def test_without_a_gpu_an_engine_is_refused_as_by_the_runner(tmp_path, pair_of):
    from ampdeploy.errors import MissingDependencyError

    shutil.copy(pair_of("plain").slim, tmp_path / "model.onnx")
    plan = write_engine(tmp_path, onnx="model.onnx")
    with pytest.raises(MissingDependencyError, match="no GPU that can be used"):
        explain_pair("trt", plan, plan)


def test_bytes_follow_the_types_that_the_inspector_names():
    text = json.dumps(
        {"Layers": [{"Name": "a", "Inputs": [tensor((2, 3)), tensor((2, 3), "Int8 linear")],
                     "Outputs": [tensor((2, 3), "Row major linear FP32")]}]}
    )  # fmt: skip
    assert read_layers(text, "x")[0].bytes == 6 * (2 + 1 + 4)


@pytest.mark.parametrize("text", ['{"Layers": ["a", "b"]}', "{}", ""])
def test_names_alone_are_refused(text):
    with pytest.raises(ArtifactError, match="but their names"):
        read_layers(text, "x")


def test_no_json_is_refused():
    with pytest.raises(AmpDeployError, match="gave no JSON"):
        read_layers("not json", "x")


FC1, QKV = Place(block=1, kind=kinds.FC1), Place(block=1, kind=kinds.QKV)
GELU = Place(block=1, kind=kinds.MLP_ELEMENTWISE)
OTHER = Place(block=2, kind=kinds.FC1)


@pytest.mark.parametrize(
    ("inside", "place"),
    [
        ([(FC1, 100), (GELU, 0)], FC1),
        ([(FC1, 100), (QKV, 100)], Place(block=1, kind=kinds.MIXED)),
        ([(FC1, 100), (OTHER, 100)], Place(block=None, kind=kinds.FC1)),
        ([(GELU, 0)], GELU),
        ([(GELU, 0), (QKV, 0)], Place(block=1, kind=kinds.ELEMENTWISE)),
        ([], Place(block=None, kind=kinds.REST)),
    ],
)
def test_where_a_fused_layer_is_booked(inside, place):
    works = {str(n): Work(flops=flops) for n, (_, flops) in enumerate(inside)}
    places = {str(n): where for n, (where, _) in enumerate(inside)}
    assert place_layer(works, places) == place
