"""The command line as a whole: frozen options, exit codes, quick help."""

from __future__ import annotations

import json

import click
import pytest

from ampdeploy import cli
from ampdeploy.cli import VERBS, main
from ampdeploy.commands import build
from ampdeploy.commands.common import build_config
from ampdeploy.models.registry import REGISTRY

# The command line is a promise. Adding an option means adding it here, on purpose.
OPTIONS = {
    "build": "--batch --bench-batches --bench-loads --bench-seconds --calib --calib-images "
    "--compute-capability --criterion --device --distill-epochs --dry-run --energy-seconds "
    "--engine --engine-batch --entropy-threshold --eval --eval-images --flops-cut --head "
    "--image-size --inv-temperature --json --memory-limit --micro-batch --min-cosine-p1 "
    "--min-width --mlp-keep --model --no-resume --out --params-cut --portable --precision --quiet "
    "--repair "
    "--resume --search --seed --strip-weights --target --tasks --threads --verbose --weights "
    "--width-multiple -q -v",
    "prune": "--batch --calib --calib-images --criterion --device --dry-run --entropy-threshold "
    "--eval --eval-images --flops-cut --image-size --inv-temperature --json --micro-batch "
    "--min-width --mlp-keep --model --no-resume --out --params-cut --quiet --repair --resume "
    "--search --seed --target --verbose --weights --width-multiple -q -v",
    "distill": "--autocast --base-lr --batch-size --device --epochs --images --json --min-scale "
    "--plain-augment --quiet --strong-augment --verbose --warmup-epochs -q -v run",
    "export": "--json --max-relative-diff --opset --quiet --verbose -q -v run",
    "engine": "--json --memory-limit --no-compare --out --quiet --target --untested --verbose "
    "-q -v path",
    "eval": "--baseline --head --images --json --labels --limit --no-labels --quiet --run --seed "
    "--target --tasks --verbose -q -v artifact",
    "bench": "--baseline --batches --energy-seconds --images --in-flight --inputs --json "
    "--loads --min-runs --quiet --run --seconds --target --threads --throughput-seconds --verbose "
    "-q -v artifact",
    "report": "--check --html --json --markdown --md --quiet --update --verbose -q -v paths",
    "explain": "--baseline --batch --json --quiet --runs --threads --verbose -q -v path",
    "bundle": "--json --out --quiet --verbose -q -v run",
    "gate": "--baseline-report --json --junit --markdown --max-accuracy-drop --max-compute-p50-ms "
    "--max-compute-p99-ms --max-compute-ratio --max-cuda-graph-ratio --max-energy "
    "--max-energy-ratio --max-file-ratio --max-file-size --max-flops --max-latency-ratio "
    "--max-memory --max-memory-ratio --max-p50-ms --max-p90-ms --max-p99-ms --max-params "
    "--max-regression --min-accuracy --min-cosine-mean --min-cosine-min --min-cosine-p1 "
    "--min-flops-cut --min-knn-agreement --min-params-cut --min-patch-cosine-mean "
    "--min-patch-cosine-p1 --min-throughput --min-throughput-ratio --quiet --regression-of "
    "--require --rules --undecided --verbose -q -v path",
    "inspect": "--image-size --json --model --quiet --verbose -q -v checkpoint",
    "models": "--json --quiet --verbose -q -v",
    "doctor": "--json --quiet --verbose -q -v",
}


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_frozen(verb):
    command = cli.cli.get_command(click.Context(cli.cli), verb)
    names = sorted(n for p in command.params for n in (*p.opts, *p.secondary_opts))
    assert names == sorted(OPTIONS[verb].split())
    assert command.help


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 << 30), ("2048MB", 2 << 30), ("512 MiB", 1 << 29), ("1.5gib", 3 << 29)],
)
def test_a_memory_limit_is_an_amount_with_its_unit(text, size):
    arguments = ["--model", "dinov2_s", "--target", "trt", "--memory-limit", text]
    given = build.command.make_context("build", arguments).params
    assert build_config(given).engine.memory_limit_bytes == size


@pytest.mark.parametrize("text", ["2", "2048", "-1GB", "0MB", "much", "", "2TB", "2GB!"])
def test_any_other_memory_limit_is_refused(text, tmp_path, capsys):
    (tmp_path / "bundle.tar").touch()
    for command in (
        ["build", "--model", "dinov2_s", "--target", "trt"],
        ["engine", str(tmp_path / "bundle.tar")],
    ):
        assert main([*command, f"--memory-limit={text}"]) == 2
        assert f"--memory-limit {text!r} is no amount of memory" in capsys.readouterr().err


def test_without_an_engine_there_is_no_memory_limit(capsys):
    assert main(["build", "--model", "dinov2_s", "--memory-limit", "2GB", "--dry-run"]) == 2
    assert "target ort builds no engine whose memory" in capsys.readouterr().err


def test_models_lists_the_registry(capsys):
    assert main(["models", "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} == set(REGISTRY)
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in REGISTRY)


def test_inspect_counts_dinov2_giant(capsys):
    assert main(["inspect", "--model", "dinov2_g", "--image-size", "518", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["params"] == pytest.approx(facts["published"]["params"], rel=0.001)
    assert facts["flops"] == pytest.approx(facts["published"]["flops"], rel=0.001)
    assert len(facts["blocks"]) == 40
    assert all(site["gated"] and site["packed"] for site in facts["spec"]["sites"])
    assert main(["inspect", "--model", "dinov2_g"]) == 0
    assert "published: 1136.50 M" in capsys.readouterr().out


def test_doctor_reports_every_target(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["targets"]["ort"] is None
    assert facts["targets"]["torch"] is None
    assert facts["modules"]["torch"]["version"]
    assert main(["doctor"]) == 0
    assert "Targets:" in capsys.readouterr().out


def test_a_bug_of_ours_keeps_its_traceback_and_exits_70(monkeypatch, capsys):
    from ampdeploy.models import registry

    monkeypatch.setattr(registry, "lookup", None)  # a bug, whichever
    assert main(["inspect", "--model", "dinov2_s"]) == 70
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "bug in ampdeploy" in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert "ampdeploy, version" in capsys.readouterr().out
