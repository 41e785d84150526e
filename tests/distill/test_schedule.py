"""Rates at the landmarks of a run, and who decays."""

from __future__ import annotations

import logging

import pytest
import timm
import torch

from ampdeploy.config import DistillConfig
from ampdeploy.distill.schedule import parameter_groups, plan_schedule
from ampdeploy.errors import DataError
from tests.distill.tiny_run import make_pair

CONFIG = DistillConfig(epochs=5, batch_size=64, base_lr=4e-5, warmup_epochs=1.0)


@pytest.fixture
def schedule():
    """10 steps an epoch (the last 30 of 670 images are dropped), 50 in all, peak 1e-5."""
    return plan_schedule(CONFIG, images=670)


def test_length(schedule):
    assert (schedule.steps_per_epoch, schedule.steps, schedule.warmup_steps) == (10, 50, 10)


def test_learning_rate_landmarks(schedule):
    assert schedule.peak_lr == pytest.approx(4e-5 * 64 / 256)
    assert schedule.lr(0) == pytest.approx(1e-6)  # a tenth: no step is wasted on rate 0
    assert schedule.lr(4) == pytest.approx(5e-6)
    assert schedule.lr(9) == pytest.approx(1e-5)  # end of warm-up
    assert schedule.lr(10) == pytest.approx(1e-5)
    assert schedule.lr(30) == pytest.approx(5e-6)  # half-way down the cosine
    assert 0 < schedule.lr(49) < 2e-8
    assert schedule.lr(50) == pytest.approx(0, abs=1e-20)


def test_weight_decay_landmarks(schedule):
    assert schedule.weight_decay(0) == pytest.approx(0.04)
    assert schedule.weight_decay(25) == pytest.approx(0.12)
    assert schedule.weight_decay(50) == pytest.approx(0.2)


def test_rates_never_turn_back(schedule):
    rates = [schedule.lr(step) for step in range(50)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    decay = [schedule.weight_decay(step) for step in range(50)]
    assert decay == sorted(decay)


def test_no_warmup():
    config = DistillConfig(epochs=1, batch_size=4, warmup_epochs=0, base_lr=0.64)
    schedule = plan_schedule(config, images=40)
    assert schedule.lr(0) == pytest.approx(0.01)


@pytest.mark.parametrize(("epochs", "warmup", "seen"), [(1, 1.0, 5), (2, 1.0, 10), (2, 7.0, 10)])
def test_warmup_takes_at_most_half_of_the_run_and_says_so(epochs, warmup, seen, caplog):
    config = DistillConfig(epochs=epochs, batch_size=4, warmup_epochs=warmup)
    with caplog.at_level(logging.WARNING, logger="ampdeploy"):
        assert plan_schedule(config, images=40).warmup_steps == seen
    assert ("more than half" in caplog.text) == (warmup > epochs / 2)


def test_a_single_step_runs_at_the_peak():
    schedule = plan_schedule(DistillConfig(epochs=1, batch_size=4), images=5)
    assert schedule.steps == 1
    assert schedule.lr(0) == schedule.peak_lr


def test_fewer_images_than_a_batch():
    with pytest.raises(DataError, match=r"63 training images.*batch of 64.*more images or lower"):
        plan_schedule(CONFIG, images=63)


def names_of(model, parameters):
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {by_id[id(p)] for p in parameters}


def test_only_matrices_decay():
    student, _ = make_pair()
    decays, stays = parameter_groups(student)
    assert (decays["decays"], stays["decays"]) == (True, False)
    decaying = names_of(student, decays["params"])
    matrices = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert decaying == {
        "backbone.patch_embed.proj.weight",
        *(f"backbone.blocks.{i}.{m}.weight" for i in range(6) for m in matrices),
    }
    staying = names_of(student, stays["params"])
    assert staying == {name for name, _ in student.named_parameters()} - decaying


@pytest.mark.parametrize(
    ("name", "offsets"),
    [
        (
            "vit_small_patch14_reg4_dinov2",
            {"cls_token", "reg_token", "pos_embed", "blocks.0.ls1.gamma", "norm.weight"},
        ),
        ("eva02_tiny_patch14_224", {"cls_token", "pos_embed", "blocks.0.attn.q_bias"}),
        ("vit_base_patch16_siglip_224", {"pos_embed", "attn_pool.latent", "patch_embed.proj.bias"}),
    ],
)
def test_tokens_positions_and_gains_of_other_families_stay(name, offsets):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    decays, stays = parameter_groups(model)
    assert offsets <= names_of(model, stays["params"])
    assert all(p.ndim >= 2 for p in decays["params"])
    assert "blocks.0.mlp.fc2.weight" in names_of(model, decays["params"])
