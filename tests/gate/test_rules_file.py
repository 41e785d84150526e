"""Rules from YAML."""

from __future__ import annotations

import pytest

from ampdeploy.errors import ArtifactError, ConfigError
from ampdeploy.gate.rules_file import read_rules_file

KNOWN = {"max-latency-ratio": True, "max-params": False, "require": True, "undecided": False}


def read(tmp_path, text):
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    return read_rules_file(path, KNOWN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max-params: 14e6", {"max-params": ("14e6",)}),
        ("max_params: 14M", {"max-params": ("14M",)}),
        ("max-latency-ratio: 0.75", {"max-latency-ratio": ("0.75",)}),
        ("max-latency-ratio: {all: 0.8, 8: 0.75}", {"max-latency-ratio": ("0.8", "8=0.75")}),
        ("max-latency-ratio: ['0.8', 8=0.7]", {"max-latency-ratio": ("0.8", "8=0.7")}),
        # In YAML 1.1 these are 480.75, 14 in base 8, and true.
        ("max-latency-ratio: 8:0.75", {"max-latency-ratio": ("8:0.75",)}),
        ("max-params: 016", {"max-params": ("016",)}),
        ("undecided: yes", {"undecided": ("yes",)}),
        ("# a remark\nrequire: [a, b]", {"require": ("a", "b")}),
    ],
)  # fmt: skip
def test_it_says_what_options_would_say(tmp_path, text, expected):
    assert read(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("max-latncy-ratio: 1", ConfigError, "Did you mean 'max-latency-ratio'"),
        ("max-params: 1\nmax_params: 2", ConfigError, "twice"),
        ("max-params: [1, 2]", ConfigError, "takes one value, not 2"),
        ("max-params: []", ConfigError, "max-params has no value"),
        ("require: {}", ConfigError, "require has no value"),
        ("max-params:", ConfigError, "no value at line 1"),
        ("max-params: ''", ConfigError, "no value at line 1"),
        ("max-params: ~", ConfigError, "no value"),
        ("max-latency-ratio: {8: {1: 2}}", ConfigError, "nested too deeply"),
        ("max-latency-ratio: [[1]]", ConfigError, "nested too deeply"),
        ("? [a, b]\n: 1", ConfigError, "nested too deeply"),
        ("- max-params: 1", ConfigError, "is not a list of"),
        ("max-params", ConfigError, "is not a list of"),
        ("", ConfigError, "holds no rules"),
        ("max-params: 1: 2", ArtifactError, "is not YAML"),
        ("a: &a [*a]", ConfigError, "unknown key"),
        ("max-params: &a [*a]", ConfigError, "nested too deeply"),
        ("[" * 5000, ArtifactError, "is not YAML"),
    ],
)
def test_anything_else_is_refused(tmp_path, text, error, says):
    with pytest.raises(error, match=says):
        read(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ArtifactError, match="No such file"):
        read_rules_file(tmp_path / "none.yaml", KNOWN)
    (tmp_path / "gate.yaml").write_bytes(b"\xff\xfe\x00max")
    with pytest.raises(ArtifactError, match="is not"):
        read_rules_file(tmp_path / "gate.yaml", KNOWN)
