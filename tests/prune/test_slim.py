"""Slimming equals masking, on every kind of MLP; slim checkpoints come back bit for bit."""

from __future__ import annotations

import pytest
import torch

from ampdeploy.checkpoint import kept_indices, load_model, save_model
from ampdeploy.errors import ArtifactError
from ampdeploy.models.build import build_model
from ampdeploy.models.profile import count_params
from ampdeploy.prune.slim import slim, top_neurons
from tests.conftest import TINY
from tests.mlp_kinds import BACKBONES, SIZE, make


def random_kept(model, seed=1):
    """A different width and random neurons in every block."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randperm(site.hidden, generator=generator)[: 5 + 7 * site.block].sort().values
        for site in model.spec.sites
    ]


def masked_forward(model, kept, images):
    """The dense model with every pruned neuron of h set to zero, by hooks."""
    handles = []
    for site, indices in zip(model.spec.sites, kept, strict=True):
        mask = torch.zeros(site.hidden)
        mask[indices] = 1
        module = model.backbone.get_submodule(site.fc_out)
        handles.append(
            module.register_forward_pre_hook(lambda _m, args, mask=mask: (args[0] * mask,))
        )
    with torch.no_grad():
        result = model(images)
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("kind", BACKBONES)
def test_slim_equals_masking(kind):
    model = make(kind)
    images = torch.randn(2, 3, SIZE, SIZE)
    kept = random_kept(model)
    with torch.no_grad():
        dense = model(images).features
    expected = masked_forward(model, kept, images)
    before = count_params(model)
    slim(model, kept)
    with torch.no_grad():
        got = model(images)
    torch.testing.assert_close(got.features, expected.features, rtol=0, atol=1e-5)
    if expected.patch_features is not None:
        torch.testing.assert_close(got.patch_features, expected.patch_features, rtol=0, atol=1e-5)
    assert (expected.features - dense).abs().max() > 1e-3  # the mask does change something
    assert [site.hidden for site in model.spec.sites] == [len(k) for k in kept]
    assert count_params(model) < before


def test_saved_slim_model_loads_back_bit_for_bit(tmp_path, tiny_model):
    kept = random_kept(tiny_model)
    slim(tiny_model, kept)
    path = tmp_path / "slim.safetensors"
    save_model(tiny_model, path, kept=kept)
    loaded = load_model(path)
    assert loaded.spec == tiny_model.spec
    ours, theirs = tiny_model.backbone.state_dict(), loaded.backbone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(tiny_model(images).features, loaded(images).features)
    assert kept_indices(path) == [indices.tolist() for indices in kept]


def test_dense_checkpoint_and_buffers_come_back(tmp_path):
    # RoPE tables are buffers that no checkpoint holds.
    model = build_model("timm:vit_small_patch16_rope_224", image_size=64)
    path = tmp_path / "dense.safetensors"
    save_model(model, path)
    loaded = load_model(path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images).features, loaded(images).features)
    assert kept_indices(path) is None


def test_damaged_checkpoints_are_named(tmp_path, tiny_model):
    path = tmp_path / "slim.safetensors"
    with pytest.raises(ArtifactError, match="does not exist"):
        load_model(path)
    save_model(tiny_model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        load_model(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="not a checkpoint of ampdeploy"):
        load_model(path)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([torch.arange(4)] * 5, "indices for 5 blocks"),
        ([torch.arange(4)] * 5 + [torch.tensor([], dtype=torch.int64)], "at least one"),
        ([torch.arange(4)] * 5 + [torch.tensor([1, 192])], "within 0..191"),
        ([torch.arange(4)] * 5 + [torch.tensor([3, 3])], "unique"),
    ],
)
def test_indices_of_another_model_change_nothing(tiny_model, kept, message):
    before = {name: t.clone() for name, t in tiny_model.state_dict().items()}
    with pytest.raises(ArtifactError, match=message):
        slim(tiny_model, kept)
    after = tiny_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_top_neurons_are_sorted_and_ties_go_to_the_lower_index():
    scores = torch.tensor([1.0, 5.0, 1.0, 7.0, 1.0])
    assert top_neurons(scores, 3).tolist() == [0, 1, 3]
    assert build_model(TINY).spec.sites[0].hidden == 192
