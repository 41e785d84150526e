"""The published schema is current, takes every report, and refuses what our reader refuses."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from ampdeploy.cli import main
from ampdeploy.errors import ArtifactError
from ampdeploy.report.result import Report
from ampdeploy.report.schema import SCHEMA_FILE, check_file, report_schema, schema_text
from tests.conftest import REPOSITORY
from tests.report.samples import bare_report, engine_report, sample_report, whole_report
from tests.report.test_result import ALL_KEYS

RESULTS = REPOSITORY / "benchmarks" / "results"

SAMPLES = {
    "full": sample_report,
    "engine": engine_report,
    "bare": bare_report,
    "whole": whole_report,
}


def plain(report: Report | None = None):
    return json.loads((report or sample_report()).to_json())


def changed(path, value):
    """A full report with one value replaced, or removed where `value` is `...`."""
    data = plain()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


@pytest.fixture(scope="module")
def validator():
    return jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))


def test_the_committed_schema_is_current():
    assert SCHEMA_FILE.read_text() == schema_text(), "run python -m ampdeploy.report.schema"


def test_the_schema_is_a_schema_of_draft_2020_12():
    schema = report_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_report_follows_it(name, validator, tmp_path):
    report = SAMPLES[name]()
    validator.validate(plain(report))
    file = tmp_path / "report.json"
    report.write(file)
    assert check_file(file) == report


def test_fields_are_described_with_their_units():
    definitions = report_schema()["$defs"]
    measured = definitions["Measured"]["properties"]
    assert measured["memory_bytes"]["x-unit"] == "bytes"
    assert measured["latency_ms"]["x-unit"] == "ms"
    assert measured["energy_j_per_image"]["x-unit"] == "J per image"
    assert "CUDA events around the engine" in measured["compute_ms"]["description"]
    assert "x-unit" not in measured["accuracy"]
    assert definitions["Telemetry"]["properties"]["temperature_c"]["x-unit"] == "degrees Celsius"
    # Of the class that it is inherited from, in JSON's words.
    assert definitions["Interval"]["properties"]["why"]["description"] == "Field -> why it is null."
    without = [name for name, schema in definitions.items() if not schema["description"]]
    assert without == []


@pytest.mark.parametrize("path", ALL_KEYS, ids=".".join)
def test_every_key_is_required(path, validator):
    assert not validator.is_valid(changed(path, ...))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("baseline", "params"), "many", 'baseline.params: is "many", not integer'),
        (("pruned", "latency_ms", "8", "p50"), None, "p50: is null, not number"),
        (("method", "widths"), {}, "method.widths: is {}, not array"),
        (("fidelity", "cosine"), 1, "fidelity: .*'cosine' was unexpected"),
        (("fidelity", "images"), 1.5, "fidelity.images: is 1.5, not integer"),
        (("pruned", "why"), {}, "pruned.why: 'cuda_graph_compute_ms' is null and has no reason"),
        (("ratio", "latency", "1", "value"), ..., "'value' is a required property"),
        (("telemetry", "clocks_mhz", "cpu"), 3, "clocks_mhz.cpu: is 3, not object"),
    ],
)
def test_check_names_the_place_and_what_was_found(path, value, message, tmp_path):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(ArtifactError, match=message) as caught:
        check_file(file)
    assert str(file) in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[]", "schema version None"),
        ('{"schema_version": 4}', "schema version 4; this ampdeploy reads 6"),
        (sample_report().to_json().replace("0.741", "NaN"), "NaN is no JSON number"),
        (sample_report().to_json().replace("0.741", "-Infinity"), "-Infinity is no JSON number"),
    ],
    ids=["empty", "list", "older", "nan", "infinity"],
)
def test_check_refuses_what_is_no_report(text, message, tmp_path):
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=re.escape(message)):
        check_file(file)


def test_check_of_a_missing_file(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        check_file(tmp_path / "report.json")
    with pytest.raises(ArtifactError, match="cannot read"):
        check_file(tmp_path)


def test_a_badly_damaged_file_does_not_flood_the_terminal(tmp_path):
    data = dict.fromkeys(plain(), 7) | {"schema_version": 6}
    file = tmp_path / "report.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"and \d+ more") as caught:
        check_file(file)
    assert len(str(caught.value).splitlines()) == 13


@pytest.mark.parametrize("path", sorted(RESULTS.glob("demo_*.json")), ids=lambda path: path.name)
def test_the_committed_reports_can_be_read_and_pass(path):
    assert main(["report", "--check", str(path)]) == 0
