"""The GPU benchmark on a CPU, with timm's test model: every path that needs no GPU, for real."""

from __future__ import annotations

import gc
import json
import shutil
import stat
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from ampdeploy.artifacts import read_json
from ampdeploy.bench.latency import BUFFERS
from ampdeploy.errors import UnknownNameError, VerificationError
from ampdeploy.export.onnx import export_onnx, reference_outputs
from ampdeploy.export.write import write_graph
from ampdeploy.models.build import build_model
from ampdeploy.precision.emulate import emulation
from ampdeploy.precision.graph import load_model
from ampdeploy.precision.typed import apply_types
from benchmarks.gpu import card, plan, run
from benchmarks.gpu.clock import measure_pair
from benchmarks.gpu.interpret import InterpretedGraph
from benchmarks.gpu.numerics import judge
from benchmarks.gpu.pairs import _let_blocks_matter, float32_mode
from benchmarks.gpu.table import summary_lines
from benchmarks.gpu.ways import TorchOpened, compile_blocks
from tests.conftest import CALIB_DATA, TINY
from tests.mlp_kinds import SIZE, make

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--count", "4", "--seconds", "1", "--min-runs", "20"]
SMALL = ["--width-multiple", "8", "--params-cut", "0.2", "--batches", "1,3"]
WAYS = ("fp32-eager", "fp16-eager", "ort-cpu", "typed-torch")


def arguments(folder, *more):
    where = ["--out", str(folder / "gpu.json"), "--state", str(folder / "state")]
    return [*where, "--models", TINY, *QUICK, *SMALL, *more]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A finished benchmark: (result, folder)."""
    folder = tmp_path_factory.mktemp("gpu")
    run.main(arguments(folder, "--typed", TINY))
    return read_json(folder / "gpu.json"), folder


def rows_of(result, way):
    return {row["batch"]: row for row in result["rows"] if row["way"] == way}


def test_result_has_every_row_with_times_ratio_memory_and_numerics(measured):
    result, _ = measured
    assert result["missing"] == result["absent"] == {}
    assert set(result["ways"]) == set(WAYS)
    assert result["host"]["packages"]["torch"] == torch.__version__.split("+")[0]
    for way in WAYS:
        rows = rows_of(result, way)
        assert sorted(rows) == [1, 3]
        for row in rows.values():
            for role in ("dense", "pruned"):
                assert 0 < row[role]["min"] <= row[role]["p50"] <= row[role]["p90"]
                assert row[role]["n"] == row["timing"]["pairs"] >= 20
                assert set(row["numerics"][role]) == {"features", "patch_features"}
                assert row["prepare_s"][role] > 0
            ratio = row["ratio"]
            assert ratio["value"] == pytest.approx(row["pruned"]["p50"] / row["dense"]["p50"])
            assert ratio["ci95_low"] <= ratio["value"] <= ratio["ci95_high"]
            assert row["timing"]["buffers"] == min(BUFFERS, 4)
            assert ("end_to_end" in row) == (way == "fp32-eager")
    clocks = rows_of(result, "fp32-eager")[1]
    assert clocks["timing"]["clock"] != clocks["end_to_end"]["timing"]["clock"]


def test_float32_agrees_to_the_last_digits_and_fp16_does_not(measured):
    result, _ = measured

    def worst(way):
        return min(
            seen["cosine_min"]
            for row in rows_of(result, way).values()
            for outputs in row["numerics"].values()
            for seen in outputs.values()
        )

    assert worst("fp32-eager") > 1 - 1e-9
    assert worst("ort-cpu") > 1 - 1e-9
    for way in ("fp16-eager", "typed-torch"):
        assert 0.9999 < worst(way) < 1 - 1e-8


def test_pruned_model_meets_the_cut_on_the_grid(measured):
    (model,) = measured[0]["models"]
    assert model["pruned"]["params"] == pytest.approx(0.8 * model["dense"]["params"], rel=0.01)
    assert model["pruned"]["flops"] < model["dense"]["flops"]
    widths = model["pruned"]["hidden"]
    assert all(width % 8 == 0 for width in widths)
    assert max(widths) - min(widths) <= 8
    memory = rows_of(measured[0], "fp16-eager")[1]["memory"]
    assert memory["pruned"]["weights_bytes"] == 2 * model["pruned"]["params"]


def test_emulation_is_closer_to_the_devices_fp16_than_float32_is(measured):
    (row,) = rows_of(measured[0], plan.EMULATION).values()
    for role in ("dense", "pruned"):
        assert len(row[role]["blocks"]) == 6
        compared = [*row[role]["outputs"].values(), *row[role]["blocks"].values()]
        for seen in compared:
            assert all(pair["not_finite"] == 0 for pair in seen.values())
            real = seen["device_to_float32"]["relative_difference"]
            assert 1e-5 < real < 1e-2
            assert seen["device_to_emulated"]["relative_difference"] < real


def test_rtx_probe_records_what_was_said(measured):
    (row,) = rows_of(measured[0], plan.RTX_PROBE).values()
    first, *steps = row["steps"]
    if not first["ok"]:
        assert "tensorrt_rtx" in first["said"]
        return
    assert [step["ok"] for step in steps if step["step"].startswith("build")] == [True, True]
    loads = [step for step in steps if step["step"].startswith("load")]
    assert len(loads) == 2
    if not torch.cuda.is_available():
        assert all(not step["ok"] and "TensorRT said" in step["said"] for step in loads)


def test_result_names_no_folder_of_the_machine(measured):
    result, folder = measured
    text = json.dumps(result)
    assert str(folder) not in text
    assert str(CALIB_DATA.parent) not in text


def test_same_command_measures_nothing_again_and_a_part_keeps_the_rest(measured, tmp_path):
    result, folder = measured
    files = folder / "state" / "rows"
    times = {path.name: path.stat().st_mtime_ns for path in files.iterdir()}
    again = arguments(folder, "--typed", TINY, "--ways", "fp16-eager")
    again[again.index("--out") + 1] = str(tmp_path / "again.json")
    run.main(again)
    assert {path.name: path.stat().st_mtime_ns for path in files.iterdir()} == times
    found = read_json(tmp_path / "again.json")["rows"]

    def key(row):
        return (row["way"], str(row["batch"]))

    assert sorted(found, key=key) == sorted(result["rows"], key=key)


def test_rows_of_other_weights_are_measured_anew(measured, tmp_path):
    _, folder = measured
    shutil.copytree(folder / "state", tmp_path / "state")
    save_file(make_tiny(seed=5).backbone.state_dict(), tmp_path / "tiny.safetensors")
    weights = ("--weights", str(tmp_path / "tiny.safetensors"))
    run.main(arguments(tmp_path, *weights, "--ways", "fp32-eager", "--typed", ""))
    result = read_json(tmp_path / "gpu.json")
    assert {row["way"] for row in result["rows"]} == {"fp32-eager"}  # none of the random weights
    assert result["config"]["weights"]["kind"] == "file"


def make_tiny(seed):
    torch.manual_seed(seed)
    return build_model(TINY)


def test_failed_row_is_kept_with_its_error_and_the_rest_goes_on(tmp_path):
    wide = "timm:vit_tiny_patch16_224"  # can lose half its parameters; the test model cannot
    command = arguments(tmp_path, "--ways", "fp32-eager", "--image-size", "32", "--typed", "")
    command[command.index("--models") + 1] = f"{TINY},{wide}"
    command[command.index("--params-cut") + 1] = "0.5"
    command[command.index("--batches") + 1] = "1"
    with pytest.raises(SystemExit, match="1 rows failed: timm-test_vit-fp32-eager-1"):
        run.main(command)
    failed, good = read_json(tmp_path / "gpu.json")["rows"]
    assert failed["model"] == TINY
    assert failed["error"].startswith("ConfigError: --params-cut 0.5 cannot be met")
    assert good["model"] == wide
    assert good["ratio"]["value"] > 0
    path = tmp_path / "state" / "rows" / "timm-test_vit-fp32-eager-1.json"
    written = path.stat().st_mtime_ns
    with pytest.raises(SystemExit):
        run.main(command)
    assert path.stat().st_mtime_ns == written
    with pytest.raises(SystemExit):
        run.main([*command, "--retry-failed"])
    assert path.stat().st_mtime_ns > written


def test_out_of_time_writes_what_it_has(tmp_path):
    run.main(arguments(tmp_path, "--minutes", "0.01", "--ways", "fp32-eager", "--typed", ""))
    result = read_json(tmp_path / "gpu.json")
    assert result["rows"] == []
    assert set(result["missing"]) == {"timm-test_vit-fp32-eager-1", "timm-test_vit-fp32-eager-3"}
    assert "run the same command again" in result["missing"]["timm-test_vit-fp32-eager-1"]


def test_mistyped_names_are_refused_before_anything_runs(tmp_path):
    command = arguments(tmp_path)
    command[command.index("--models") + 1] = "dinov2_x"
    with pytest.raises(SystemExit, match="unknown model 'dinov2_x'"):
        run.main(command)
    with pytest.raises(SystemExit, match="unknown way 'fp16-graph' on cpu"):
        run.main(arguments(tmp_path, "--ways", "fp16-graph"))
    assert not (tmp_path / "gpu.json").exists()


def test_gpu_rows_are_planned_plain_first_and_compiled_last():
    ways = plan.choose_ways(plan.all_ways((1, 8), "default"), "cuda", None)
    jobs = plan.plan_jobs(["dinov2_s", "dinov2_g"], ["dinov2_s"], ways, (1, 8))
    names = [(job.model, job.name) for job in jobs if job.batch != 8]
    plain = ["fp32-eager", "tf32-eager", "fp16-eager", "fp16-graph"]
    typed = [plan.EMULATION, "typed-torch", "ort-cuda", "trt-rtx", "trt"]
    assert names == [
        *[(model, name) for model in ("dinov2_s", "dinov2_g") for name in plain],
        *[("dinov2_s", name) for name in typed],
        ("dinov2_s", "fp16-compile"),
        ("dinov2_g", "fp16-compile"),
        ("dinov2_s", plan.RTX_PROBE),
    ]
    assert [way.name for way in ways if way.tf32] == ["tf32-eager"]
    assert plan.END_TO_END["cuda"] in plain


def test_compilation_has_minutes_of_its_own():
    (compiled,) = plan.choose_ways(plan.all_ways((1,), "default"), "cuda", ["fp16-compile"])
    (eager,) = plan.choose_ways(plan.all_ways((1,), "default"), "cuda", ["fp16-eager"])
    jobs = [plan.Job(model="m", name=way.name, batch=1, way=way) for way in (compiled, eager)]
    budget = plan.Budget(minutes=60, compile_minutes=1)
    assert [budget.refuses(job) for job in jobs] == [None, None]
    budget.spent(jobs[0], 61)
    assert "compilation used up its 1 minutes" in budget.refuses(jobs[0])
    assert budget.refuses(jobs[1]) is None
    budget.spent(jobs[1], 3600)  # the next of its kind would not end in time
    assert "minutes were left" in budget.refuses(jobs[1])
    with pytest.raises(UnknownNameError, match="Did you mean 'fp16-eager'"):
        plan.choose_ways([eager], "cuda", ["fp16-eagre"])


def test_pairs_see_every_buffer_in_both_orders():
    calls = []

    def timed(name, milliseconds):
        def call(buffer):
            calls.append((name, buffer))
            return milliseconds

        return call

    found = measure_pair(
        timed("dense", 4.0),
        timed("pruned", 3.0),
        clock="made up",
        buffers=4,
        seconds=0.01,
        min_runs=20,
        rng=np.random.default_rng(0),
    )
    assert found["ratio"] == {"why": {}, "value": 0.75, "ci95_low": 0.75, "ci95_high": 0.75}
    assert found["timing"]["clock"] == "made up"
    assert found["timing"]["warmup_stable"]
    pairs = list(zip(calls[::2], calls[1::2], strict=True))
    assert all(first[1] == second[1] and first[0] != second[0] for first, second in pairs)
    orders = {(first[0], first[1]) for first, _ in pairs}
    assert orders == {(name, buffer) for name in ("dense", "pruned") for buffer in range(4)}


def test_tf32_is_switched_and_put_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def fail(tf32, precision):
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 is tf32
        raise KeyError

    for tf32, precision in ((True, "high"), (False, "highest")):
        with pytest.raises(KeyError), float32_mode(tf32=tf32):
            fail(tf32, precision)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_layer_scale_lets_blocks_matter():
    model = make("packed_swiglu")
    _let_blocks_matter(model)
    scales = [value for name, value in model.backbone.named_parameters() if "gamma" in name]
    assert len(scales) == 6
    assert all(bool((scale == 1).all()) for scale in scales)


def images_of(count, seed=0):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_blocks_trace_as_a_whole_and_share_their_code():
    model, images = make("plain").requires_grad_(False), images_of(2)
    expected = model(images).features
    graphs = []

    def backend(graph, _example):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compile_blocks(model, backend=backend)
    assert torch.allclose(model(images).features, expected, atol=1e-5)
    assert len(graphs) == 1  # three blocks of one shape
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["plain", "packed_swiglu", "swiglu_no_bias", "registers", "eva_packed_gate"]
)
def test_interpreter_computes_what_pytorch_does(kind, tmp_path):
    model, images = make(kind).requires_grad_(False), images_of(3)
    export_onnx(model, tmp_path / "m.onnx", opset=18)
    graph = InterpretedGraph(tmp_path / "m.onnx", CPU)
    for name, found in zip(graph.names, graph(images), strict=True):
        expected = torch.from_numpy(reference_outputs(model, images)[name])
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), name


@torch.no_grad()
def test_interpreter_overflows_where_emulation_does(tmp_path):
    """A hidden value of 90000 in FP16 is infinite on a device, too: nothing computes wider."""
    model = make("plain").requires_grad_(False)
    model.blocks[1].mlp.fc1.bias[0] = 45000.0
    model.blocks[1].mlp.fc1.weight[0] = 0.0
    model.blocks[1].mlp.fc2.weight[:, 0] *= 1e3  # 45000 fits FP16, its products do not
    export_onnx(model, tmp_path / "m.onnx", opset=18)
    typed = load_model(tmp_path / "m.onnx")
    apply_types(typed, [])
    write_graph(typed, tmp_path / "typed.onnx")
    images = images_of(2)
    assert all(np.isfinite(v).all() for v in reference_outputs(model, images).values())
    graph = InterpretedGraph(tmp_path / "typed.onnx", CPU)
    found = dict(zip(graph.names, graph(images), strict=True))
    with emulation(load_model(tmp_path / "typed.onnx"), near=tmp_path / "m.onnx", watch=[]) as real:
        emulated = real.run(images.numpy())
    for name, value in emulated.items():
        assert not np.isfinite(value).all()
        assert not torch.isfinite(found[name]).all()


@torch.no_grad()
def test_interpreter_refuses_a_tensor_of_another_type(tmp_path):
    export_onnx(make("plain"), tmp_path / "m.onnx", opset=18)
    proto = onnx.load(tmp_path / "m.onnx")
    norm = next(node for node in proto.graph.node if node.op_type == "LayerNormalization")
    value = next(v for v in proto.graph.value_info if v.name == norm.output[0])
    value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(proto, tmp_path / "wrong.onnx")
    graph = InterpretedGraph(tmp_path / "wrong.onnx", CPU)
    with pytest.raises(VerificationError, match=r"LayerNormalization.*gave torch.float32"):
        graph(images_of(1))


def test_judge_fills_up_the_last_batch_and_counts_no_image_twice():
    images = images_of(5).numpy()

    def function(batch):
        assert len(batch) == 2
        return (batch.flatten(1)[:, :7],)

    opened = TorchOpened(
        function, [images[:2]], CPU, dtype=torch.float32, weights_bytes=0, graph=False
    )
    reference = images.reshape(5, -1)[:, :7].copy()
    assert judge(opened, images, {"features": reference}, 2)["features"]["vectors"] == 5
    reference[4] *= -1
    seen = judge(opened, images, {"features": reference}, 2)["features"]
    assert seen["cosine_min"] == pytest.approx(-1)


def test_card_leaves_out_a_field_that_the_driver_does_not_know(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$1" in *throttle*) echo "not a valid field" ; exit 2 ;; esac\n'
        'echo "${1#--query-gpu=} of a card"\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = card.card_state()
    assert found["clocks.sm"] == "clocks.sm of a card"
    assert set(found) == set(card.STATE) - {"clocks_throttle_reasons.active"}


def test_table_shows_failures_and_worst_cosine(measured):
    result, _ = measured
    failed = {"model": "m", "way": "trt", "batch": 8, "error": "Boom: first\nsecond"}
    lines = summary_lines([*result["rows"], failed])
    assert len(lines) == 1 + 2 * len(WAYS) + 1
    assert lines[-1].endswith("failed: Boom: first")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_keeps_the_weights_that_it_reads():
    (way,) = plan.choose_ways(plan.all_ways((1,), "default"), "cuda", ["fp16-graph"])
    model = build_model(TINY, device=torch.device("cuda")).requires_grad_(False)
    pair = SimpleNamespace(models={"dense": model}, device=torch.device("cuda"))
    image = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)
    image = np.resize(image, (1, 3, model.spec.image_size, model.spec.image_size))
    with way.open(pair, "dense", [image], None) as opened:
        expected = opened.features(image)["features"]
        gc.collect()
        torch.cuda.empty_cache()
        taken = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
        np.testing.assert_array_equal(opened.features(image)["features"], expected)
        del taken
