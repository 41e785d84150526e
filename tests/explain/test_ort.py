"""Real profiles of tiny models by the real ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from ampdeploy.errors import AmpDeployError, ArtifactError, ConfigError
from ampdeploy.explain import result as kinds
from ampdeploy.explain.compare import ROOFLINE
from ampdeploy.explain.ort_profile import profile_pair, split_runs
from ampdeploy.explain.probes import measure_machine, probe_gelu, probe_width
from ampdeploy.explain.result import Explanation
from ampdeploy.explain.run import MIN_RUNS, explain_pair
from ampdeploy.export.onnx import export_onnx
from ampdeploy.models.profile import profile_model
from ampdeploy.report.codec import from_plain, to_plain
from tests.explain.conftest import WIDTHS
from tests.targets.onnx_samples import write_linear_model

RUNS = MIN_RUNS


@pytest.fixture(scope="module")
def explained(pair_of) -> Explanation:
    pair = pair_of("plain")
    return explain_pair("ort", pair.baseline, pair.slim, batch=2, threads=1, runs=RUNS)


def test_the_work_of_the_profile_is_what_torch_counts(explained, pair_of):
    pair = pair_of("plain")
    assert explained.total.baseline.flops == 2 * profile_model(pair.dense).flops
    assert explained.total.pruned.flops == 2 * profile_model(pair.pruned).flops


def test_widths_are_read_from_what_ran(explained):
    assert explained.widths == tuple((b, 128, w) for b, w in enumerate(WIDTHS["plain"]))


def test_cells_kinds_and_blocks_add_up_to_all(explained):
    for cells in (explained.cells, explained.kinds):
        total = sum((cell.baseline for cell in cells), kinds.Work())
        assert total == explained.total.baseline
        assert sum((cell.pruned for cell in cells), kinds.Work()) == explained.total.pruned
    assert [cell.block for cell in explained.blocks] == [0, 1, 2]
    inside = sum((cell.baseline for cell in explained.blocks), kinds.Work())
    outside = [cell.baseline for cell in explained.cells if cell.block is None]
    assert sum(outside, inside) == explained.total.baseline


def test_what_did_not_shrink_is_predicted_unchanged_and_what_did_by_its_width(explained):
    cells = {(cell.block, cell.kind): cell for cell in explained.cells}
    assert explained.model == ROOFLINE
    for block, width in enumerate(WIDTHS["plain"]):
        assert cells[block, kinds.QKV].predicted == 1
        assert cells[block, kinds.NORM].predicted == 1
        fc1 = cells[block, kinds.FC1]
        assert fc1.pruned.flops / fc1.baseline.flops == width / 128
        assert fc1.predicted is not None
        assert (
            fc1.predicted == pytest.approx(1) if width == 128 else width / 128 < fc1.predicted < 1
        )
    assert 0 < explained.total.predicted < 1


def test_every_time_is_positive_and_bounded_by_the_call(explained):
    assert all(cell.baseline_ms >= 0 and cell.pruned_ms >= 0 for cell in explained.cells)
    assert explained.total.baseline_ms > 0
    found = {finding.code: finding.numbers for finding in explained.findings}
    assert found["overhead"]["between_pruned_ms"] > 0
    assert found["overhead"]["other_batch"] == 8
    assert 0 < found["outside_mlp"]["outside_share_baseline"] < 1
    assert found["outside_mlp"]["most_speedup"] > 1


def test_off_tile_widths_are_named_and_the_next_better_one_is_timed(explained):
    assert [(p.width, p.other_width, p.blocks) for p in explained.width_probes] == [(50, 64, (0,))]
    widths = next(f for f in explained.findings if f.code == "widths")
    assert "1 widths are no multiple of 16 (block 0: 50)" in widths.says
    assert widths.numbers["ratio_50_to_64"] == explained.width_probes[0].ratio.value


def test_attention_and_gelu_in_parts_are_seen(explained):
    found = {finding.code: finding for finding in explained.findings}
    assert found["attention"].numbers["fused_blocks"] == 0
    assert found["attention"].numbers["operators_per_block"] >= 3
    assert "5 elementwise operators a block" in found["activation_in_parts"].says
    assert explained.fused["pruned"]["FusedMatMul"] == 3


def test_the_result_survives_json(explained):
    data = json.loads(json.dumps(to_plain(explained)))
    data["widths"] = []  # triples are beyond the codec's schema
    data["latency_spread"] = list(explained.latency_spread)
    again = from_plain(Explanation, data, where="explain.json")
    assert again == dataclasses.replace(explained, widths=())


def test_an_export_with_opset_20_has_a_gelu_in_one_piece(pair_of, tmp_path):
    pair, path = pair_of("plain"), tmp_path / "model.onnx"
    export_onnx(pair.pruned, path, opset=20)  # what the finding advises
    found = explain_pair("ort", pair.baseline, path, batch=8, threads=1, runs=MIN_RUNS)
    assert found.activation_probe is None
    assert "activation_probe" in found.why
    codes = {finding.code: finding for finding in found.findings}
    assert "activation_in_parts" not in codes
    assert "other_batch" not in codes["overhead"].numbers  # 8 is the batch that others are held to


def test_models_of_other_kinds_are_placed_completely(pair_of):
    pair = pair_of("eva_split_gate")
    dense, slim = profile_pair(pair.baseline, pair.slim, batch=1, threads=1, runs=MIN_RUNS)
    assert list(slim.widths.values()) == [20, 32, 88]
    for model in (dense, slim):
        for block in range(3):
            products = [o for o in model.operators if o.place.block == block and o.work.flops]
            assert sorted(o.place.kind for o in products) == sorted(
                [kinds.QKV, kinds.SCORES, kinds.SCORES, kinds.PROJ, kinds.FC1, kinds.GATE,
                 kinds.FC2]
            )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "--batch 0"),
        ({"runs": MIN_RUNS - 1}, f"--runs {MIN_RUNS - 1}"),
        ({"threads": 0}, "--threads 0"),
    ],
)
def test_numbers_out_of_range_are_refused(pair_of, changes, message):
    pair = pair_of("plain")
    with pytest.raises(ConfigError, match=message):
        explain_pair("ort", pair.baseline, pair.slim, **changes)


def test_a_target_whose_profile_cannot_be_read_is_refused(pair_of):
    pair = pair_of("plain")
    with pytest.raises(ConfigError, match="the target is ort-cuda"):
        explain_pair("ort-cuda", pair.baseline, pair.slim)


def test_another_batch_than_a_fixed_one_is_refused(tmp_path):
    path = tmp_path / "fixed.onnx"
    write_linear_model(path, batch=2)
    with pytest.raises(ConfigError, match="takes batches of 2 alone, and --batch is 1"):
        profile_pair(path, path, batch=1, threads=1, runs=MIN_RUNS)


def test_models_of_two_image_sizes_are_refused(tmp_path):
    for size in (8, 12):
        write_linear_model(tmp_path / f"{size}.onnx", size=size)
    with pytest.raises(ArtifactError, match=r"takes images of 12 px, 8\.onnx of 8 px"):
        profile_pair(tmp_path / "8.onnx", tmp_path / "12.onnx", batch=1, threads=1, runs=MIN_RUNS)


def test_a_graph_without_mlps_is_predicted_by_work_and_says_so(tmp_path):
    path = tmp_path / "linear.onnx"
    write_linear_model(path)
    found = explain_pair("ort", path, path, batch=1, threads=1, runs=MIN_RUNS)
    assert found.machine is None
    assert found.why["machine"] == "no MLP was recognised"
    assert found.total.predicted == 1
    assert found.widths == ()


def events(names, calls, *, start=0):
    listed = []
    for call in range(calls):
        at = start + 1000 * call
        listed.append({"name": "model_run", "cat": "Session", "ts": at, "dur": 900, "args": {}})
        for number, name in enumerate(names):
            kernel = {"op_name": "Add"}
            listed.append(
                {"name": f"{name}_kernel_time", "cat": "Node", "ts": at + number, "dur": 1,
                 "args": kernel}
            )  # fmt: skip
    return listed


def test_warm_up_calls_are_left_out_of_a_profile():
    parts, run_ms = split_runs(events(["a", "b"], 13), 10)
    assert [len(part) for part in parts] == [2] * 10
    np.testing.assert_array_equal(run_ms, np.full(10, 0.9))


@pytest.mark.parametrize(
    "listed",
    [
        events(["a"], 12),  # a call is missing
        events(["a"], 12) + events(["b"], 1, start=50_000),  # another operator
        events([], 13),
    ],
)
def test_a_profile_that_was_cut_off_is_refused(listed):
    with pytest.raises(AmpDeployError, match="10 calls of one list were made"):
        split_runs(listed, 10)


def test_probes_time_what_they_say():
    machine = measure_machine(64, 128, threads=1)
    assert machine.flops_per_s > 1e8
    assert machine.bytes_per_s > 1e7
    # Sixteen times the work: no noise makes that look the same.
    wide = probe_width(64, 1024, (), tokens=256, token_width=128, threads=1)
    assert wide.ratio.value > 2
    assert wide.other_ms > wide.ms
    gelu = probe_gelu(256, 512, threads=1)
    assert gelu.ms > 0
    assert gelu.fused_ms > 0
