"""From dense to slim: the fold, the re-fit where it pays, and what is said about it."""

from __future__ import annotations

import pytest
import torch

from ampdeploy.config import REPAIRS, PruneConfig
from ampdeploy.prune.compensate import fold
from ampdeploy.prune.divergence import divergence
from ampdeploy.prune.moments import collect
from ampdeploy.prune.repair import slim_and_repair
from tests.mlp_kinds import BACKBONES, SIZE, make

POST_NORM = "eva_post_norm"


def images_of(count, seed):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


class Case:
    def __init__(self, kind):
        self.kind, self.dense = kind, make(kind)
        self.fit, self.verify = images_of(30, 1), images_of(8, 2)
        self.moments = collect(self.dense, self.fit.split(10), count=30)
        generator = torch.Generator().manual_seed(3)
        self.kept = [
            torch.randperm(site.hidden, generator=generator)[: 24 + 8 * site.block].sort().values
            for site in self.dense.spec.sites
        ]

    def repair(self, how, *, fit=None):
        config = PruneConfig(repair=how, micro_batch_size=3)
        fit = self.fit if fit is None else fit
        batches = (batch for batch in fit.split(7))  # can be gone through but once
        return slim_and_repair(
            self.dense, self.kept, self.moments, batches, self.verify.split(3), config
        )

    @torch.no_grad()
    def divergence_of(self, model):
        return divergence([self.dense(self.verify)], [model(self.verify)], 20.0)


def equal_states(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("how", REPAIRS)
def test_every_repair_gives_the_model_that_it_says(kind, how, unchanged):
    case = Case(kind)
    with unchanged(case.dense):
        model, repair = case.repair(how)
    assert [site.hidden for site in model.spec.sites] == [len(k) for k in case.kept]
    folded = fold(make(kind), case.kept, case.moments, method=REPAIRS[how])
    found = case.divergence_of(folded)
    assert repair.folded.total == pytest.approx(found.total, rel=1e-3, abs=1e-6)
    if how != "refit":
        assert repair.method == REPAIRS[how]
        assert repair.refitted is None
        assert repair.blocks == ()
        assert equal_states(model, folded)
    else:
        assert len(repair.blocks) == 3
        shipped = repair.refitted if repair.method == "refit" else repair.folded
        assert shipped.total == pytest.approx(case.divergence_of(model).total, rel=1e-3, abs=1e-6)
        assert shipped.total <= repair.folded.total


@pytest.mark.parametrize("kind", ["average_pool", "clip_pre_norm"])
def test_a_refit_that_pays_is_kept(kind, said):
    case = Case(kind)
    model, repair = case.repair("refit")
    assert repair.method == "refit"
    assert repair.refitted.total < 0.9 * repair.folded.total
    assert "does not pay" not in said.text
    assert not equal_states(model, case.repair("fold")[0])


def test_a_refit_that_does_not_pay_is_undone_and_it_is_said(said):
    case = Case("plain")
    # Three images that all show the same: nothing that holds on others.
    model, repair = case.repair("refit", fit=images_of(1, 9).expand(3, -1, -1, -1))
    assert repair.method == "least-squares"
    assert repair.refitted.total >= repair.folded.total
    assert "does not pay" in said.text
    assert equal_states(model, case.repair("fold")[0])


@pytest.mark.parametrize("how", ["refit", "fold", "mean-shift", "none"])
def test_moments_too_poor_for_least_squares_are_named_once(how, said):
    case = Case("plain")
    case.moments = collect(case.dense, [images_of(4, 1)], count=4)  # 68 tokens
    case.kept = [torch.arange(width) for width in (34, 40, 36)]
    case.repair(how)
    warnings = [r.getMessage() for r in said.records if r.levelname == "WARNING"]
    if REPAIRS[how] != "least-squares":
        assert warnings == []
    else:
        (warning,) = warnings
        assert "68 tokens" in warning
        assert "block 1, 2;" in warning
        assert "only the mean" in warning
        assert "--calib-images" in warning


def test_a_refit_of_nothing_is_not_called_one(said):
    """Where every block ends in a norm, the fold is what the model has."""
    case = Case(POST_NORM)
    model, repair = case.repair("refit")
    assert repair.method == "least-squares"
    assert all(entry.skipped for entry in repair.blocks)
    assert equal_states(model, case.repair("fold")[0])


def test_a_refit_that_cannot_be_judged_is_undone():
    case = Case("average_pool")  # where it pays
    case.verify[0, 0, 0, 0] = torch.nan
    model, repair = case.repair("refit")
    assert repair.method == "least-squares"
    assert equal_states(model, case.repair("fold")[0])


@pytest.mark.parametrize("kind", ["plain", POST_NORM])
@pytest.mark.parametrize("how", ["refit", "fold", "none"])
def test_block_forwards_are_counted_right(kind, how, count_blocks):
    case = Case(kind)
    with count_blocks(case.dense) as counter:
        _, repair = case.repair(how)
    assert repair.block_forwards == counter.count
