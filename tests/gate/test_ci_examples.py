"""The CI examples of docs/ci: what they promise, and every shell step of them, run.

GitHub and GitLab themselves are not here: their actions, expressions and caches are checked as
text, and `gh` and `pip` are stand-ins that write down how they were called.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ampdeploy.gate.rules_file import read_rules_file
from tests import runs
from tests.conftest import REPOSITORY, TINY
from tests.gate.junit_schema import parse

CI = REPOSITORY / "docs" / "ci"
GITHUB = yaml.safe_load((CI / "github-actions.yml").read_text())
GITLAB = yaml.safe_load((CI / "gitlab-ci.yml").read_text())

# Written down, then answered as GitHub would: `gh api` prints the ids that `--jq` selects.
GH = """#!/bin/bash
printf '%s\\n' "$*" >> "$CALLS"
case "$*" in
  *--paginate*) [ -f comment.id ] && cat comment.id ;;
  *POST*) printf '7\\n9\\n' > comment.id ;;
esac
for argument in "$@"; do
  case "$argument" in body=@*) cp "${argument#body=@}" posted.md ;; esac
done
exit 0
"""
PIP = '#!/bin/bash\nprintf "pip %s\\n" "$*" >> "$CALLS"\n'


def steps(job):
    return {step["name"]: step for step in GITHUB["jobs"][job]["steps"] if "run" in step}


class Runner:
    """A folder with images and weights in which shell steps are run as the services run them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        runs.copy_images(folder)
        runs.tiny_weights(folder / "tiny.safetensors")
        binaries = folder / "bin"
        binaries.mkdir()
        for name, text in (("gh", GH), ("pip", PIP)):
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)
        (binaries / "ampdeploy").write_text(
            f'#!/bin/bash\nexec "{sys.executable}" -m ampdeploy "$@"\n'
        )
        (binaries / "ampdeploy").chmod(0o755)
        shutil.copy(CI / "gate.yaml", folder / "gate.yaml")
        self.env = {
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "CALLS": str(folder / "calls"),
            "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
            "MODEL": TINY,
            "TARGET": "ort",
            "AMPDEPLOY": ".[cpu]",
            "WEIGHTS": "tiny.safetensors",
            "CALIB": "train",
            "EVAL": ".",
            "OPTIONS": " ".join([*runs.OPTIONS, *runs.DIVERGENCE]),
            "RUN": "runs/model",
            "RULES": "gate.yaml",
            "MAX_REGRESSION": "2%",
        }

    def run(self, script: str, shell=("bash", "-e", "-o", "pipefail"), **env: str):
        return subprocess.run(
            [*shell, "-c", script],
            cwd=self.folder, env={**self.env, **env}, capture_output=True, text=True,
        )  # fmt: skip

    def rules(self, text: str) -> None:
        (self.folder / "gate.yaml").write_text(text)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Runner:
    """After GitHub's steps Install and Build."""
    runner = Runner(tmp_path_factory.mktemp("ci"))
    for name in ("Install", "Build"):
        done = runner.run(steps("build")[name]["run"])
        assert done.returncode == 0, done.stderr
    assert (runner.folder / "calls").read_text() == "pip install .[cpu]\n"
    return runner


# The few images here give the mean cosine no interval to decide by.
LENIENT = "max-params: 1G\nmin-cosine-min: -1\nregression-of: [params, file-size, cosine]\n"


def test_github_gates_summarises_and_accepts(built):
    built.rules(LENIENT)
    for name in ("Gate", "Summary"):
        done = built.run(steps("build")[name]["run"])
        assert done.returncode == 0, done.stdout + done.stderr
    assert "max-regression" not in (built.folder / "gate.md").read_text()
    parse((built.folder / "gate.xml").read_text())
    summary = (built.folder / "summary.md").read_text()
    assert summary.startswith("### Gate passed")
    assert f"{TINY} on ort" in summary
    assert built.run(steps("build")["Accept"]["run"]).returncode == 0
    # The next run is held against what was accepted, here: itself.
    done = built.run(steps("build")["Gate"]["run"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("max-regression 2.00%") == 3
    shutil.rmtree(built.folder / "accepted")


def test_github_stops_at_a_closed_gate_and_still_summarises(built):
    built.rules("max-params: 1\n")
    done = built.run(steps("build")["Gate"]["run"])
    assert done.returncode == 3
    (built.folder / "summary.md").unlink(missing_ok=True)
    assert built.run(steps("build")["Summary"]["run"]).returncode == 0
    assert "**FAIL**" in (built.folder / "summary.md").read_text()


def test_a_run_that_changed_since_its_report_is_not_judged(built):
    report = built.folder / "runs" / "model" / "report.json"
    before = report.read_text()
    report.write_text(before.replace("0.1.0", "0.0.9", 1))
    done = built.run("ampdeploy gate runs/model --max-params 1G")
    report.write_text(before)
    assert done.returncode == 1
    assert "--update" in done.stderr
    assert built.run("ampdeploy gate runs/model --max-params 1G").returncode == 0


def test_github_comments_once_and_then_edits(built):
    built.rules(LENIENT)
    assert built.run(steps("build")["Gate"]["run"]).returncode == 0
    report = built.folder / "report" / "runs" / "model"
    report.mkdir(parents=True)
    shutil.copy(built.folder / "gate.md", built.folder / "report")
    shutil.copy(built.folder / "runs" / "model" / "report.md", report)
    step = steps("comment")["Comment"]
    env = {"GH_TOKEN": "none", "GH_REPO": "owner/name", "NUMBER": "5", "URL": "https://example.org"}
    assert set(step["env"]) == set(env)
    (built.folder / "calls").write_text("")
    for _ in range(2):
        done = built.run(step["run"], **env)
        assert done.returncode == 0, done.stderr
    calls = (built.folder / "calls").read_text()
    assert calls.count("--method POST repos/owner/name/issues/5/comments") == 1
    assert calls.count("--method PATCH repos/owner/name/issues/comments/7") == 1
    posted = (built.folder / "posted.md").read_text()
    assert posted.startswith(f"<!-- ampdeploy {TINY} ort -->\n### Gate passed")
    assert (report / "report.md").read_text().splitlines()[0] in posted
    # What is too long for a comment is left to the link, and a failed build has neither file.
    (report / "report.md").write_text("x" * 70_000)
    assert built.run(step["run"], **env).returncode == 0
    assert len((built.folder / "posted.md").read_text()) < 10_000
    shutil.rmtree(built.folder / "report")
    (built.folder / "report").mkdir()
    assert built.run(step["run"], **env).returncode == 0
    assert "The build failed." in (built.folder / "posted.md").read_text()


def test_the_comments_filter_picks_only_our_own(built):
    """The `--jq` program of the step, by jq itself where there is one."""
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    program = re.search(r'--jq "(.+)"\)$', steps("comment")["Comment"]["run"], re.M)[1]
    program = program.replace('\\"', '"').replace("$marker", "<!-- m -->")
    comments = [
        {"id": 1, "user": {"type": "User"}, "body": "<!-- m --> by a person"},
        {"id": 2, "user": {"type": "Bot"}, "body": "another bot"},
        {"id": 3, "user": {"type": "Bot"}, "body": "<!-- m -->\nours"},
    ]
    done = subprocess.run(
        ["jq", program], input=json.dumps(comments), capture_output=True, text=True
    )
    assert done.stdout == "3\n", done.stderr


def test_gitlab_builds_gates_and_accepts_on_the_default_branch(built):
    """In one shell, as GitLab runs a job's script; the build before is its cached run."""
    script = "\n".join(GITLAB["model"]["script"])
    sh = ("sh", "-e")
    built.rules(LENIENT)
    branch = {"CI_DEFAULT_BRANCH": "main"}
    done = built.run(script, sh, CI_COMMIT_BRANCH="main", **branch)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in GITLAB["model"]["artifacts"]["paths"]:
        assert (built.folder / name).is_file(), name
    parse((built.folder / GITLAB["model"]["artifacts"]["reports"]["junit"]).read_text())
    accepted = built.folder / "accepted" / "report.json"
    built_report = built.folder / "runs" / "model" / "report.json"
    assert accepted.read_text() == built_report.read_text()
    accepted.write_text(accepted.read_text().replace("0.1.0", "0.0.9", 1))
    before = accepted.read_text()
    # A merge request is on no branch; what it built is not what others are held against.
    assert (
        built.run(GITLAB["model"]["script"][-1], sh, CI_COMMIT_BRANCH="", **branch).returncode == 0
    )
    assert accepted.read_text() == before
    built.rules("max-params: 1\n")
    done = built.run(script, sh, CI_COMMIT_BRANCH="main", **branch)
    assert done.returncode == 3
    assert "max-regression" in done.stdout
    assert accepted.read_text() == before
    shutil.rmtree(built.folder / "accepted")


def test_github_gives_the_code_of_a_pull_request_no_rights():
    # YAML 1.1 reads the key `on` as true.
    assert set(GITHUB[True]) == {"push", "pull_request"}
    assert GITHUB["permissions"] == {}
    assert GITHUB["jobs"]["build"]["permissions"] == {"contents": "read"}
    comment = GITHUB["jobs"]["comment"]
    assert comment["permissions"] == {"pull-requests": "write"}
    assert "head.repo.full_name == github.repository" in comment["if"]
    # It holds a token that can write, so it runs nothing of the pull request.
    used = [step.get("uses", "") for step in comment["steps"]]
    assert not any("checkout" in name for name in used)
    checkout = next(s for s in GITHUB["jobs"]["build"]["steps"] if "checkout" in s.get("uses", ""))
    assert checkout["with"]["persist-credentials"] is False


def test_github_steps_are_pinned_and_take_no_text_from_outside():
    for job in GITHUB["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w/-]+@v\d+", step["uses"])
            else:
                # An expression in a script is pasted before the shell reads it.
                assert "${{" not in step["run"], step["name"]


def test_steps_run_under_shellcheck():
    """Where there is one."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [("bash", s["run"]) for job in GITHUB["jobs"] for s in steps(job).values()]
    scripts.append(("sh", "\n".join(GITLAB["model"]["script"])))
    for shell, script in scripts:
        done = subprocess.run(
            ["shellcheck", "--severity=warning", f"--shell={shell}", "-"],
            input=script, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout


def test_the_example_rules_are_rules(tmp_path):
    from ampdeploy.commands.gate import _KNOWN, _config

    written = read_rules_file(CI / "gate.yaml", _KNOWN)
    compared = written.pop("regression-of")
    config = _config(written)
    assert {rule.kind.name for rule in config.rules} == set(written) - {"require"}
    against = {"baseline-report": ("x",), "max-regression": ("2%",), "regression-of": compared}
    assert _config({**written, **against}).regression_of == compared


def test_the_page_names_only_options_that_there_are():
    from ampdeploy.cli import cli
    from ampdeploy.gate.require import REQUIREMENTS

    page = (REPOSITORY / "docs" / "gate.md").read_text()
    known = set()
    for verb in ("gate", "build"):
        command = cli.get_command(None, verb)
        known |= {name for option in command.params for name in option.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page)) - {"--help"} <= known
    assert all(f"`{name}`" in page for name in REQUIREMENTS)
    for link in re.findall(r"\]\((ci/[^)]+)\)", page):
        assert (REPOSITORY / "docs" / link).is_file()
