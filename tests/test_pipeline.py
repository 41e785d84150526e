"""The whole pipeline on a tiny ViT: what it writes, what it skips, and how it survives a kill."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import ampdeploy
from ampdeploy import artifacts
from ampdeploy.artifacts import Manifest, sha256_file
from ampdeploy.cli import main
from ampdeploy.report.result import Report
from tests import runs

# Everything whose bytes depend only on inputs and options, not on the clock.
DETERMINISTIC = (
    artifacts.BASELINE,
    artifacts.MOMENTS,
    artifacts.SCORES,
    artifacts.WIDTHS,
    artifacts.REPAIR,
    artifacts.SLIM,
    artifacts.DISTILLED,
    artifacts.BASELINE_ONNX,
    artifacts.MODEL_ONNX,
    artifacts.EXPORT,
    artifacts.EVAL,
)


def hashes(folder: Path) -> dict[str, str]:
    return {name: sha256_file(folder / name) for name in DETERMINISTIC if (folder / name).exists()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(runs.arguments(inputs, out, "-q")) == 0
    return out


def test_the_run_directory_holds_the_contract(finished):
    views = (artifacts.REPORT_MD, artifacts.REPORT_HTML)
    for name in (*DETERMINISTIC, artifacts.BENCH, artifacts.REPORT_JSON, *views):
        assert (finished / name).exists() == (name != artifacts.DISTILLED), name
    assert not list(finished.glob("*.tmp")) + list(finished.glob(".*.tmp"))
    manifest = Manifest.read(finished)
    assert list(manifest.data["stages"]) == [
        "data", "load", "score", "search", "slim", "export", "eval", "bench", "report",
    ]  # fmt: skip
    for name in manifest.data["stages"]:
        for artifact, digest in manifest.stage(name).outputs.items():
            assert sha256_file(finished / artifact) == digest
    files = manifest.facts("data")["calib"]["files"]
    assert len(files) == 16
    assert all(len(file[1]) == 64 for file in files)
    assert manifest.data["weights"]["sha256"] == sha256_file(
        Path(manifest.data["config"]["model"]["weights"])
    )


def test_the_model_is_physically_smaller_and_so_is_its_file(finished):
    dense = ampdeploy.load_slim(finished / artifacts.BASELINE)
    slim = ampdeploy.load_slim(finished / artifacts.SLIM)
    params = [sum(p.numel() for p in model.parameters()) for model in (dense, slim)]
    assert params[1] < params[0]
    sizes = [(finished / n).stat().st_size for n in (artifacts.BASELINE_ONNX, artifacts.MODEL_ONNX)]
    assert sizes[0] - sizes[1] == pytest.approx(4 * (params[0] - params[1]), rel=0.02)
    with torch.no_grad():
        assert slim(torch.zeros(1, 3, 160, 160)).features.shape == (1, 64)


def test_widths_hold_indices_and_everything_that_was_tried(finished):
    widths = artifacts.read_json(finished / artifacts.WIDTHS)
    slim = ampdeploy.load_slim(finished / artifacts.SLIM)
    assert [len(b["indices"]) for b in widths["blocks"]] == [b["kept"] for b in widths["blocks"]]
    assert [b["kept"] for b in widths["blocks"]] == [s.hidden for s in slim.spec.sites]
    search = widths["search"]
    assert (search["method"], search["params_cut"], search["width_multiple"]) == (
        "divergence", runs.CUT, 16,
    )  # fmt: skip
    assert [m["block"] for m in search["measurements"]] == list(range(6))
    assert all(0 < m["measured"]["cosine"] < 1 for m in search["measurements"])
    tried = search["allocations"]
    assert [a["exponent"] for a in tried] == [0, 0.5, 1]
    assert tried[search["chosen"]]["widths"] == [b["kept"] for b in widths["blocks"]]
    totals = [a["verified"]["cosine"] + a["verified"]["patch_cosine"] for a in tried]
    assert search["chosen"] == totals.index(min(totals))
    # 16 images: 8 for the moments, 4 measured, 4 verified; 6 blocks.
    assert (search["measured_images"], search["verified_images"]) == (4, 4)
    forwards = 4 * (5 + 1 + 21) + 4 * 6 * 4
    assert search["block_forwards_per_image"] == pytest.approx(forwards / 16, abs=1e-3)


def test_the_budget_is_met_and_the_repair_is_on_record(finished):
    report = Report.read(finished / artifacts.REPORT_JSON)
    # Half a grid step: 8 neurons of 129 parameters.
    cut = 1 - report.pruned.params / report.baseline.params
    assert cut == pytest.approx(runs.CUT, abs=8 * 129 / report.baseline.params)
    assert report.method.asked == {"params_cut": runs.CUT}
    assert report.method.search == "divergence"
    repair = artifacts.read_json(finished / artifacts.REPAIR)
    assert repair["method"] == report.method.repair
    assert (repair["fitted_images"], repair["verified_images"]) == (12, 4)
    losses = {
        "least-squares": repair["folded"]["cosine"] + repair["folded"]["patch_cosine"],
        "refit": repair["refitted"]["cosine"] + repair["refitted"]["patch_cosine"],
    }
    assert losses[repair["method"]] == min(losses.values())
    assert [block["block"] for block in repair["blocks"]] == list(range(6))


def test_moments_and_scores_are_those_of_any_other_process(inputs, finished, tmp_path):
    process = runs.start(runs.prune_arguments(inputs, tmp_path / "run"))
    _, shown = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    ours, theirs = hashes(tmp_path / "run"), hashes(finished)
    assert artifacts.MOMENTS in ours
    assert artifacts.SLIM in ours
    assert ours.items() <= theirs.items()


def test_the_report_is_complete(finished):
    report = Report.read(finished / artifacts.REPORT_JSON)
    assert report.pruned.params < report.baseline.params
    assert report.ratio.file_bytes < 1
    assert set(report.baseline.latency_ms) == {"1", "2"}
    assert report.baseline.latency_ms["1"].n >= 30
    assert report.fidelity.images == 17
    assert report.baseline.accuracy.keys() == {
        "knn_top1", "knn_k10_top1", "retrieval_recall1", "retrieval_map_r", "probe_top1",
        "frozen_probe_top1",
    }  # fmt: skip
    assert report.tasks.keys() == report.ratio.accuracy_difference.keys()
    assert report.tasks.keys() == report.baseline.accuracy.keys()
    assert report.weights.source.endswith("tiny.safetensors")
    text = (finished / artifacts.REPORT_MD).read_text()
    assert f"{report.fidelity.cosine_mean:.3f}"[:4] in text


def test_running_again_does_nothing(inputs, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*.*") if path.is_file()}
    assert main(runs.arguments(inputs, finished)) == 0
    shown = capsys.readouterr()
    assert shown.err.count("up to date") == 9
    after = {path: path.stat().st_mtime_ns for path in finished.glob("*.*") if path.is_file()}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {artifacts.MANIFEST, ".lock"}
    assert "report.md" in shown.out


def test_a_damaged_artifact_is_made_again_and_the_rest_follows(inputs, finished, capsys):
    expected = hashes(finished)
    (finished / artifacts.SLIM).write_bytes(b"rubbish")
    assert main(runs.arguments(inputs, finished)) == 0
    shown = capsys.readouterr().err
    # data, load, score, search stand; slim is redone and is what it was, so export stands too.
    assert shown.count("up to date") == 8
    assert hashes(finished) == expected


def test_dry_run_names_what_would_run_and_writes_nothing(inputs, finished, tmp_path, capsys):
    out = tmp_path / "new"
    assert main(runs.arguments(inputs, out, "--dry-run")) == 0
    assert capsys.readouterr().out.count("would run") == 9
    assert not out.exists()
    for budget in (("--params-cut", "0.3"), ("--flops-cut", "0.1"), ("--mlp-keep", "0.5")):
        changed = runs.arguments(inputs, finished, "--dry-run", "--json", search=budget)
        assert main(changed) == 0
        stages = json.loads(capsys.readouterr().out)["stages"]
        states = {stage["name"]: stage["state"] for stage in stages}
        assert states["load"] == states["score"] == "up to date"
        assert states["search"] == "would run"
        assert states["slim"] == states["export"] == "may run"
    # Which images are chosen is only known when the data stage has run.
    changed = [*runs.arguments(inputs, finished), "--eval-images", "16", "--dry-run", "--json"]
    assert main(changed) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    states = {stage["name"]: stage["state"] for stage in stages}
    assert states["data"] == "would run"
    assert states["load"] == "up to date"
    assert states["score"] == "may run"


def test_other_evaluation_images_or_another_place_do_not_prune_again(
    inputs, finished, tmp_path, capsys
):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(finished, run)
    shutil.copytree(inputs, moved)
    assert main([*runs.arguments(moved, run), "--eval-images", "16"]) == 0
    shown = capsys.readouterr().err
    for stage in ("score", "search", "slim"):
        assert f"{stage:7} up to date" in shown
    assert "data    choose" in shown
    assert "eval    fidelity" in shown


def test_another_machine_measures_again(finished, monkeypatch):
    from ampdeploy.bench import host
    from ampdeploy.pipeline import rerun_config, status

    before = {stage.name: state for stage, state in status(rerun_config(finished))}
    monkeypatch.setattr(host, "cpu_model", lambda: "another CPU")
    after = {stage.name: state for stage, state in status(rerun_config(finished))}
    assert before["bench"] == "up to date"
    assert after["bench"] == "would run"
    assert after["export"] == "up to date"


def test_a_new_version_of_a_package_reruns_only_what_uses_it(finished, monkeypatch):
    import importlib.metadata

    from ampdeploy.pipeline import rerun_config, status

    real = importlib.metadata.version
    fake = lambda name: "99" if name == "onnxruntime" else real(name)  # noqa: E731
    monkeypatch.setattr(importlib.metadata, "version", fake)
    states = {stage.name: state for stage, state in status(rerun_config(finished))}
    assert states["search"] == states["slim"] == "up to date"
    assert states["export"] == states["eval"] == "would run"


def test_out_of_memory_names_the_options_that_need_less(finished, tmp_path, capsys, monkeypatch):
    from ampdeploy.prune import moments

    def too_large(*_arguments, **_options):
        torch.empty(1 << 60)  # the allocator's own error

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / artifacts.SCORES).unlink()
    monkeypatch.setattr(moments, "collect", too_large)
    assert main(["export", str(run)]) == 1
    shown = capsys.readouterr().err
    assert "stage 'score' ran out of memory" in shown
    assert "--micro-batch" in shown
    assert "Traceback" not in shown


def test_later_verbs_do_not_repeat_no_resume_and_prune_keeps_the_rest(
    inputs, finished, tmp_path, capsys
):
    from ampdeploy.pipeline import rerun_config

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    prune = runs.prune_arguments(inputs, run)
    assert main([*prune, "--no-resume"]) == 0
    capsys.readouterr()
    config = rerun_config(run)
    assert config.resume
    assert config.bench.batch_sizes == (1, 2)  # the build's, which prune knows nothing about
    assert main(["export", str(run)]) == 0
    shown = capsys.readouterr().err
    assert shown.count("up to date") == 5  # data, load, score, search, slim


def test_a_model_that_is_not_the_runs_present_one_is_not_judged(inputs, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    judge = ["eval", "--run", str(run), "--images", str(inputs), "-q"]
    assert main(judge) == 0
    assert main(["distill", str(run), "--epochs", "1", "--batch-size", "8", "-q"]) == 0
    assert f"ampdeploy report {run} --update" in capsys.readouterr().out
    for command in (judge, ["report", str(run)]):
        assert main(command) == 1
        assert "not run since the run last changed" in capsys.readouterr().err
    assert main([*judge, "--target", "torch"]) == 0  # the distilled checkpoint is current
    assert main(["report", str(run), "--update", "-q"]) == 0
    assert main(judge) == 0
    assert Report.read(run / artifacts.REPORT_JSON).method.distill_epochs == 1


def test_a_failed_verb_leaves_the_run_as_it_was(inputs, finished, tmp_path, capsys):
    run, empty = tmp_path / "run", tmp_path / "empty"
    shutil.copytree(finished, run)
    empty.mkdir()
    before = Manifest.read(run).data
    command = ["distill", str(run), "--epochs", "1", "--images", str(empty)]
    assert main(command) == 1
    assert "empty" in capsys.readouterr().err
    assert Manifest.read(run).data == before
    assert main(["report", str(run)]) == 0


def test_python_api_and_torch_target(inputs, tmp_path):
    from ampdeploy import BenchConfig, BuildConfig, DataConfig, ModelConfig, PruneConfig

    runs.arguments(inputs, tmp_path)  # makes the inputs
    images = tmp_path / "images"
    shutil.copytree(inputs / "train", images)
    # One broken file among 41 is under the 5% that a folder may hold.
    (images / "broken.jpg").write_text("no image")
    run = ampdeploy.build(
        BuildConfig(
            model=ModelConfig(name=runs.TINY, weights=str(inputs / "tiny.safetensors")),
            data=DataConfig(calib=images, calib_images=8),
            target="torch",
            prune=PruneConfig(search="amp", criterion="cross-entropy", batch_size=8),
            bench=BenchConfig(batch_sizes=(1,), min_runs=5, max_seconds=0.5),
            out=tmp_path / "api",
        )
    )
    report = Report.read(run.path(artifacts.REPORT_JSON))
    assert report.target == "torch"
    # Without --eval, the images that calibration did not draw are judged on.
    assert report.fidelity.images == 40 - 8
    assert report.data.calib.skipped.keys() == {"broken.jpg"}
    assert "broken.jpg" in run.path(artifacts.REPORT_MD).read_text()
    calib = {file[1] for file in run.facts("data")["calib"]["files"]}
    judged = {file[1] for file in run.facts("data")["queries"]["files"]}
    assert not calib & judged


def test_verbs_on_a_finished_run(inputs, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert main(["eval", "--run", str(run), "--images", str(inputs), "--json", "-q"]) == 0
    judged = json.loads(capsys.readouterr().out)
    stored = artifacts.read_json(run / artifacts.EVAL)
    assert judged["fidelity"] == stored["fidelity"]
    assert judged["accuracy"] == stored["accuracy"]

    pair = [str(run / artifacts.SLIM), "--baseline", str(run / artifacts.BASELINE)]
    flat = tmp_path / "flat"
    flat.mkdir()
    for image in sorted((inputs / "val").rglob("*.jpg")):
        shutil.copy(image, flat / f"{image.parent.name}-{image.name}")
    assert main(["eval", *pair, "--images", str(flat), "--json", "-q"]) == 0
    unlabelled = json.loads(capsys.readouterr().out)
    assert unlabelled["accuracy"] is None
    assert "no labels" in unlabelled["why"]["accuracy"]
    # The same slim model through PyTorch and through ONNX Runtime is equally far from the dense.
    assert unlabelled["fidelity"]["cosine_mean"] == pytest.approx(
        judged["fidelity"]["cosine_mean"], abs=1e-4
    )

    short = ["--batches", "1", "--min-runs", "5", "--seconds", "0.5", "--threads", "1"]
    command = ["bench", "--run", str(run), "--images", str(flat), "--json", "-q", *short]
    assert main(command) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["latency"]["1"]["baseline"]["n"] >= 5

    (run / artifacts.REPORT_MD).unlink()
    assert main(["report", str(run), "--markdown"]) == 0
    assert capsys.readouterr().out == (run / artifacts.REPORT_MD).read_text()
    assert main(["inspect", str(run / artifacts.SLIM), "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert inspected["params"] == Report.read(run / artifacts.REPORT_JSON).pruned.params
    assert main(["export", str(run), "-q"]) == 0
    assert main(["distill", str(run), "--epochs", "1", "--batch-size", "8", "-q"]) == 0
    assert (run / artifacts.DISTILLED).exists()
    assert "loss" in capsys.readouterr().out
    assert sha256_file(run / artifacts.DISTILLED) != sha256_file(run / artifacts.SLIM)


@pytest.mark.slow
def test_killed_at_any_stage_it_continues_and_ends_the_same(inputs, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ["--distill-epochs", "2"]
    assert main(runs.arguments(inputs, whole, "-q", *command)) == 0
    for stage in ("data", "load", "score", "search", "slim", "distill", "export", "eval", "bench"):
        process = runs.start(runs.arguments(inputs, broken, *command))
        while stage not in finished_stages(broken) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = runs.start(runs.arguments(inputs, broken, *command))
    _, shown = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    assert "search  up to date" in shown
    assert hashes(broken) == hashes(whole)
    assert (broken / artifacts.DISTILLED).exists()
    assert not list(broken.glob(".*.tmp"))
    assert not (broken / artifacts.DISTILL_STATE).exists()


def finished_stages(folder: Path) -> list[str]:
    if not (folder / artifacts.MANIFEST).exists():
        return []
    return list(Manifest.read(folder).data["stages"])


def test_ctrl_c_says_how_to_go_on(inputs, tmp_path):
    out = tmp_path / "run"
    process = runs.start(runs.arguments(inputs, out))
    while "data" not in finished_stages(out) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "run the same command again to go on" in shown
    assert "Traceback" not in shown
    assert not list(out.glob(".*.tmp"))
