"""`ampdeploy export` on a real, tiny run."""

from __future__ import annotations

import json

import pytest

from ampdeploy.cli import main
from tests import runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with a slim model and no export yet."""
    folder = tmp_path_factory.mktemp("images")
    out = folder / "run"
    assert main([*runs.prune_arguments(folder, out), "-q"]) == 0
    return out


def test_a_gate_that_is_too_tight_names_the_flag_and_the_flag_opens_it(run, capsys):
    assert main(["export", str(run), "-q", "--max-relative-diff", "1e-12"]) == 3
    shown = capsys.readouterr().err
    assert "allowed 1e-12" in shown
    assert "--max-relative-diff X" in shown
    assert "smallest cosine" not in shown

    assert main(["export", str(run), "-q", "--max-relative-diff", "1e-4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for role in ("baseline", "pruned"):
        compared = facts[role]["verified"]
        assert {item["output"] for item in compared} == {"features", "patch_features"}
        assert all(0 < item["max_relative_diff"] < 1e-4 for item in compared)
        assert all(item["max_abs_diff"] > 0 and item["min_cosine"] > 0.99999 for item in compared)
        assert facts[role]["opset"] == 18


def test_another_opset_is_kept_by_the_run(run, capsys):
    for options in (["--opset", "20"], []):
        assert main(["export", str(run), "-q", "--json", *options]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["baseline"]["opset"] == facts["pruned"]["opset"] == 20
    assert main(["export", str(run), "-q"]) == 0
    assert "of the RMS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--opset", "17"], "opset 17"),
        (["--max-relative-diff", "0"], "max relative diff is 0"),
        (["--max-relative-diff", "nan"], "max relative diff is nan"),
        (["--max-relative-diff", "inf"], "max relative diff is inf"),
    ],
)
def test_values_that_cannot_be_used_are_refused(run, options, message, capsys):
    assert main(["export", str(run), "-q", *options]) == 2
    assert message in capsys.readouterr().err
