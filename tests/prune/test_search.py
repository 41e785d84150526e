"""The divergence search: what it records, what it leaves alone, what it costs and what it gains."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ampdeploy.config import PruneConfig
from ampdeploy.prune import search as search_module
from ampdeploy.prune.allocate import allocate
from ampdeploy.prune.budget import plan_budget
from ampdeploy.prune.compensate import fold
from ampdeploy.prune.compress import scores_of
from ampdeploy.prune.divergence import divergence
from ampdeploy.prune.moments import collect
from ampdeploy.prune.search import EXPONENTS, search
from ampdeploy.prune.select import curve_of
from ampdeploy.prune.slim import top_neurons
from tests.mlp_kinds import BACKBONES, SIZE, make

MULTIPLE = 8


def images_of(count, seed):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


class Case:
    """A model with its moments, ready to be searched."""

    def __init__(self, kind, *, change=None, **options):
        self.kind, self.change = kind, change
        self.model = self.fresh()
        self.config = PruneConfig(**{"mlp_keep": 0.5, "micro_batch_size": 3, **options})
        fit = images_of(24, 1)
        self.moments = collect(self.model, fit.split(8), count=len(fit))
        self.scores = scores_of(self.model, self.moments)
        self.measure, self.verify = images_of(7, 2), images_of(8, 3)
        self.budget = plan_budget(self.model, self.config, multiple=MULTIPLE)

    def fresh(self):
        model = make(self.kind)
        if self.change:
            with torch.no_grad():
                self.change(model)
        return model

    def search(self):
        micro = self.config.micro_batch_size
        return search(
            self.model,
            self.moments,
            self.scores,
            self.measure.split(micro),
            self.verify.split(micro),
            self.budget,
            self.config,
        )

    def kept(self, widths):
        return [top_neurons(s, w) for s, w in zip(self.scores, widths, strict=True)]

    @torch.no_grad()
    def divergence_of(self, kept, images, *, method="least-squares"):
        folded = fold(self.fresh(), kept, self.moments, method=method)
        return divergence(
            [self.model(images)], [folded(images)], self.config.inv_temperature
        )  # fmt: skip


def as_list(found):
    return [value for value in (found.cosine, found.patch_cosine, found.kl) if value is not None]


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_trace_says_what_was_done(kind, unchanged):
    case = Case(kind)
    with unchanged(case.model):
        result = case.search()
    hidden = [site.hidden for site in case.model.spec.sites]
    curves = [curve_of(score).double().numpy() for score in case.scores]
    predicted = allocate(curves, case.budget)
    # Every block alone, at the width that the prediction gives it.
    assert [m.block for m in result.measurements] == [0, 1, 2]
    assert [m.width for m in result.measurements] == predicted
    for m, curve in zip(result.measurements, curves, strict=True):
        assert m.predicted == pytest.approx(curve[m.width])
        kept = [torch.arange(width) for width in hidden]
        kept[m.block] = case.kept(predicted)[m.block]
        alone = case.divergence_of(kept, case.measure)
        assert as_list(m.measured) == pytest.approx(as_list(alone), rel=1e-2, abs=1e-6)
    # Every allocation as a whole, on images of its own.
    assert [a.exponent for a in result.allocations] == list(EXPONENTS)
    assert list(result.allocations[0].widths) == predicted  # nothing is corrected
    for allocation in result.allocations:
        assert abs(sum(allocation.widths) - case.budget.neurons) <= MULTIPLE / 2
        whole = case.divergence_of(case.kept(allocation.widths), case.verify)
        assert as_list(allocation.verified) == pytest.approx(as_list(whole), rel=1e-2, abs=1e-6)
    totals = [allocation.verified.total for allocation in result.allocations]
    assert result.chosen == totals.index(min(totals))
    best = result.allocations[result.chosen].widths
    assert [k.tolist() for k in result.kept] == [k.tolist() for k in case.kept(best)]
    assert (result.measured_images, result.verified_images) == (7, 8)


def test_the_correction_moves_neurons_to_where_the_prediction_was_too_low():
    case = Case("plain")
    result = case.search()
    ratios = [m.measured.total / m.predicted for m in result.measurements]
    curves = [curve_of(score).double().numpy() for score in case.scores]
    for allocation in result.allocations:
        corrected = [c * r**allocation.exponent for c, r in zip(curves, ratios, strict=True)]
        assert list(allocation.widths) == allocate(corrected, case.budget)


# Memory for all block inputs, for two of three, for one.
@pytest.mark.parametrize("states_that_fit", [None, 2, 1])
def test_block_forwards_are_counted_right(monkeypatch, count_blocks, states_that_fit):
    case = Case("plain")
    if states_that_fit:
        bytes_per_state = case.model.stem(case.measure).tokens.nbytes
        monkeypatch.setattr(
            search_module, "memory_budget", lambda _device: states_that_fit * bytes_per_state
        )
    with count_blocks(case.model) as counter:
        result = case.search()
    assert result.block_forwards == counter.count
    if not states_that_fit:
        # To the last block's input; dense from it; each block alone; the whole, dense and tried.
        assert counter.count == 7 * (2 + 1 + (1 + 2 + 3)) + 8 * 3 * (1 + len(EXPONENTS))


def empty_block(model):
    linear = model.backbone.get_submodule(model.spec.sites[1].fc_out)
    linear.weight.zero_()
    linear.bias.zero_()


@pytest.mark.parametrize("kind", ["plain", "packed_swiglu", "eva_split_gate"])
def test_a_block_that_does_nothing_pays_for_the_others(kind):
    case = Case(kind, change=empty_block, mlp_keep=0.6)
    result = case.search()
    widths = [len(kept) for kept in result.kept]
    assert widths[1] == MULTIPLE
    uniform = [round(0.6 * site.hidden / MULTIPLE) * MULTIPLE for site in case.model.spec.sites]
    assert sum(widths) <= sum(uniform) + MULTIPLE / 2
    ours = result.allocations[result.chosen].verified.total
    theirs = case.divergence_of(case.kept(uniform), case.verify).total
    assert ours < 0.5 * theirs


def test_a_block_that_counts_for_nothing_is_no_hindrance():
    """LayerScale 0: not even a change of its output reaches the features."""

    def silence(model):
        model.blocks[2].ls2.gamma.zero_()

    result = Case("registers", change=silence).search()
    assert len(result.kept[2]) == MULTIPLE


@pytest.mark.parametrize("method", ["mean-shift", "none"])
def test_it_judges_with_the_repair_that_will_be_done(method):
    case = Case("plain", repair=method)
    result = case.search()
    chosen = result.allocations[result.chosen]
    whole = case.divergence_of(case.kept(chosen.widths), case.verify, method=method)
    assert as_list(chosen.verified) == pytest.approx(as_list(whole), rel=1e-3, abs=1e-6)
    folded = case.divergence_of(case.kept(chosen.widths), case.verify)
    assert chosen.verified.total > folded.total


def test_everything_kept_loses_nothing():
    case = Case("plain", mlp_keep=0.9)
    case.budget = dataclasses.replace(case.budget, neurons=3 * 128)
    result = case.search()
    assert [len(kept) for kept in result.kept] == [128] * 3
    assert all(a.verified.total == pytest.approx(0, abs=1e-6) for a in result.allocations)


def test_a_state_in_training_mode_comes_back(unchanged):
    case = Case("registers")
    case.model.train()
    with unchanged(case.model):
        case.search()
    assert case.model.training
    assert all(m.training for m in case.model.modules())
