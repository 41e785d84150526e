"""`ampdeploy bench` on two files with prepared images: no torch takes part."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ampdeploy.cli import main
from tests.targets.onnx_samples import images, write_linear_model

QUICK = ["--min-runs", "3", "--seconds", "0.1", "--threads", "1"]


@pytest.fixture
def pair(tmp_path):
    """Arguments that name two models and images for them."""
    write_linear_model(tmp_path / "dense.onnx", width=64, seed=0)
    write_linear_model(tmp_path / "slim.onnx", width=32, seed=1)
    np.savez(tmp_path / "goldens.npz", images=images(6))
    files = [str(tmp_path / "slim.onnx"), "--baseline", str(tmp_path / "dense.onnx")]
    return ["bench", *files, "--inputs", str(tmp_path / "goldens.npz"), *QUICK]


def test_the_table_has_every_clock(pair, capsys):
    arguments = ["--batches", "1,2", "--throughput-seconds", "0.3", "--in-flight", "3"]
    assert main([*pair, *arguments]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    for clock in ("end to end p50, ms", "compute p50, ms", "images/s, 3 at once"):
        rows = [line.split(clock)[1].split() for line in lines if clock in line]
        assert [row[0] for row in rows] == ["1", "2"], shown
        for _, dense, slim, ratio, *_ in rows:
            assert float(ratio) == pytest.approx(float(slim) / float(dense), rel=0.15)
    assert any(line.startswith("memory, MB") for line in lines)
    assert "…" not in shown  # nothing cut short at 80 columns
    assert "CUDA graph: not measured: target ort" in shown


def test_json_is_all_that_was_measured(pair, capsys):
    assert main([*pair, "--batches", "2", "--throughput-seconds", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "ort"
    assert set(found["latency"]) == set(found["compute"]) == {"2"}
    assert len(found["compute"]["2"]["baseline"]["quantiles"]) == 21
    assert found["throughput"] is None
    assert "0 seconds" in found["why"]["throughput"]
    assert found["memory"]["pruned"]["peak_rss_bytes"] > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ([], "not both"),
        (["--images", "x", "--inputs", "y"], "not both"),
    ],
)
def test_images_come_from_one_place(pair, capsys, change, says):
    at = pair.index("--inputs")
    assert main([*pair[:at], *change]) == 2
    assert says in capsys.readouterr().err


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        with open(path, "wb") as file:
            np.save(file, content)
    elif content is not None:
        np.savez(path, **content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no file"),
        (b"text", "cannot be read"),
        (b"", "cannot be read"),
        (b"PK\x03\x04 cut short", "cannot be read"),
        (images(2), "cannot be read"),
        ({"pixels": images(2)}, "holds ['pixels']"),
        ({"images": np.array([{}], dtype=object)}, "cannot be read"),
        ({"images": images(2).astype(np.float64)}, "type float64"),
        ({"images": images(2)[:, :2]}, "shape (2, 2, 8, 8)"),
        ({"images": images(2)[0]}, "shape (3, 8, 8)"),
        ({"images": images(1)}, "at least 2 different images"),
        ({"images": np.zeros_like(images(2))}, "constant"),
        ({"images": images(2, size=4)}, "(2, 3, 4, 4)"),
    ],
)
def test_inputs_that_cannot_be_used_say_why(pair, tmp_path, capsys, content, says):
    (tmp_path / "goldens.npz").unlink()
    write(tmp_path / "goldens.npz", content)
    assert main([*pair, "--batches", "2"]) == 1
    shown = capsys.readouterr().err
    assert says in shown, shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--throughput-seconds", "-1"], "throughput seconds is -1"),
        (["--in-flight", "0"], "in flight is 0"),
        (["--batches", "0"], "batch sizes"),
    ],
)
def test_settings_that_make_no_sense(pair, capsys, change, says):
    assert main([*pair, *change]) == 2
    assert says in capsys.readouterr().err
