"""`ampdeploy report` on report.json files; on run directories, see tests/test_pipeline.py."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ampdeploy.cli import main
from ampdeploy.report.html import render_html
from ampdeploy.report.markdown import render_markdown
from ampdeploy.report.result import Report
from tests.report.samples import bare_report, sample_report, whole_report


@pytest.fixture
def files(tmp_path):
    """Three reports, as `report.json` in folders of their own."""
    found = []
    for name, report in (
        ("a", sample_report()),
        ("b", whole_report()),
        ("c", bare_report()),
    ):
        (tmp_path / name).mkdir()
        found.append(tmp_path / name / "report.json")
        report.write(found[-1])
    return [str(file) for file in found]


def test_views_of_one(files, tmp_path, capsys):
    md, html = tmp_path / "out.md", tmp_path / "out.html"
    assert main(["report", files[0], "--md", str(md), "--html", str(html)]) == 0
    assert "dinov2_s on ort" in capsys.readouterr().out
    assert md.read_text() == render_markdown(sample_report())
    assert html.read_text() == render_html(sample_report())
    assert main(["report", files[0], "--markdown"]) == 0
    assert capsys.readouterr().out == md.read_text()
    assert main(["report", files[0], "--json"]) == 0
    assert Report.from_json(capsys.readouterr().out) == sample_report()
    # Of a file, nothing is written beside it.
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"report.json"}


def test_several_are_compared(files, tmp_path, capsys):
    md, html = tmp_path / "out.md", tmp_path / "out.html"
    assert main(["report", *files, "--md", str(md), "--html", str(html)]) == 0
    shown = capsys.readouterr().out
    assert "not measured: " in shown
    assert "other target: trt-rtx, not ort" in " ".join(shown.split())
    assert main(["report", *files, "--markdown"]) == 0
    assert capsys.readouterr().out == md.read_text()
    assert "<h1>3 runs compared</h1>" in html.read_text()
    assert main(["report", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == ["a", "b", "c"]


def test_check(files, tmp_path, capsys):
    assert main(["report", "--check", *files]) == 0
    assert capsys.readouterr().out.count("follows the schema of report.json, version 6") == 3
    broken = tmp_path / "broken.json"
    text = sample_report().to_json().replace('"model": "dinov2_s"', '"model": 3')
    broken.write_text(text)
    assert main(["report", "--check", files[0], str(broken)]) == 1
    shown = capsys.readouterr().err
    assert "broken.json does not follow the schema" in shown
    assert "model: is 3, not string" in shown


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--check", "--json"], 2, "--check only validates"),
        (["--check", "--html", "x.html"], 2, "--check only validates"),
        (["--markdown", "--json"], 2, "both print on stdout"),
        (["--update"], 2, "takes one run directory"),
    ],
)
def test_options_that_do_not_go_together(files, options, code, message, capsys):
    assert main(["report", *files[:2], *options]) == code
    assert message in capsys.readouterr().err


def test_wrong_input(files, tmp_path, capsys):
    assert main(["report"]) == 2
    assert main(["report", files[0], files[0]]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main(["report", files[0], "--update"]) == 2
    assert main(["report", str(tmp_path / "none.json")]) == 1
    assert main(["report", files[0], "--html", str(tmp_path / "no" / "folder.html")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_report_that_contradicts_itself_is_refused_by_check_only(tmp_path, capsys):
    """Of the right types, but batch sizes do not fit together: still worth looking at."""
    file = tmp_path / "x.json"
    dataclasses.replace(
        sample_report(), timing={}, tasks=None, why={**sample_report().why, "tasks": "lost"}
    ).write(file)
    assert main(["report", str(file), "--markdown", "--html", str(tmp_path / "x.html")]) == 0
    assert main(["report", "--check", str(file)]) == 1
    shown = capsys.readouterr().err
    assert "timing: has nothing; ratio.latency has 1, 8" in shown
    assert "tasks: is null, unlike baseline.accuracy" in shown
