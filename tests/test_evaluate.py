"""Both models judged on the same images, whatever runs them, on a folder of ImageNet's shape."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ampdeploy.checkpoint import save_model
from ampdeploy.cli import main
from ampdeploy.config import DEFAULT_TASKS, EvaluateConfig
from ampdeploy.data.folder import scan_eval
from ampdeploy.data.label_file import KAGGLE
from ampdeploy.data.loading import load_all
from ampdeploy.errors import ArtifactError
from ampdeploy.evaluate import evaluate_pair
from ampdeploy.targets.base import FEATURES, PATCH_FEATURES, Runner, get_target
from tests.data.samples import fill
from tests.data.test_eval_layouts import WNIDS
from tests.data.test_label_file import make_flat, write_kaggle
from tests.targets.onnx_samples import write_linear_model

SIZE = 160  # of the tiny model


class StandInEngine(Runner):
    """In place of a TensorRT engine, which no machine without a GPU runs: at most 3 images at a
    time, and outputs that are means of the pixels."""

    def __init__(self) -> None:
        names = (FEATURES, PATCH_FEATURES)
        super().__init__(name="engine", image_size=SIZE, output_names=names, batches=(1, 3))

    def _run_impl(self, images):
        means = images.reshape(len(images), 3, 8, 20, 160).mean(axis=(3, 4))
        rows = np.ascontiguousarray(means.transpose(0, 2, 1))
        return {FEATURES: means.reshape(len(images), 24), PATCH_FEATURES: rows}

    def _close_impl(self) -> None:
        pass


@pytest.fixture
def imagenet(tmp_path):
    """ImageNet's archives in small: train/<wnid>/*.JPEG, a flat val, Kaggle's label file."""
    root = tmp_path / "imagenet"
    write_kaggle(make_flat(root) / KAGGLE)
    return root


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(tiny_model, path)
    return path


@pytest.fixture
def openers(checkpoint, tmp_path):
    """Runtime -> opens a model: PyTorch, ONNX Runtime, and something shaped like an engine."""
    write_linear_model(tmp_path / "model.onnx", size=SIZE, width=8)
    return {
        "torch": lambda: get_target("torch").open(checkpoint),
        "ort": lambda: get_target("ort").open(tmp_path / "model.onnx"),
        "engine": StandInEngine,
    }


def spy(runner, monkeypatch):
    """What reaches the runtime behind `runner`, call by call."""
    seen, run = [], runner._run_impl

    def watched(images):
        seen.append(images.copy())
        return run(images)

    monkeypatch.setattr(runner, "_run_impl", watched)
    return seen


@pytest.mark.parametrize("runtime", ["torch", "ort", "engine"])
def test_every_runtime_is_given_the_same_bytes(openers, imagenet, tiny_model, monkeypatch, runtime):
    chosen = scan_eval(imagenet, limit=None, seed=0)
    sets = (chosen.queries, chosen.bank)
    expected = np.concatenate([load_all(images, tiny_model.spec).numpy() for images in sets])
    with openers[runtime]() as dense, openers[runtime]() as slim:
        seen = [spy(dense, monkeypatch), spy(slim, monkeypatch)]
        evaluate_pair(dense, slim, queries=chosen.queries, bank=chosen.bank, spec=tiny_model.spec)
    assert len(expected) == 17
    for calls in seen:
        assert {images.dtype for images in calls} == {np.dtype(np.float32)}
        assert np.concatenate(calls).tobytes() == expected.tobytes()


def test_a_folder_of_imagenets_shape_in_every_task(checkpoint, imagenet, tmp_path, capsys):
    head = tmp_path / "head.npz"
    weight = np.random.default_rng(0).standard_normal((3, 64))
    np.savez(head, weight=weight, bias=np.zeros(3), classes=np.array(WNIDS[::-1]))
    options = ("--tasks", "knn,snapvit,probe,retrieval,supervised", "--head", str(head))
    command = ["eval", str(checkpoint), "--baseline", str(checkpoint), "--images", str(imagenet)]
    assert main([*command, *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["tasks"]) == {
        "knn_top1", "snapvit_knn_top1", "probe_top1", "frozen_probe_top1", "retrieval_recall1",
        "retrieval_map_r", "supervised_top1",
    }  # fmt: skip
    for metric, task in result["tasks"].items():
        assert (task["images"], task["classes"]) == (5, 3)
        assert task["bank_images"] == (None if metric == "supervised_top1" else 12)
        assert result["accuracy"]["baseline"][metric] == result["accuracy"]["pruned"][metric]
        assert result["accuracy_difference"][metric]["value"] == 0
    assert (result["dataset"]["images"], result["bank"]["images"]) == (5, 12)
    assert len(result["dataset"]["sha256"]) == len(result["bank"]["sha256"]) == 64
    assert main([*command, *options]) == 0
    shown = capsys.readouterr().out
    assert "knn_top1" in shown
    assert "95% interval" in shown
    assert "supervised_top1: top-1 of linear head head.npz" in shown
    assert (
        "cosine_mean, patch_cosine_mean, patch_cosine_p1: 5 images; an interval needs 20" in shown
    )
    assert "cosine_p1: 5 images; about 368 would give the lower end" in shown


def test_the_table_has_intervals_and_says_what_was_left_out(checkpoint, tmp_path, capsys):
    fill(tmp_path / "many" / "a", 12)
    fill(tmp_path / "many" / "b", 11, start=20)
    fill(tmp_path / "many" / "c", 1, start=40)
    command = ["eval", str(checkpoint), "--baseline", str(checkpoint), "--images"]
    assert main([*command, str(tmp_path / "many"), "-q"]) == 0
    shown = capsys.readouterr().out
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for cells in (line.strip("│").split("│") for line in shown.splitlines() if "│" in line)
    }
    assert rows["feature cosine, mean"] == ["1.0000", "1.0000 to 1.0000"]
    assert rows["feature cosine, 1st percentile"] == ["1.0000", "at most 1.0000"]
    assert rows["feature cosine, smallest"] == ["1.0000", "-"]
    assert rows["shared 5 neighbours"][0] == "1.0000"
    assert rows["shared 5 neighbours"][1].endswith(" to 1.0000")
    assert "cosine_p1: 24 images; about 368 would give the lower end" in shown
    assert ": left out, " not in shown
    fill(tmp_path / "few" / "a", 1)
    fill(tmp_path / "few" / "b", 1, start=20)
    assert main([*command, str(tmp_path / "few"), "-q", "--labels"]) == 0
    shown = capsys.readouterr().out
    assert "task retrieval: left out, no image has another one of its class" in shown


def test_supervised_is_the_head_on_the_features(openers, imagenet, tiny_model, tmp_path):
    chosen = scan_eval(imagenet, limit=None, seed=0)
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((3, 64)), rng.standard_normal(3)
    np.savez(tmp_path / "head.npz", weight=weight, bias=bias)  # in the order of the folders
    with openers["torch"]() as model:
        features = model.run_all(load_all(chosen.queries, tiny_model.spec).numpy())[FEATURES]
        result = evaluate_pair(
            model,
            model,
            queries=chosen.queries,
            bank=chosen.bank,
            spec=tiny_model.spec,
            options=EvaluateConfig(tasks=("supervised",), head=tmp_path / "head.npz"),
        )
    right = (features @ weight.T + bias).argmax(axis=1) == chosen.queries.labels
    assert result["accuracy"]["baseline"] == {"supervised_top1": pytest.approx(right.mean())}
    assert "sorted names of the image folders" in result["tasks"]["supervised_top1"]["protocol"]


def test_folders_without_a_sampled_image_are_classes_too(openers, imagenet, tiny_model, tmp_path):
    """A sample of ImageNet has few of the classes that its head knows."""
    (imagenet / "train" / "n09999999").mkdir()
    np.savez(tmp_path / "head.npz", weight=np.ones((4, 64)), bias=np.arange(4.0))
    chosen = scan_eval(imagenet, limit=None, seed=0)
    with openers["torch"]() as model:
        result = evaluate_pair(
            model,
            model,
            queries=chosen.queries,
            bank=chosen.bank,
            spec=tiny_model.spec,
            options=EvaluateConfig(tasks=("supervised",), head=tmp_path / "head.npz"),
        )
    assert "Images of 3 of them" in result["tasks"]["supervised_top1"]["protocol"]
    assert result["accuracy"]["baseline"]["supervised_top1"] == 0  # the empty class always wins


def test_a_head_that_does_not_fit_is_refused_before_any_image_is_seen(
    openers, imagenet, tiny_model, tmp_path, monkeypatch
):
    np.savez(tmp_path / "head.npz", weight=np.ones((3, 9)), bias=np.zeros(3))
    chosen = scan_eval(imagenet, limit=None, seed=0)
    options = EvaluateConfig(head=tmp_path / "head.npz")
    with openers["torch"]() as model:
        seen = spy(model, monkeypatch)
        with pytest.raises(ArtifactError, match="reads features of width 9"):
            evaluate_pair(
                model,
                model,
                queries=chosen.queries,
                bank=chosen.bank,
                spec=tiny_model.spec,
                options=options,
            )
    assert seen == []


def test_no_labels_or_no_tasks_leave_fidelity(checkpoint, imagenet, capsys):
    command = ["eval", str(checkpoint), "--baseline", str(checkpoint), "--images", str(imagenet)]
    for options, reason in (
        (("--no-labels",), "the images have no labels"),
        (("--tasks", "none"), "no task was asked for"),
    ):
        assert main([*command, *options, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["why"] == {"accuracy": reason}
        # What was asked for and left out is told apart from what nobody asked for.
        asked = DEFAULT_TASKS if "--no-labels" in options else ()
        assert result["tasks_left_out"] == dict.fromkeys(asked, reason)
        assert (result["accuracy"], result["accuracy_difference"], result["tasks"]) == (None,) * 3
        assert result["fidelity"]["cosine_min"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--tasks", "knnn"), 2, "unknown task 'knnn'"),
        (("--tasks", "supervised"), 2, "--head"),
        (("--head", "missing.npz"), 1, "there is no head file"),
    ],
)
def test_wrong_options_say_what_to_do(checkpoint, imagenet, capsys, options, code, message):
    command = ["eval", str(checkpoint), "--baseline", str(checkpoint), "--images", str(imagenet)]
    assert main([*command, *options]) == code
    assert message in capsys.readouterr().err
