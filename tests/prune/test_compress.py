"""Pruning as one call: budget in, repaired model and its whole story out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ampdeploy.config import HELD_OUT_IMAGES, PruneConfig
from ampdeploy.errors import ConfigError, DataError
from ampdeploy.models.profile import count_params, profile_model
from ampdeploy.prune.compress import compress, split_calibration
from tests.mlp_kinds import BACKBONES, SIZE, make


def images_of(count, seed=1):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("images", [*range(16, 80), 256, 1000, 50_000])
def test_calibration_images_are_shared_out(images):
    split = split_calibration(images)
    assert split.fit + split.measure + split.verify == images
    fewest, most = HELD_OUT_IMAGES
    assert fewest <= split.measure == split.verify <= most
    assert split.fit >= images // 2


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_model_fits_the_budget_and_the_record_fits_the_model(kind, unchanged, count_blocks):
    dense = make(kind)
    images = images_of(32)
    config = PruneConfig(params_cut=0.2, micro_batch_size=5)
    with unchanged(dense):
        result = compress(dense, images, config, multiple=8)
    widths = [site.hidden for site in result.model.spec.sites]
    assert widths == [len(kept) for kept in result.kept]
    assert widths == list(result.search.allocations[result.search.chosen].widths)
    found = 1 - count_params(result.model) / count_params(dense)
    step = 8 * profile_model(dense).mlp_params / sum(s.hidden for s in dense.spec.sites)
    assert found == pytest.approx(0.2, abs=step / 2 / count_params(dense) + 1e-9)
    with torch.no_grad():
        assert bool(torch.isfinite(result.model(images[:2]).features).all())
    with count_blocks(dense) as counter:
        compress(dense, images, config, multiple=8)
    assert result.block_forwards == counter.count


def test_better_than_taking_neurons_by_chance_or_not_repairing():
    dense, images, unseen = make("plain"), images_of(96), images_of(24, seed=5)
    results = {
        repair: compress(
            dense, images, PruneConfig(mlp_keep=0.5, repair=repair, micro_batch_size=16)
        ).model
        for repair in ("refit", "fold", "mean-shift", "none")
    }

    @torch.no_grad()
    def loss(model):
        return float(
            (1 - F.cosine_similarity(model(unseen).features, dense(unseen).features)).mean()
        )

    assert loss(results["refit"]) <= loss(results["fold"]) + 1e-6
    assert loss(results["fold"]) < 0.7 * loss(results["mean-shift"])
    assert loss(results["mean-shift"]) < loss(results["none"])


def test_the_same_images_give_the_same_model_whatever_the_micro_batch():
    results = [
        compress(make("plain"), images_of(24), PruneConfig(mlp_keep=0.5, micro_batch_size=size))
        for size in (3, 3, 8)
    ]
    states = [result.model.state_dict() for result in results]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert [k.tolist() for k in results[0].kept] == [k.tolist() for k in results[2].kept]
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[2][name], rtol=1e-2, atol=1e-3)


def test_the_width_multiple_of_the_config_goes_before_the_targets():
    config = PruneConfig(mlp_keep=0.5, width_multiple=32, repair="none")
    result = compress(make("plain"), images_of(16), config, multiple=8)
    assert all(site.hidden % 32 == 0 for site in result.model.spec.sites)


def test_too_few_images_and_another_search_are_refused():
    config = PruneConfig(mlp_keep=0.5)
    with pytest.raises(DataError, match="15 calibration images are too few; the search needs 16"):
        compress(make("plain"), images_of(15), config)
    with pytest.raises(ConfigError, match="'amp'"):
        compress(make("plain"), images_of(16), PruneConfig(search="amp", batch_size=8))
    with pytest.raises(ConfigError, match="cannot be met"):
        compress(make("plain"), images_of(16), PruneConfig(params_cut=0.99))
