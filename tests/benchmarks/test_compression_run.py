"""The comparison as commands, on timm's test model with random weights and shipped images."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from safetensors.torch import save_file

from ampdeploy.artifacts import read_json
from ampdeploy.errors import ArtifactError, ConfigError
from ampdeploy.models.build import build_model
from benchmarks.compression import cost, plot, run, table
from benchmarks.compression.judge import Judge
from benchmarks.compression.photographs import PHOTOGRAPHS, VIEWS, load_photographs, views
from benchmarks.compression.state import Rows
from benchmarks.compression.summary import summarise
from tests.conftest import CALIB_DATA, TINY

METHODS = "random,magnitude,amp-uniform,vbp,ours-fold,ours"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model = build_model(TINY)
    # Random weights as initialised leave the features of all images alike.
    state = {n: t + 0.1 * torch.randn_like(t) for n, t in model.backbone.state_dict().items()}
    save_file(state, path)
    return path


def inputs(weights, out):
    return [
        *("--model", TINY, "--weights", str(weights), "--out", str(out)),
        *("--calib", str(CALIB_DATA / "train"), "--eval", str(CALIB_DATA / "val")),
        *("--images", "32", "--eval-images", "24", "--width-multiple", "8"),
    ]


@pytest.fixture(scope="module")
def compared(weights, tmp_path_factory):
    """A finished comparison: (result, state folder, the command's arguments)."""
    pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("compared")
    arguments = inputs(weights, folder / "result.json")
    arguments += ["--state", str(folder / "state"), "--seeds", "0,1", "--sizes", "0.2,0.4"]
    run.main([*arguments, "--methods", METHODS])
    return read_json(folder / "result.json"), folder / "state", arguments


def test_result_has_every_row_once_with_all_columns(compared):
    result, _, _ = compared
    names = [(row["method"], row["cut"], row["seed"]) for row in result["rows"]]
    seeded = [name for name in METHODS.split(",") if name != "magnitude"]
    expected = {(name, cut, seed) for name in seeded for cut in (0.2, 0.4) for seed in (0, 1)}
    expected |= {("magnitude", cut, None) for cut in (0.2, 0.4)}
    assert len(names) == len(set(names))
    assert set(names) == expected
    for cut in (0.2, 0.4):
        rows = [row for row in result["rows"] if row["cut"] == cut]
        assert len({row["params"] for row in rows}) == 1
        assert rows[0]["params"] == pytest.approx((1 - cut) * result["dense"]["params"], rel=0.01)
        assert rows[0]["flops"] < result["dense"]["flops"]
    for row in result["rows"]:
        assert -1 <= row["val"]["cosine_p1"] <= row["val"]["cosine_mean"] <= 1
        assert -1 <= row["photos"]["patch_cosine_p1"] <= row["photos"]["patch_cosine_mean"] <= 1
        assert 0 <= row["val"]["knn_agreement"] <= 1
        assert 0 <= row["val"]["knn"] <= 1
        assert row["photos"]["knn"] is None
        assert row["seconds"] > 0
        data_free = row["method"] in ("random", "magnitude")
        assert (row["block_forwards_per_image"] == 0) == data_free
    assert result["dense"]["val"]["cosine_mean"] == pytest.approx(1)
    assert result["photographs"]["views"] == VIEWS * len(PHOTOGRAPHS)


def test_result_names_no_folder_of_the_machine(compared, weights):
    result, state, _ = compared
    text = json.dumps(result)
    for folder in (CALIB_DATA.parent, weights.parent, state.parent):
        assert str(folder) not in text


def test_seeds_draw_different_images_and_none_that_judges(compared):
    result, _, _ = compared
    assert result["calib"]["0"]["sha256"] != result["calib"]["1"]["sha256"]
    assert result["calib"]["0"]["images"] == 32


def test_second_run_measures_nothing_and_gives_the_same_result(compared, tmp_path):
    result, state, arguments = compared
    times = {path: path.stat().st_mtime_ns for path in (state / "rows").iterdir()}
    arguments = [*arguments, "--methods", METHODS]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "again.json")
    run.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in (state / "rows").iterdir()} == times
    again = read_json(tmp_path / "again.json")
    assert again["rows"] == result["rows"]
    assert again["summary"] == result["summary"]


def test_again_measures_only_what_it_names(compared, tmp_path):
    _, state, arguments = compared
    times = {path.name: path.stat().st_mtime_ns for path in (state / "rows").iterdir()}
    arguments = [*arguments, "--methods", "random,ours-fold", "--again", "random"]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "again.json")
    run.main(arguments)
    changed = {p.name for p in (state / "rows").iterdir() if p.stat().st_mtime_ns != times[p.name]}
    assert changed == {f"random-{cut}-{seed}.json" for cut in (0.2, 0.4) for seed in (0, 1)}
    # Rows that this part did not ask for are in the result all the same.
    assert "ours" in {row["method"] for row in read_json(tmp_path / "again.json")["rows"]}


def test_rows_of_another_comparison_are_measured_anew(tmp_path):
    rows = Rows(tmp_path)
    rows.put("ours-fold-0.2-1", "mine", {"a": 1})
    rows.put("ours-0.2-1", "mine", {"a": 2})
    assert rows.find("ours-0.2-1", "mine") == {"a": 2}
    assert rows.find("ours-0.2-1", "other") is None
    rows.forget(["ours"])
    assert rows.find("ours-0.2-1", "mine") is None
    assert rows.find("ours-fold-0.2-1", "mine") == {"a": 1}


def test_summary_spreads_over_seeds_and_keeps_what_is_missing_missing():
    rows = [
        {
            "method": "m",
            "label": "M",
            "cut": 0.2,
            "exact": True,
            "seed": seed,
            "widths": [1],
            "params": 10,
            "val": {"cosine_mean": value, "knn": None},
        }
        for seed, value in enumerate((0.5, 0.9, 0.7))
    ]
    (summary,) = summarise(rows)
    assert summary["seeds"] == 3
    assert summary["val"]["cosine_mean"] == pytest.approx({"mean": 0.7, "min": 0.5, "max": 0.9})
    assert summary["val"]["knn"] is None
    assert "widths" not in summary


def test_table_shows_every_method_and_marks_the_best(compared):
    result, _, _ = compared
    text = table.render(result, "result.json")
    first = text.split("\n\n")[0].splitlines()
    assert len(first) == 2 + len(METHODS.split(","))
    assert len({line.count("|") for line in first}) == 1
    for column, cut in ((2, 0.2), (3, 0.4)):
        cells = {
            line.split("|")[1].strip().strip("*"): line.split("|")[column] for line in first[2:]
        }
        means = {
            row["label"]: row["val"]["cosine_mean"]["mean"]
            for row in result["summary"]
            if row["cut"] == cut
        }
        assert cells.keys() == means.keys()
        best = max(means.values())
        for label, mean in means.items():
            assert f"{mean:.3f}" in cells[label]
            assert ("**" in cells[label]) == (mean == best)
    assert "block-forwards per image" in text


def test_table_says_the_true_size_where_a_method_missed_it(compared):
    result = copy.deepcopy(compared[0])
    row = next(r for r in result["summary"] if (r["method"], r["cut"]) == ("amp-uniform", 0.4))
    row["params"]["mean"] = 0.75 * result["dense"]["params"]
    assert "(at -25.0%)" in table.render(result, "result.json")
    assert "(at " not in table.render(compared[0], "result.json")


def test_table_and_plot_refuse_what_is_no_comparison(compared, tmp_path):
    with pytest.raises(ArtifactError, match=r"other\.json is not a result"):
        table.render({"benchmark": "distill"}, "other.json")
    with pytest.raises(ArtifactError, match="no rows"):
        plot.draw({**compared[0], "summary": []}, "empty.json", tmp_path / "x.svg")
    with pytest.raises(ConfigError, match=r"Sizes: 0\.2, 0\.4"):
        table.render(compared[0], "result.json", cut=0.3)


@pytest.mark.parametrize("images", ["val", "photos"])
def test_plot_is_an_svg_with_every_method_and_always_the_same(compared, images, tmp_path):
    pytest.importorskip("matplotlib")
    result, _, _ = compared
    for name in ("a.svg", "b.svg"):
        plot.draw(result, "result.json", tmp_path / name, images)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    words = " ".join(ElementTree.fromstring(text).itertext())
    for label in {row["label"] for row in result["summary"]}:
        assert label in words


def test_judge_tells_a_changed_model_from_the_dense_one():
    torch.manual_seed(0)
    model = build_model(TINY)
    images = torch.randn(24, 3, 160, 160)
    judge = Judge(model, images, labels=[index % 3 for index in range(24)])
    same = judge.verdict(copy.deepcopy(model))
    assert same["cosine_mean"] == pytest.approx(1)
    assert same == pytest.approx(judge.verdict(None))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for block in changed.blocks:
            block.mlp.fc2.weight.mul_(-20)
    verdict = judge.verdict(changed)
    assert verdict["cosine_mean"] < 0.99
    assert verdict["patch_cosine_p1"] < verdict["patch_cosine_mean"] < 1
    assert Judge(model, images).verdict(None)["knn"] is None


def test_photographs_are_seen_whole_and_in_quadrants():
    pytest.importorskip("skimage")
    from PIL import Image

    picture = Image.new("RGB", (5, 4))
    picture.putpixel((4, 3), (255, 0, 0))
    whole, *quadrants = views(picture)
    assert whole is picture
    assert [view.size for view in quadrants] == [(2, 2), (3, 2), (2, 2), (3, 2)]
    assert quadrants[3].getpixel((2, 1)) == (255, 0, 0)
    tensors = load_photographs(build_model(TINY).spec)
    assert tensors.shape == (VIEWS * len(PHOTOGRAPHS), 3, 160, 160)
    assert len({tensor.numpy().tobytes() for tensor in tensors}) == len(tensors)


def test_cost_runs_both_at_the_same_size(weights, tmp_path):
    out = tmp_path / "cost.json"
    cost.main([*inputs(weights, out), "--threshold", "0.02"])
    result = read_json(out)
    naive, ours = result["naive_amp"], result["ours"]
    depth, steps = 6, result["config"]["steps"]
    # Scores take two forwards, the dense value one, and every candidate one.
    assert naive["block_forwards_per_image"] <= depth * (3 + depth * steps)
    assert naive["block_forwards_per_image"] > depth * (3 + depth * steps) * 0.9
    assert naive["block_backwards_per_image"] == depth
    assert abs(sum(naive["widths"]) - sum(ours["widths"])) <= 8
    assert result["naive_over_ours"]["block_forwards"] == pytest.approx(
        naive["block_forwards_per_image"] / ours["block_forwards_per_image"]
    )
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--images", "100"], "multiple of 64"),
        (["--images", "448", "--sizes", "0.2"], "448 were asked for"),
        (["--methods", "ours,magic"], "unknown method 'magic'"),
        (["--sizes", "0.99"], "largest possible"),
    ],
)
def test_wrong_options_are_refused_with_what_to_do(weights, tmp_path, change, message):
    arguments = inputs(weights, tmp_path / "x.json")
    with pytest.raises(SystemExit, match=message):
        run.main([*arguments, "--state", str(tmp_path / "state"), *change])
