"""Builds with every budget and both searches: what is asked for is what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ampdeploy
from ampdeploy import artifacts
from ampdeploy.artifacts import Manifest
from ampdeploy.cli import main
from ampdeploy.models.profile import profile_model
from ampdeploy.report.result import Report
from tests import runs
from tests.mlp_kinds import NO_BIAS

# A neuron of the tiny ViT: 64 weights in, one bias, 64 weights out.
NEURON = 129


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def pruned(inputs, tmp_path_factory) -> Path:
    """A run up to `slim`, at -20% parameters."""
    out = tmp_path_factory.mktemp("runs") / "pruned"
    assert main([*runs.prune_arguments(inputs, out), "-q"]) == 0
    return out


@pytest.fixture(scope="module")
def published(inputs, tmp_path_factory) -> Path:
    """A whole build by AMP as published."""
    out = tmp_path_factory.mktemp("runs") / "amp"
    assert main(runs.arguments(inputs, out, "-q", search=runs.AMP)) == 0
    return out


def profiles(run):
    names = (artifacts.BASELINE, artifacts.SLIM)
    return [profile_model(ampdeploy.load_slim(run / name)) for name in names]


def stamps(run):
    """When each stage's files were written."""
    return {
        name: [(run / artifact).stat().st_mtime_ns for artifact in record["outputs"]]
        for name, record in Manifest.read(run).data["stages"].items()
    }


@pytest.mark.parametrize(
    ("budget", "reached", "step"),
    [
        (
            ("--params-cut", "0.25"),
            lambda dense, slim: 1 - slim.params / dense.params,
            lambda dense: 16 * NEURON / dense.params,
        ),
        (
            ("--flops-cut", "0.25"),
            lambda dense, slim: 1 - slim.flops / dense.flops,
            lambda dense: 16 * 2 * 128 * dense.tokens / dense.flops,
        ),
        (
            ("--mlp-keep", "0.4"),
            lambda _dense, slim: sum(b.hidden for b in slim.blocks) / (6 * 192),
            lambda _dense: 16 / (6 * 192),
        ),
        (
            ("--mlp-keep", "0.4", "--width-multiple", "8", "--min-width", "40"),
            lambda _dense, slim: sum(b.hidden for b in slim.blocks) / (6 * 192),
            lambda _dense: 8 / (6 * 192),
        ),
    ],
)
def test_another_budget_searches_again_and_is_met(inputs, pruned, capsys, budget, reached, step):
    before = stamps(pruned)
    assert main([*runs.prune_arguments(inputs, pruned, search=budget), "-q"]) == 0
    after = stamps(pruned)
    assert after["load"] == before["load"]
    assert after["score"] == before["score"]
    assert after["search"] != before["search"]
    assert after["slim"] != before["slim"]
    dense, slim = profiles(pruned)
    asked = float(budget[1])
    assert reached(dense, slim) == pytest.approx(asked, abs=step(dense) / 2 + 1e-9)
    multiple = 8 if "--width-multiple" in budget else 16
    assert all(block.hidden % multiple == 0 for block in slim.blocks)
    assert min(block.hidden for block in slim.blocks) >= (40 if "--min-width" in budget else 16)
    # It could be known before.
    capsys.readouterr()
    command = [*runs.prune_arguments(inputs, pruned, search=budget), "--dry-run", "--json"]
    assert main(command) == 0
    expected = json.loads(capsys.readouterr().out)["expected"]
    assert (expected["params_dense"], expected["multiple"]) == (dense.params, multiple)
    assert slim.params == pytest.approx(expected["params"], abs=multiple / 2 * NEURON + 1)
    # And the same again is done already.
    assert main([*runs.prune_arguments(inputs, pruned, search=budget), "-q"]) == 0
    assert stamps(pruned) == after


def test_inspect_shows_what_was_kept(pruned, capsys):
    assert main(["inspect", str(pruned / artifacts.SLIM), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    dense, slim = profiles(pruned)
    assert (facts["params"], facts["params_dense"]) == (slim.params, dense.params)
    assert facts["hidden_dense"] == [block.hidden for block in dense.blocks]
    assert main(["inspect", str(pruned / artifacts.SLIM)]) == 0
    assert f"kept: {slim.params / dense.params:.1%} of" in capsys.readouterr().out


def test_prune_plans_for_the_target(inputs, tmp_path, capsys):
    """On a GPU's grid the tiny model's blocks can only be 64, 128 or 192 wide."""
    command = runs.prune_arguments(inputs, tmp_path / "run", search=("--mlp-keep", "0.5"))
    assert main([*command, "--target", "trt-rtx", "-q"]) == 0
    widths = artifacts.read_json(tmp_path / "run" / artifacts.WIDTHS)
    assert {block["kept"] for block in widths["blocks"]} <= {64, 128, 192}
    assert main([*command, "--target", "ort"]) == 2
    assert "is a build for target trt-rtx, not ort" in capsys.readouterr().err


@pytest.mark.parametrize("repair", ["fold", "mean-shift", "none"])
def test_another_repair_does_not_score_again(inputs, pruned, repair):
    before = stamps(pruned)
    options = (*runs.DIVERGENCE, "--repair", repair)
    assert main([*runs.prune_arguments(inputs, pruned, search=options), "-q"]) == 0
    assert stamps(pruned)["score"] == before["score"]
    found = artifacts.read_json(pruned / artifacts.REPAIR)
    assert found["method"] == {"fold": "least-squares"}.get(repair, repair)
    assert Manifest.read(pruned).facts("slim")["repair"] == found["method"]


def test_amp_as_published_is_a_whole_build(published):
    """Its trace, its slim model, and nothing of the other search."""
    search = artifacts.read_json(published / artifacts.WIDTHS)["search"]
    assert (search["method"], search["criterion"], search["threshold"]) == ("amp", "entropy", 0.002)
    assert len(search["candidates"]) == 6 * 6
    accepted = [c for c in search["candidates"] if c["accepted"]]
    assert search["final_value"] == accepted[-1]["value"]
    assert not (published / artifacts.MOMENTS).exists()
    assert artifacts.read_json(published / artifacts.REPAIR)["method"] == "none"
    report = Report.read(published / artifacts.REPORT_JSON)
    assert report.pruned.params < report.baseline.params
    assert report.method.search == "amp"
    assert report.method.asked == {"threshold": 0.002, "batch_size": 8, "inv_temperature": 15}
    assert report.method.repair == "none"
    dense = ampdeploy.load_slim(published / artifacts.BASELINE)
    slim = ampdeploy.load_slim(published / artifacts.SLIM)
    blocks = artifacts.read_json(published / artifacts.WIDTHS)["blocks"]
    for block, ours, theirs in zip(blocks, slim.blocks, dense.blocks, strict=True):
        kept = torch.tensor(block["indices"])
        assert torch.equal(ours.mlp.fc2.weight, theirs.mlp.fc2.weight[:, kept])
        assert torch.equal(ours.mlp.fc2.bias, theirs.mlp.fc2.bias)


def test_amp_can_be_repaired(inputs, published):
    """The same widths, folded: the moments join the run, and the result is closer."""
    widths = [b["kept"] for b in artifacts.read_json(published / artifacts.WIDTHS)["blocks"]]
    fidelity = Report.read(published / artifacts.REPORT_JSON).fidelity
    options = (*runs.AMP, "--repair", "fold")
    assert main(runs.arguments(inputs, published, "-q", search=options)) == 0
    blocks = artifacts.read_json(published / artifacts.WIDTHS)["blocks"]
    assert [block["kept"] for block in blocks] == widths
    assert (published / artifacts.MOMENTS).exists()
    assert artifacts.read_json(published / artifacts.REPAIR)["method"] == "least-squares"
    report = Report.read(published / artifacts.REPORT_JSON)
    assert report.method.repair == "least-squares"
    assert report.fidelity.cosine_mean > fidelity.cosine_mean


def test_a_model_without_biases_goes_all_the_way(inputs, tmp_path):
    """The fold adds biases; checkpoint, export and its check against PyTorch take them."""
    out, weights = tmp_path / "run", runs.tiny_weights(tmp_path / "nobias.safetensors", NO_BIAS)
    command = runs.prune_arguments(inputs, out)
    for option, value in (("--model", NO_BIAS), ("--weights", str(weights))):
        command[command.index(option) + 1] = value
    assert main([*command, "-q"]) == 0
    slim = ampdeploy.load_slim(out / artifacts.SLIM)
    assert all(bool(block.mlp.fc2.bias.any()) for block in slim.blocks)
    dense, small = profiles(out)
    half_a_step = 8 * 3 * 64 / dense.params
    assert 1 - small.params / dense.params == pytest.approx(runs.CUT, abs=half_a_step)
    assert main(["export", str(out), "-q"]) == 0  # checks ONNX Runtime against PyTorch
    sizes = [(out / n).stat().st_size for n in (artifacts.MODEL_ONNX, artifacts.BASELINE_ONNX)]
    assert sizes[0] < 0.9 * sizes[1]
