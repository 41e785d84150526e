"""Tasks and head as options, of the API, the command line and the manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from ampdeploy.cli import main
from ampdeploy.commands.common import evaluate_config
from ampdeploy.config import (
    DEFAULT_TASKS,
    BuildConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    from_json,
    to_json,
)
from ampdeploy.errors import ConfigError
from ampdeploy.stages import measure
from ampdeploy.stages import plan as plan_module
from ampdeploy.stages.measure import eval_options
from ampdeploy.stages.plan import plan


def config(**changes) -> BuildConfig:
    data, model = DataConfig(calib=Path("c")), ModelConfig(name="dinov2_s")
    return BuildConfig(model=model, data=data, evaluate=EvaluateConfig(**changes))


def test_a_head_brings_its_task():
    assert EvaluateConfig().tasks == DEFAULT_TASKS
    assert EvaluateConfig(head="h.npz").tasks == (*DEFAULT_TASKS, "supervised")
    assert EvaluateConfig(tasks=()).tasks == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("knnn",)}, "unknown task 'knnn'.*'knn'"),
        ({"tasks": ("knn", "knn")}, "each of them once"),
        ({"tasks": ("supervised",)}, "give its file with --head"),
        ({"tasks": ("knn",), "head": "h.npz"}, "Add it, or leave --head out"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**options)


def test_the_command_lines_words():
    assert evaluate_config(None, None) == EvaluateConfig()
    assert evaluate_config("retrieval, knn", None).tasks == ("retrieval", "knn")
    assert evaluate_config("none", None).tasks == ()
    assert evaluate_config("supervised", Path("h.npz")).head == Path("h.npz").resolve()
    with pytest.raises(ConfigError, match="unknown task ''"):
        evaluate_config("", None)


def test_a_manifest_gives_the_same_back():
    made = config(tasks=("knn", "supervised"), head="h.npz")
    assert from_json(to_json(made)) == made
    before = to_json(config())
    del before["evaluate"]  # written before there were tasks
    assert from_json(before).evaluate == EvaluateConfig()


def test_the_stage_depends_on_tasks_and_on_what_the_head_holds(tmp_path):
    head, other = tmp_path / "a.npz", tmp_path / "b.npz"
    head.write_bytes(b"one")
    other.write_bytes(b"one")
    tasks = ("knn", "supervised")
    assert eval_options(config(tasks=("knn",))) != eval_options(config(tasks=("retrieval",)))
    first = eval_options(config(tasks=tasks, head=head))
    assert eval_options(config(tasks=tasks, head=other)) == first
    head.write_bytes(b"two")
    assert eval_options(config(tasks=tasks, head=head)) != first
    head.unlink()
    with pytest.raises(ConfigError, match="there is no head file"):
        eval_options(config(tasks=tasks, head=head))


def test_another_version_of_the_report_is_measured_anew(monkeypatch):
    """Or its report would be put together from files that lack what it holds."""
    stages = {stage.name: stage for stage in plan(config())}
    before = {name: stages[name].options(config()) for name in ("eval", "bench", "report")}
    for module in (measure, plan_module):
        monkeypatch.setattr(module, "SCHEMA_VERSION", 99)
    for name, options in before.items():
        assert stages[name].options(config()) != options


def test_a_build_reads_its_head_before_it_prunes(tmp_path, capsys):
    (tmp_path / "head.npz").write_bytes(b"rubbish")
    command = ["build", "--model", "timm:test_vit", "--calib", str(tmp_path), "--out"]
    assert main([*command, str(tmp_path / "run"), "--head", str(tmp_path / "head.npz")]) == 1
    assert "is not an npz archive" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
