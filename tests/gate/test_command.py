"""`ampdeploy gate` as CI calls it: exit codes, files, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ampdeploy.cli import main
from ampdeploy.gate import views
from ampdeploy.gate.gate import GateConfig, run_gate
from ampdeploy.gate.rules import parse_rule
from tests.gate.junit_schema import parse
from tests.report.samples import bare_report, engine_report, few_images, sample_report

BOTH = ("--max-params", "17M", "--max-latency-ratio", "0.8")
ONE_OF_EACH = (
    "--max-params", "17M", "--max-p50-ms", "1=10", "--max-latency-ratio", "8=0.75",
    "--max-energy-ratio", "0.9",
)  # fmt: skip


@pytest.fixture
def report(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "report.json"
    sample_report().write(path)
    return path


def gate(*arguments) -> int:
    return main(["gate", *map(str, arguments)])


def test_exit_codes(report, capsys):
    assert gate(report, *BOTH) == 0
    assert "Gate passed: 3 pass" in capsys.readouterr().out
    for broken in (("--max-params", "16M"), ("--max-latency-ratio", "8=0.75"), ("--max-energy", 1)):
        assert gate(report, *broken) == 3
        assert "does not pass. Gate failed: 1" in capsys.readouterr().err
    assert gate(report) == 2
    assert "no rule" in capsys.readouterr().err
    assert gate(report, "--max-params", "few") == 2
    assert gate(report, "--max-latncy-ratio", "1") == 2
    assert "--max-latency-ratio" in capsys.readouterr().err
    assert gate("none.json", *BOTH) == 1
    assert "does not exist" in capsys.readouterr().err
    report.write_text("{")
    assert gate(report, *BOTH) == 1
    report.write_text('{"schema_version": 1}')
    assert gate(report, *BOTH) == 1
    assert "schema version 1" in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert gate(tmp_path, *BOTH) == 1
    assert "not a run of ampdeploy" in capsys.readouterr().err


def test_undecided_closes_the_gate_unless_told_otherwise(report, capsys):
    rule = ("--max-latency-ratio", "8=0.75")
    assert gate(report, *rule) == 3
    assert gate(report, *rule, "--undecided", "fail") == 3
    shown = capsys.readouterr().out
    assert "undecided     max-latency-ratio 0.750, batch 8: 0.752 [0.740, 0.769]; " in shown
    assert gate(report, *rule, "--undecided", "pass") == 0
    assert "Gate passed: 1 undecided (undecided passes)" in capsys.readouterr().out
    # That does not let failures or nulls through.
    assert gate(report, *rule, "--max-params", "1", "--undecided", "pass") == 3
    assert gate(report, *rule, "--max-energy", "1", "--undecided", "pass") == 3
    assert gate(report, *rule, "--undecided", "maybe") == 2
    assert "unknown 'maybe'" in capsys.readouterr().err


def test_one_line_per_rule_with_the_samples_that_would_settle_it(report, capsys):
    gate(report, "--max-latency-ratio", "0.76", "--min-cosine-p1", "0.9")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "batch 1" in lines[0]
    # (0.762 - 0.75) must become 0.01: 5 * 1.44.
    assert "about 8 loads would, as likely as not, settle it (5 now)" in lines[0]
    assert lines[2].startswith("pass          min-cosine-p1 0.9000: 0.9512 [0.9472, 0.9532]; the ")


def test_an_open_end_is_undecided_in_every_output(report, capsys):
    sample_report(fidelity=few_images()).write(report)
    rule = ("--min-cosine-p1", "0.9")
    assert gate(report, *rule, "--junit", "gate.xml", "--markdown", "gate.md") == 3
    shown = capsys.readouterr().out
    assert (
        "undecided     min-cosine-p1 0.9000: 0.9512 [–, 0.9532]; the 95% interval has no" in shown
    )
    assert "180 images; about 368 would give the lower end" in shown
    assert "0.9512 [–, 0.9532]" in Path("gate.md").read_text()
    assert parse(Path("gate.xml").read_text()).get("failures") == "1"
    assert gate(report, *rule, "--json") == 3
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["status"], finding["ci95_low"], finding["ci95_high"]) == (
        "undecided", None, pytest.approx(0.9532),
    )  # fmt: skip


def test_a_task_that_was_left_out_closes_the_gate(report, capsys):
    sample_report(tasks_left_out={"probe": "one class"}).write(report)
    assert gate(report, "--max-accuracy-drop", "5", "--undecided", "pass") == 3
    assert "not measured  max-accuracy-drop 5.00 pp, task probe: one class" in (
        capsys.readouterr().out
    )
    assert gate(report, "--max-accuracy-drop", "knn_top1=5") == 0


def test_json_holds_every_number(report, capsys):
    assert gate(report, *ONE_OF_EACH, "--json") == 3
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] is False
    by_rule = {finding["rule"].split()[0]: finding for finding in data["findings"]}
    assert {f["status"] for f in data["findings"]} == {
        "pass", "fail", "undecided", "not measured",
    }  # fmt: skip
    latency = by_rule["max-latency-ratio"]
    assert (latency["value"], latency["ci95_low"], latency["ci95_high"]) == (0.752, 0.74, 0.769)
    assert (latency["limit"], latency["samples"], latency["scope"]) == (0.75, 5, "batch 8")
    assert latency["samples_to_settle"] > 100
    assert by_rule["max-energy-ratio"]["value"] is None
    assert [f["blocks"] for f in data["findings"]].count(True) == 3


def test_junit(report, capsys):
    assert gate(report, *ONE_OF_EACH, "--junit", "gate.xml") == 3
    suite = parse(Path("gate.xml").read_text())
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "3", "0")
    kinds = {case.find("failure").get("type") for case in suite.iter("testcase") if len(case)}
    assert kinds == {"fail", "undecided", "not measured"}
    assert "Gate failed" in suite.find("system-out").text
    assert gate(report, *ONE_OF_EACH[4:6], "--undecided", "pass", "--junit", "gate.xml") == 0
    suite = parse(Path("gate.xml").read_text())
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")


def test_hostile_names_break_no_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = 'a|b<c>&"d"\x00\x1b[31m\ufffe\n@team [link](http://x) `x` *y*'
    why = {"energy": name, "cuda_graph_compute": "none"}
    report = sample_report(model=name)
    report = dataclasses.replace(report, ratio=dataclasses.replace(report.ratio, why=why))
    report.write(tmp_path / "report.json")
    outputs = ("--junit", "gate.xml", "--markdown", "gate.md")
    assert gate("report.json", "--max-energy-ratio", "1", *outputs) == 3
    assert len(capsys.readouterr().out.splitlines()) == 2
    parse(Path("gate.xml").read_text())
    text = Path("gate.md").read_text()
    row = next(line for line in text.splitlines() if "max-energy-ratio" in line)
    assert row.count("|") - row.count("\\|") == 5
    for active in ("@team", "[link]", "<c>", "`x`", " *y*"):
        assert active not in text


def test_markdown(report):
    assert gate(report, *ONE_OF_EACH, "--markdown", "gate.md") == 3
    lines = Path("gate.md").read_text().splitlines()
    assert lines[0] == "### Gate failed: 1 fail, 1 not measured, 1 undecided, 1 pass"
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert [row.split("|")[1].strip() for row in rows] == [
        "pass", "**FAIL**", "**undecided**", "**not measured**",
    ]  # fmt: skip
    assert all(row.count("|") == 5 for row in rows)


def test_nothing_that_is_read_or_special_is_written_over(report, tmp_path, capsys):
    old = tmp_path / "old.json"
    sample_report().write(old)
    before = report.read_text()
    against = ("--baseline-report", old, "--max-regression", "50%")
    for outputs in (
        ("--junit", report), ("--markdown", "./report.json"), ("--markdown", old),
        ("--junit", "same", "--markdown", "same"), ("--markdown", "/dev/stdout"),
    ):  # fmt: skip
        assert gate(report, *against, *outputs) == 1
        assert "Give another file name" in capsys.readouterr().err or outputs[1] == "/dev/stdout"
    os.mkfifo(tmp_path / "pipe")
    assert gate(report, *BOTH, "--junit", tmp_path / "pipe") == 1
    assert "no ordinary file" in capsys.readouterr().err
    assert gate(report, *BOTH, "--junit", tmp_path / "none" / "gate.xml") == 1
    assert "cannot write" in capsys.readouterr().err
    assert report.read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["old.json", "pipe", "report.json"]


RULES = """
max-params: 16M
max-latency-ratio: {all: 0.8, 8: 0.76}
require: [warm-up-settled]
undecided: pass
"""


def test_the_command_line_wins_over_the_file(report, capsys):
    Path("gate.yaml").write_text(RULES)
    assert gate(report, "--rules", "gate.yaml") == 3
    shown = capsys.readouterr().out
    assert "FAIL          max-params 16 M" in shown
    assert "pass          max-latency-ratio 0.800, batch 1" in shown
    assert "undecided     max-latency-ratio 0.760, batch 8" in shown
    assert "require warm-up-settled" in shown
    assert gate(report, "--rules", "gate.yaml", "--max-params", "17M") == 0
    assert gate(report, "--rules", "gate.yaml", "--max-params", "17M", "--undecided", "fail") == 3
    capsys.readouterr()
    # An option replaces all that the file says of it.
    assert gate(report, "--rules", "gate.yaml", *BOTH) == 0
    assert "max-latency-ratio 0.760" not in capsys.readouterr().out
    Path("gate.yaml").write_text("max-paramz: 3\n")
    assert gate(report, "--rules", "gate.yaml") == 2
    assert "Did you mean 'max-params'" in capsys.readouterr().err
    Path("gate.yaml").write_text("max-params: some\n")
    assert gate(report, "--rules", "gate.yaml") == 2
    assert gate(report, "--rules", "none.yaml", *BOTH) == 1


def test_regression_options(report, tmp_path, capsys):
    bigger = dataclasses.replace(sample_report().pruned, params=17_000_000)
    (tmp_path / "ci").mkdir()
    sample_report(pruned=bigger).write(tmp_path / "ci" / "old.json")
    against = ("--baseline-report", "ci/old.json", "--max-regression")
    assert gate(report, *against, "2%", "--regression-of", "params,file-size") == 0
    assert capsys.readouterr().out.count("max-regression 2.00%") == 2
    assert gate(report, *against, "2", "--regression-of", "params") == 2
    assert "2% or 0.02" in capsys.readouterr().err
    for bare, instead in (("1", "1%"), ("0.5", "0.5%"), ("1.0", "100%")):
        assert gate(report, *against, bare, "--regression-of", "params") == 2
        assert instead in capsys.readouterr().err
    for meant in ("100%", "0.49", "50 %"):
        assert gate(report, *against, meant, "--regression-of", "params") == 0
    assert gate(report, *against, "2%", "--regression-of", "parms") == 2
    assert "Did you mean 'params'" in capsys.readouterr().err
    assert gate(report, *against[:2], *BOTH) == 2
    assert gate(report, "--max-regression", "2%", *BOTH) == 2
    assert gate(report, "--regression-of", "params", *BOTH) == 2
    assert gate(report, "--max-regression", "2%", "--max-regression", "3%") == 2
    # In a file, the path is the file's neighbour, whoever calls from wherever.
    rules = tmp_path / "ci" / "gate.yaml"
    rules.write_text("max-params: 1G\nregression-of: params\n")
    assert gate(report, "--rules", rules) == 0
    rules.write_text("regression-of: params\nbaseline-report: old.json\nmax-regression: 2%\n")
    capsys.readouterr()
    assert gate(report, "--rules", rules) == 0
    assert "max-regression 2.00%, params: -2.69%" in capsys.readouterr().out
    sample_report().write(tmp_path / "ci" / "old.json")
    sample_report(pruned=bigger).write(report)
    assert gate(report, "--rules", rules) == 3


def test_require_is_checked(report, capsys):
    assert gate(report, "--require", "engine-tested") == 3
    assert "not measured  require engine-tested: target ort has none" in capsys.readouterr().out
    engine_report().write(report)
    assert gate(report, "--require", "engine-tested,precision-proven") == 0
    assert gate(report, "--require", "engine-testd") == 2
    assert "Did you mean 'engine-tested'" in capsys.readouterr().err


def test_a_bare_report_passes_nothing_that_had_to_be_measured(report):
    bare_report().write(report)
    assert gate(report, "--max-latency-ratio", "100", "--undecided", "pass") == 3


def test_a_terminal_gets_a_table():
    rule = parse_rule("max-latency-ratio", ["8=0.75"], where="x")
    decision = run_gate(sample_report(), GateConfig(rules=(rule,)))
    out = io.StringIO()
    Console(file=out, width=160, force_terminal=True).print(views.table(decision))
    assert "0.752 [0.740, 0.769]" in out.getvalue()
    assert "Gate failed: 1 undecided (dinov2_s on ort)" in out.getvalue()


def test_it_needs_nothing_but_a_plain_install(report):
    """Other packages blocked, in a process of its own."""
    Path("gate.yaml").write_text("max-params: 17M\n")
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'onnx', 'onnxruntime', 'PIL', 'safetensors', 'psutil'):\n"
        "    sys.modules[name] = None\n"
        "from ampdeploy.cli import main\n"
        "sys.exit(main(['gate', 'report.json', '--rules', 'gate.yaml', '--junit', 'g.xml',"
        " '--markdown', 'g.md']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Without PyYAML it says what to do, and still works without a file.
    code = code.replace("'torch',", "'torch', 'yaml',")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 4
    assert "--rules needs the package 'pyyaml'" in done.stderr
    code = code.replace("'--rules', 'gate.yaml'", "'--max-params', '17M'")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
