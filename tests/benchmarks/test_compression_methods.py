"""The methods of the comparison, against direct computations on tiny models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ampdeploy.config import PruneConfig
from ampdeploy.errors import UnknownNameError, UnsupportedModelError, VerificationError
from ampdeploy.prune.amp import search
from ampdeploy.prune.compress import compress
from ampdeploy.prune.criterion import CRITERIA
from ampdeploy.prune.score import importance
from ampdeploy.prune.slim import slim
from benchmarks.compression import cost as cost_module
from benchmarks.compression.bench import Bench
from benchmarks.compression.methods import METHODS, amp, choose, ours, variance, weights
from benchmarks.compression.widths import budget_for, ranked, uniform, uniform_widths
from tests.mlp_kinds import SIZE, make

IMAGES = 16
CUTS = (0.2, 0.3)


def make_bench(kind, tmp_path, *, seed=0, first_seed=0, multiple=8, images=IMAGES) -> Bench:
    model = make(kind).requires_grad_(False)
    config = PruneConfig(batch_size=8, micro_batch_size=4, width_multiple=multiple, steps=3)
    pictures = torch.randn(images, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return Bench(
        dense=model,
        images=pictures,
        seed=seed,
        first_seed=first_seed,
        config=config,
        budgets={
            cut: budget_for(model, dataclasses.replace(config, params_cut=cut)) for cut in CUTS
        },
        notes=tmp_path,
        identities={0: "zero", 1: "one"},
    )


def hidden_of(model):
    return [site.hidden for site in model.spec.sites]


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def activations(model, images):
    """h of every block, (tokens of all images, H)."""
    caught = []
    handles = [
        model.backbone.get_submodule(site.fc_out).register_forward_pre_hook(
            lambda _module, args: caught.append(args[0].flatten(0, -2).double())
        )
        for site in model.spec.sites
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.exact])
@pytest.mark.parametrize("kind", ["plain", "packed_swiglu", "eva_split_gate"])
def test_every_method_meets_the_same_size_and_leaves_the_dense_model_alone(name, kind, tmp_path):
    bench = make_bench(kind, tmp_path)
    if name.startswith("tp-"):
        pytest.importorskip("torch_pruning")
        if kind == "packed_swiglu":
            with pytest.raises(UnsupportedModelError, match=r"--methods"):
                bench.run(METHODS[name], bench.budgets[0.2])
            return
    before = tensors_of(bench.dense)
    for budget in bench.budgets.values():
        model, cost = bench.run(METHODS[name], budget)
        assert sum(hidden_of(model)) == sum(uniform_widths(budget))
        assert cost.seconds > 0
        with torch.no_grad():
            assert torch.isfinite(model(bench.images[:2]).features).all()
    assert hidden_of(bench.dense) == hidden_of(make(kind))
    for tensor_name, tensor in bench.dense.state_dict().items():
        assert torch.equal(tensor, before[tensor_name])
    assert all(parameter.grad is None for parameter in bench.dense.parameters())


def test_uniform_widths_meet_the_total_and_differ_by_one_step(tmp_path):
    for budget in make_bench("plain", tmp_path).budgets.values():
        widths = uniform_widths(budget)
        assert max(widths) - min(widths) <= budget.multiple
        assert all(width % budget.multiple == 0 for width in widths)
        assert abs(sum(widths) - budget.neurons) <= budget.multiple / 2


def test_ranked_keeps_the_highest_scores_of_all_blocks_together(tmp_path):
    bench = make_bench("plain", tmp_path, multiple=1)
    generator = torch.Generator().manual_seed(3)
    scores = [
        torch.rand(hidden, generator=generator) * (1 + 0.3 * block)
        for block, hidden in enumerate(hidden_of(bench.dense))
    ]
    budget = bench.budgets[0.3]
    kept = ranked(scores, budget)
    together = torch.cat(scores).sort(descending=True).values
    threshold = together[sum(len(indices) for indices in kept) - 1]
    for indices, score in zip(kept, scores, strict=True):
        assert indices.tolist() == (score >= threshold).nonzero().squeeze(1).tolist()
    assert len({len(indices) for indices in kept}) > 1  # it is not the uniform ratio


def test_magnitude_does_not_see_a_scale_moved_from_one_linear_to_the_other(tmp_path):
    model = make("plain")
    before = weights.magnitude_scores(model)
    for block in model.blocks:
        factors = torch.linspace(0.1, 10, block.mlp.fc1.out_features)
        with torch.no_grad():
            block.mlp.fc1.weight.mul_(factors[:, None])
            block.mlp.fc2.weight.div_(factors)
    for old, new in zip(before, weights.magnitude_scores(model), strict=True):
        assert torch.allclose(old, new, rtol=1e-4)


@pytest.mark.parametrize("kind", ["packed_swiglu", "eva_split_gate"])
def test_incoming_weights_hold_gate_and_value_of_the_same_neuron(kind):
    model = make(kind)
    site = model.spec.sites[1]
    slimmed = slim(make(kind), [torch.tensor([3, 7]) for _ in model.spec.sites])
    rows = weights.incoming(model, site)
    assert rows.shape == (site.hidden, 2 * model.spec.feature_dim)
    assert torch.equal(weights.incoming(slimmed, slimmed.spec.sites[1]), rows[[3, 7]])
    assert torch.equal(
        weights.outgoing(slimmed, slimmed.spec.sites[1]), weights.outgoing(model, site)[[3, 7]]
    )


def test_gram_schmidt_takes_the_longest_residual_each_time():
    vectors = torch.randn(40, 12, generator=torch.Generator().manual_seed(1)).double()
    order = weights.gram_schmidt(vectors).tolist()
    assert sorted(order) == list(range(40))
    for step in range(12):
        basis = vectors[order[:step]].T
        projector = basis @ torch.linalg.pinv(basis) if step else torch.zeros(12, 12).double()
        residual = vectors - vectors @ projector
        free = [row for row in range(40) if row not in order[:step]]
        longest = max(free, key=lambda row: float(residual[row].norm()))
        assert order[step] == longest
    # With nothing left to remove, the free ones start over: the longest of them is next.
    free = [row for row in range(40) if row not in order[:12]]
    assert order[12] == max(free, key=lambda row: float(vectors[row].norm()))


def test_gram_schmidt_puts_copies_last_and_survives_zeros():
    vectors = torch.eye(4).double() * torch.tensor([4.0, 3.0, 2.0, 1.0])
    vectors = torch.cat([vectors, vectors[:1] * 0.99, torch.zeros(1, 4)])
    assert weights.gram_schmidt(vectors).tolist() == [0, 1, 2, 3, 4, 5]


def test_random_depends_on_the_seed_alone(tmp_path):
    def widths_and_first(seed):
        bench = make_bench("plain", tmp_path, seed=seed)
        model, _ = bench.run(METHODS["random"], bench.budgets[0.3])
        return model.backbone.blocks[0].mlp.fc1.weight

    assert torch.equal(widths_and_first(0), widths_and_first(0))
    assert not torch.equal(widths_and_first(0), widths_and_first(1))


def test_torch_pruning_gradients_are_those_of_one_backward_pass(tmp_path):
    pytest.importorskip("torch_pruning")
    from benchmarks.compression.methods import torchpruning

    bench = make_bench("plain", tmp_path)
    bench.make(torchpruning.GRADIENTS)
    found = bench.get(torchpruning.GRADIENTS)
    model = bench.copy().requires_grad_(True)
    for batch in bench.images.split(8):
        CRITERIA["entropy"](model(batch).features, bench.config.inv_temperature).backward()
    linears = [f"{site.fc_out}.weight" for site in model.spec.sites]
    linears += [f"{path}.weight" for site in model.spec.sites for path in site.fc_in]
    for name in linears:
        expected = model.backbone.get_parameter(name).grad
        assert torch.allclose(found[f"backbone.{name}"], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["plain", "registers"])
def test_torch_pruning_uniform_ranks_by_its_own_formula(kind, tmp_path):
    pytest.importorskip("torch_pruning")
    from benchmarks.compression.methods import torchpruning

    bench = make_bench(kind, tmp_path)
    budget = bench.budgets[0.3]
    bench.make(torchpruning.GRADIENTS)
    gradients = bench.get(torchpruning.GRADIENTS)
    magnitude, taylor = [], []
    for block, site in enumerate(bench.dense.spec.sites):
        fc1, fc2 = (
            bench.dense.blocks[block].mlp.fc1.weight,
            bench.dense.blocks[block].mlp.fc2.weight,
        )
        slopes = [gradients[f"backbone.{path}.weight"] for path in (*site.fc_in, site.fc_out)]
        magnitude.append(fc1.square().sum(1) + fc2.square().sum(0))
        taylor.append((fc1 * slopes[0]).abs().sum(1) + (fc2 * slopes[1]).abs().sum(0))
    for name, scores in (("tp-magnitude", magnitude), ("tp-taylor", taylor)):
        model, _ = bench.run(METHODS[name], budget)
        expected = slim(bench.copy(), uniform(scores, budget))
        for tensor_name, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[tensor_name], tensor), (name, tensor_name)


def test_torch_pruning_result_that_is_not_ours_is_refused():
    pytest.importorskip("torch_pruning")
    from benchmarks.compression.methods.torchpruning import _check_same

    model, other = make("plain"), make("plain")
    _check_same(model, other)
    with torch.no_grad():
        other.blocks[1].mlp.fc2.weight[0, 0] += 1
    with pytest.raises(VerificationError, match=r"blocks\.1\.mlp\.fc2\.weight"):
        _check_same(model, other)


def test_vbp_keeps_the_highest_variance_and_moves_the_mean(tmp_path):
    bench = make_bench("plain", tmp_path)
    budget = bench.budgets[0.3]
    model, _ = bench.run(variance.VBP, budget)
    hidden = activations(bench.dense, bench.images)
    kept = uniform([h.var(dim=0) for h in hidden], budget)
    expected = slim(bench.copy(), kept)
    for block, indices in enumerate(kept):
        dense, ours_ = bench.dense.blocks[block].mlp, model.blocks[block].mlp
        gone = [j for j in range(dense.fc1.out_features) if j not in indices.tolist()]
        shift = dense.fc2.weight[:, gone].double() @ hidden[block].mean(dim=0)[gone]
        assert torch.equal(ours_.fc1.weight, expected.blocks[block].mlp.fc1.weight)
        assert torch.equal(ours_.fc2.weight, expected.blocks[block].mlp.fc2.weight)
        assert torch.allclose(ours_.fc2.bias.double(), dense.fc2.bias + shift, atol=1e-4)


def test_ours_is_what_compress_gives(tmp_path):
    bench = make_bench("plain", tmp_path, images=64)
    for method, repair in ((ours.OURS, "refit"), (ours.OURS_FOLD, "fold")):
        model, cost = bench.run(method, bench.budgets[0.3])
        config = dataclasses.replace(bench.config, params_cut=0.3, repair=repair)
        whole = compress(bench.dense, bench.images, config)
        assert hidden_of(model) == hidden_of(whole.model)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), (method.name, name)
        # The re-fit also runs one image through every block to see how its output is scaled.
        extra = cost.block_forwards - whole.block_forwards
        assert 0 <= extra <= bench.dense.spec.depth


def test_amp_search_lands_on_the_sizes_and_is_not_run_twice(tmp_path, monkeypatch):
    bench = make_bench("plain", tmp_path)
    model, cost = bench.run(amp.PUBLISHED, bench.budgets[0.3])
    searches = bench.get(amp.SEARCHES)
    assert 1 <= len(searches.found) <= amp.MOST_SEARCHES
    nearest = searches.nearest(bench.budgets[0.3].neurons)
    config = dataclasses.replace(bench.config, threshold=nearest.threshold)
    scores = importance(bench.dense, bench.images.split(8), config, count=IMAGES)
    direct = bench.copy()
    search(direct, bench.images[:8].split(4), scores, config, images=8)
    assert hidden_of(model) == hidden_of(direct) == nearest.widths
    for name, tensor in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    # The row pays for the scores and for one search, however many were swept.
    assert nearest.cost.block_forwards < cost.block_forwards
    assert cost.block_forwards == nearest.cost.block_forwards + 2 * 3 * IMAGES

    def never(self, threshold):
        raise AssertionError(f"searched again with {threshold}")

    monkeypatch.setattr(amp.Searches, "run", never)
    again, repeated = make_bench("plain", tmp_path).run(amp.PUBLISHED, bench.budgets[0.3])
    assert hidden_of(again) == hidden_of(model)
    assert repeated.block_forwards == cost.block_forwards


def test_amp_uses_the_first_seed_s_thresholds_for_the_others(tmp_path):
    first = make_bench("plain", tmp_path)
    first.run(amp.PUBLISHED, first.budgets[0.2])
    wanted = {
        first.get(amp.SEARCHES).nearest(budget.neurons).threshold
        for budget in first.budgets.values()
    }
    second = make_bench("plain", tmp_path, seed=1)
    second.run(amp.PUBLISHED, second.budgets[0.2])
    assert set(second.get(amp.SEARCHES).found) == wanted


def test_amp_search_of_other_images_is_not_taken_over(tmp_path):
    bench = make_bench("plain", tmp_path)
    bench.run(amp.PUBLISHED, bench.budgets[0.2])
    other = make_bench("plain", tmp_path)
    other.identities = {0: "other images"}
    assert amp.Searches(other, 0).found == {}


def test_threshold_sweep_lands_near_every_size_of_a_smooth_curve():
    def neurons(threshold):
        return int(18432 / (1 + (threshold / 0.03) ** 0.7))

    targets = [12807, 9994, 7182, 4369]
    found: dict[float, int] = {}
    for _ in range(10):
        threshold = amp.next_threshold(found, targets, 0.01 * 18432, 5e-3)
        if threshold is None:
            break
        assert threshold not in found
        found[threshold] = neurons(threshold)
    for target in targets:
        assert min(abs(n - target) for n in found.values()) <= 0.01 * 18432


def test_threshold_sweep_gives_up_on_a_step_of_the_curve():
    found: dict[float, int] = {}
    for _ in range(100):
        threshold = amp.next_threshold(found, [500], 10, 1e-3)
        if threshold is None:
            break
        found[threshold] = 1000 if threshold < 0.02 else 0
    assert threshold is None
    assert len(found) < 60


def test_naive_search_finds_what_the_suffix_search_finds_at_its_own_cost(tmp_path):
    bench = make_bench("registers", tmp_path)
    scores = importance(bench.dense, bench.images.split(8), bench.config, count=IMAGES)
    before = tensors_of(bench.dense)
    with bench.meter() as meter:
        kept = cost_module.naive_search(bench.dense, bench.images, scores, bench.config)
    fast = search(bench.copy(), bench.images.split(4), scores, bench.config, images=IMAGES)
    assert [k.tolist() for k in kept] == [k.tolist() for k in fast.kept]
    assert len({len(k) for k in kept} | {128}) > 1  # something was removed
    depth, tried = bench.dense.spec.depth, len(fast.candidates)
    assert meter.cost.block_forwards == depth * (1 + tried) * IMAGES
    for name, tensor in bench.dense.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_unknown_method_names_the_nearest():
    with pytest.raises(UnknownNameError, match="amp-uniform"):
        choose(["amp-unifrom"])
    assert [method.name for method in choose(["ours", "random"])] == ["random", "ours"]


def test_meter_counts_images_through_blocks_and_backward_passes():
    model = make("plain")
    from benchmarks.compression.meter import Meter

    images = torch.randn(5, 3, SIZE, SIZE)
    with Meter(type(model.blocks[0]), torch.device("cpu")) as meter:
        with torch.no_grad():
            model(images)
        model.requires_grad_(True)
        model(images[:2]).features.sum().backward()
    assert meter.cost.block_forwards == 3 * 7
    assert meter.cost.block_backwards == 3 * 2
    with Meter(nn.Linear, torch.device("cpu")) as idle:
        pass
    assert idle.cost.block_forwards == 0
    model(images)  # nothing counts after the end
    assert meter.cost.block_forwards == 3 * 7


def test_meter_sees_memory_that_is_gone_again_and_what_is_held():
    from benchmarks.compression.meter import Meter

    megabytes = 2**20
    with Meter(nn.Linear, torch.device("cpu")) as meter:
        held = torch.ones(64 * megabytes // 4)
        gone = torch.ones(128 * megabytes // 4)
        total = float(gone.sum())
        del gone
    assert total > 0
    assert len(held) > 0
    assert 180 * megabytes < meter.cost.peak_bytes < 260 * megabytes
    assert 50 * megabytes < meter.cost.held_bytes < 110 * megabytes


def test_costs_add_up_with_memory_on_top_of_what_is_held():
    from benchmarks.compression.meter import Cost

    first = Cost(seconds=1, block_forwards=10, block_backwards=4, peak_bytes=100, held_bytes=60)
    second = Cost(seconds=2, block_forwards=5, block_backwards=0, peak_bytes=70, held_bytes=10)
    both = first.then(second)
    assert (both.seconds, both.block_forwards, both.block_backwards) == (3, 15, 4)
    assert (both.peak_bytes, both.held_bytes) == (130, 70)
    assert second.then(first).peak_bytes == 110
