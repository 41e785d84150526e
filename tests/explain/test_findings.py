"""Sentences from made-up measurements: each branch, and that none comes without numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ampdeploy.explain import result as kinds
from ampdeploy.explain.compare import make_cells, sum_cells
from ampdeploy.explain.evidence import Evidence, next_multiple
from ampdeploy.explain.findings import find_all
from ampdeploy.explain.interleave import ratio
from ampdeploy.explain.places import Place
from ampdeploy.explain.profiled import ProfiledModel, Timed
from ampdeploy.explain.result import Finding, Machine, Work

RUNS = 20
MACHINE = Machine(flops_per_s=1e9, bytes_per_s=1e9, how="made up")


def timed(name, kind, ms, *, flops=0, nbytes=0, block=0, op_type="Op"):
    jitter = np.linspace(-0.01, 0.01, RUNS)
    return Timed(
        name=name,
        op_type=op_type,
        place=Place(block=block, kind=kind),
        work=Work(flops=flops, bytes=nbytes, operators=1),
        ms=ms * (1 + jitter),
    )


def model(fc1_ms, fc1_flops, *, width=64, noise=0.0, fused_attention=0, more=()):
    operators = (
        timed("qkv", kinds.QKV, 6.0, flops=6_000_000, nbytes=10),
        timed("softmax", kinds.SCORES, 2.0, nbytes=1000),
        timed("fc1", kinds.FC1, fc1_ms, flops=fc1_flops, nbytes=10),
        *more,
    )
    latency = np.full(RUNS, 8.0 + fc1_ms)
    latency[::3] *= 1 + noise
    return ProfiledModel(
        operators=operators,
        run_ms=np.sum([o.ms for o in operators], axis=0) + 0.5,
        latency_ms=latency,
        fused={},
        widths={0: width},
        token_width=32,
        tokens=16,
        fused_attention=fused_attention,
    )


def findings(dense, slim, *, machine=MACHINE, multiple=16):
    cells = make_cells(dense, slim, machine)
    (total,) = sum_cells(dense, slim, cells, scope="all")
    evidence = Evidence(
        baseline=dense,
        pruned=slim,
        batch=1,
        width_multiple=multiple,
        total=total,
        cells=cells,
        latency=ratio(np.stack([dense.latency_ms, slim.latency_ms], axis=1)),
        machine=machine,
        width_probes=None,
        activation_probe=None,
        other_batch=None,
    )
    return {finding.code: finding for finding in find_all(evidence)}


def test_amdahls_bound_is_the_share_outside_the_mlps():
    found = findings(model(8.0, 8_000_000), model(4.0, 4_000_000))["outside_mlp"]
    assert found.numbers["outside_share_baseline"] == pytest.approx(0.5, abs=0.001)
    assert found.numbers["most_speedup"] == pytest.approx(2, abs=0.01)
    assert "can never give more than 2.00x" in found.says


def test_predicted_and_measured_agree_where_time_follows_flops():
    found = findings(model(8.0, 8_000_000), model(4.0, 4_000_000))
    assert found["prediction"].numbers["predicted_ratio"] == pytest.approx(12 / 16, abs=0.001)
    assert found["prediction"].numbers["operators_ratio"] == pytest.approx(12 / 16, abs=0.001)
    assert found["shrank_but"].numbers["less_than_predicted"] == 0


@pytest.mark.parametrize(
    ("after_ms", "not_faster", "behind"), [(8.0, 1, 1), (7.0, 0, 1), (4.0, 0, 0)]
)
def test_what_shrank_without_getting_as_much_faster_is_named(after_ms, not_faster, behind):
    # Intervals of a ratio of constants have no width, so "not faster" is exact here.
    found = findings(model(8.0, 8_000_000), model(after_ms, 4_000_000))["shrank_but"]
    assert found.numbers["shrank"] == 1
    assert found.numbers["not_faster"] == not_faster
    assert found.numbers["less_than_predicted"] == behind
    assert ("block 0 mlp fc1" in found.says) == bool(behind)
    assert found.numbers["lost_ms"] == pytest.approx(after_ms - 4 if behind else 0, abs=0.1)


def test_layers_fused_across_kinds_do_not_lower_the_bound():
    blob = timed("blob", kinds.MIXED, 8.0, flops=5)
    found = findings(model(8.0, 8, more=(blob,)), model(4.0, 4, more=(blob,)))["outside_mlp"]
    assert found.numbers["most_speedup"] == pytest.approx(24 / 8, abs=0.01)


@pytest.mark.parametrize(("more_ms", "says"), [(0.0, "does not change"), (0.4, "changes (+0.400")])
def test_time_between_operators_is_called_unchanged_only_where_it_is(more_ms, says):
    slim = model(4.0, 4)
    slim = replace(slim, run_ms=slim.run_ms + more_ms)
    assert f"which pruning {says}" in findings(model(8.0, 8), slim)["overhead"].says


def test_a_hundred_cells_as_fast_as_predicted_are_not_called_slower():
    """Noise alone: of 100 intervals of 95% some lie above the prediction."""
    rng = np.random.default_rng(3)

    def many(ms, flops):
        cells = tuple(
            replace(
                timed(f"fc{block}", kinds.FC1, ms, flops=flops, block=block),
                ms=ms * np.exp(0.1 * rng.standard_normal(RUNS)),
            )
            for block in range(1, 101)
        )
        return model(8.0 if ms == 2 else 4.0, flops, more=cells)

    dense, slim = many(2.0, 8_000_000), many(1.0, 4_000_000)
    alone = [c for c in make_cells(dense, slim, None) if c.predicted == 0.5]
    assert sum(c.measured.ci95_low > 0.5 for c in alone) > 0
    found = findings(dense, slim, machine=None)["shrank_but"].numbers
    assert found["less_than_predicted"] == 0
    assert found["lost_ms"] == pytest.approx(sum(c.pruned_ms - c.baseline_ms / 2 for c in alone))


@pytest.mark.parametrize(("fused", "says"), [(0, "not fused"), (1, "is fused, one operator in")])
def test_attention_is_called_fused_only_where_it_is(fused, says):
    dense = model(8.0, 8_000_000)
    found = findings(dense, model(4.0, 4_000_000, fused_attention=fused))["attention"]
    assert says in found.says
    assert found.numbers["scores_ms"] == pytest.approx(2, abs=0.05)


def test_off_tile_widths_without_a_probe_say_that_nothing_was_measured():
    found = findings(model(8.0, 8), model(4.0, 4, width=50), machine=None)["widths"]
    assert "block 0: 50" in found.says
    assert "50 -> 64" in found.says
    assert "not measured" in found.says


def test_memory_bound_operators_need_a_measured_machine():
    dense, slim = model(8.0, 8_000_000), model(4.0, 4_000_000)
    found = findings(dense, slim)["memory_bound"]
    assert found.numbers["operators"] == 1  # the softmax
    assert found.numbers["linear_least_ms"] == pytest.approx(10)
    assert "memory_bound" not in findings(dense, slim, machine=None)


def test_without_a_machine_products_go_by_flops_and_the_rest_by_bytes():
    dense, slim = model(8.0, 8_000_000), model(4.0, 4_000_000)
    cells = {cell.kind: cell for cell in make_cells(dense, slim, None)}
    assert cells[kinds.FC1].predicted == 0.5
    assert cells[kinds.SCORES].predicted == 1


def test_work_that_only_one_model_has_is_no_prediction():
    extra = timed("cast", kinds.REST, 1.0, nbytes=5, block=None)
    dense, slim = model(8.0, 8_000_000), model(4.0, 4_000_000, more=(extra,))
    rest = next(c for c in make_cells(dense, slim, MACHINE) if c.kind == kinds.REST)
    assert (rest.predicted, rest.measured, rest.baseline_ms) == (None, None, 0.0)
    assert set(rest.why) == {"predicted", "measured", "block"}


def test_layers_fused_across_kinds_are_reported_with_their_time():
    blob = timed("blob", kinds.MIXED, 3.0, flops=5)
    found = findings(model(8.0, 8, more=(blob,)), model(4.0, 4, more=(blob,)))["fused_across"]
    assert found.numbers["ms"] == pytest.approx(3, abs=0.05)


def test_a_busy_machine_is_said():
    quiet = findings(model(8.0, 8), model(4.0, 4))
    assert "busy" not in quiet
    loud = findings(model(8.0, 8, noise=0.9), model(4.0, 4, noise=0.9))
    assert loud["busy"].numbers["spread_baseline"] > 0.2


def test_a_finding_without_a_number_cannot_be_made():
    with pytest.raises(ValueError, match="no number behind it"):
        Finding(code="x", says="it is slow", numbers={})


@pytest.mark.parametrize(("width", "wider"), [(50, 64), (64, 64), (1, 16)])
def test_the_next_multiple(width, wider):
    assert next_multiple(width, 16) == wider
