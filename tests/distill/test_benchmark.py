"""benchmarks/distill/run.py from end to end on a tiny run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ampdeploy.artifacts import BASELINE, SLIM
from ampdeploy.checkpoint import save_model
from benchmarks.distill import run as benchmark
from tests.distill.tiny_run import make_pair

HELD_OUT = 5


@pytest.fixture
def arguments(train_folder, tmp_path):
    """Options of a run whose held-out images lie inside the training folder."""
    student, teacher = make_pair()
    run = tmp_path / "run"
    run.mkdir()
    kept = [torch.arange(site.hidden) for site in student.spec.sites]
    save_model(teacher, run / BASELINE)
    save_model(student, run / SLIM, kept=kept)
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for path in sorted(train_folder.iterdir())[:HELD_OUT]:
        (held_out / f"renamed_{path.name}").write_bytes(path.read_bytes())
    options = {
        "run": run,
        "epochs": 2,
        "images": train_folder,
        "eval": held_out,
        "out": tmp_path / "results" / "distill.json",
        "batch-size": 4,
        "base-lr": 0.05,
        "device": "cpu",
        "checkpoint-seconds": 0,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def result_of(arguments):
    path = Path(arguments[arguments.index("--out") + 1])
    return json.loads(path.read_text()), path


def test_result_has_fidelity_before_and_after_every_epoch(arguments, tmp_path):
    benchmark.main(arguments)
    result, _ = result_of(arguments)
    assert result["train"]["images"] == 15
    assert result["train"]["taken_out"] == HELD_OUT  # by content: their names differ
    assert [row["epoch"] for row in result["fidelity"]] == [0, 1, 2]
    assert {row["images"] for row in result["fidelity"]} == {HELD_OUT}
    assert result["before"] == result["fidelity"][0]
    assert result["after"]["cosine_mean"] > result["before"]["cosine_mean"] + 0.1
    assert 0 < result["after"]["patch_cosine_mean"] <= 1
    assert result["student"]["params"] < result["teacher"]["params"]
    assert len(result["history"]) == result["training"]["steps"] == 2 * (15 // 4)
    assert result["training"]["seconds_per_step"] > 0
    assert result["host"]["packages"]["torch"]
    assert not (tmp_path / "run" / "bench-distill").exists()
    assert str(tmp_path) not in json.dumps({**result, "host": None})


def test_stopped_between_epochs_it_gives_the_same_result(arguments, monkeypatch, caplog):
    benchmark.main(arguments)
    alone, path = result_of(arguments)

    measure = benchmark.measure_fidelity
    measured = []

    def stop_at_second(*models_and_images):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(measure(*models_and_images))
        return measured[-1]

    path.unlink()
    monkeypatch.setattr(benchmark, "measure_fidelity", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(arguments)
    assert not path.exists()
    monkeypatch.setattr(benchmark, "measure_fidelity", measure)
    benchmark.main([*arguments, "--checkpoint-seconds", "60"])  # no part of what was computed
    assert "steps 4 to 6" in caplog.text
    resumed, _ = result_of(arguments)
    assert resumed["fidelity"] == alone["fidelity"]
    assert resumed["history"] == alone["history"]


def test_a_folder_that_is_no_run_is_an_error_not_a_traceback(arguments, tmp_path):
    (tmp_path / "run" / SLIM).unlink()
    with pytest.raises(SystemExit, match=r"error: .*slim\.safetensors does not exist"):
        benchmark.main(arguments)
