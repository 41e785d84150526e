"""`ampdeploy eval` on folders that are classes, may be, or are not."""

from __future__ import annotations

import json

import pytest

from ampdeploy.checkpoint import save_model
from ampdeploy.cli import main
from tests.data.samples import fill


@pytest.fixture
def evaluate(tiny_model, tmp_path, capsys):
    """`evaluate(*options)`: exit code and output of an evaluation of a model against itself."""
    save_model(tiny_model, tmp_path / "model.safetensors")
    model = str(tmp_path / "model.safetensors")

    def call(*options):
        images = ("--images", str(tmp_path / "images"))
        code = main(["eval", model, "--baseline", model, *images, "--json", *options])
        return code, capsys.readouterr()

    return call


def test_labels_are_the_layouts_unless_declined(evaluate, tmp_path):
    fill(tmp_path / "images" / "2023", 4)
    fill(tmp_path / "images" / "2024", 4, start=10)
    code, shown = evaluate()
    assert code == 0, shown.err
    assert json.loads(shown.out)["tasks"]["knn_top1"]["classes"] == 2
    assert "are taken as classes" in shown.err
    code, shown = evaluate("--no-labels")
    assert code == 0, shown.err
    result = json.loads(shown.out)
    assert (result["accuracy"], result["fidelity"]["images"]) == (None, 8)


def test_loose_images_are_judged_without_labels_unless_insisted_on(evaluate, tmp_path):
    fill(tmp_path / "images" / "2023", 4)
    fill(tmp_path / "images" / "2024", 4, start=10)
    fill(tmp_path / "images", 1, start=20)
    code, shown = evaluate()
    assert code == 0, shown.err
    result = json.loads(shown.out)
    assert (result["accuracy"], result["fidelity"]["images"]) == (None, 9)
    assert "1 of 9 images" in shown.err
    code, shown = evaluate("--labels")
    assert code == 1
    assert "outside any class folder" in shown.err
