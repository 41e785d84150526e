"""The loss on tokens whose answer is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ampdeploy.distill.loss import token_loss
from ampdeploy.errors import ConfigError

# Tokens of one image: CLS, two registers, three patches; width 4.
CLS, REGISTERS, PATCHES = slice(0, 1), slice(1, 3), slice(3, None)


@pytest.fixture
def spec(tiny_model):
    """The spec of a token-pooled model with two registers."""
    return dataclasses.replace(tiny_model.spec, num_prefix_tokens=3, pooling="token")


@pytest.fixture
def teacher():
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("tokens", "cls", "patch"),
    [(CLS, 9.0, 0.0), (REGISTERS, 0.0, 0.0), (PATCHES, 0.0, 9.0)],
    ids=["cls", "registers", "patches"],
)
def test_each_token_counts_in_its_own_term(spec, teacher, tokens, cls, patch):
    student = teacher.clone()
    student[:, tokens] += 3
    loss = token_loss(student, teacher, spec)
    assert loss.cls is not None
    torch.testing.assert_close(loss.cls, torch.tensor(cls))
    torch.testing.assert_close(loss.patch, torch.tensor(patch))
    torch.testing.assert_close(loss.total, torch.tensor(cls + patch))


def test_one_wrong_patch_of_three_is_a_third_of_the_term(spec, teacher):
    student = teacher.clone()
    student[:, 4] += 3
    torch.testing.assert_close(token_loss(student, teacher, spec).patch, torch.tensor(3.0))


@pytest.mark.parametrize("pooling", ["avg", "map"])
def test_pooled_models_have_the_patch_term_alone(spec, teacher, pooling):
    student = teacher.clone()
    student[:, CLS] += 3
    student[:, PATCHES] += 1
    loss = token_loss(student, teacher, dataclasses.replace(spec, pooling=pooling))
    assert loss.cls is None
    torch.testing.assert_close(loss.total, torch.tensor(1.0))


def test_the_loss_is_computed_in_float32_and_trains_the_student_only(spec, teacher):
    student = (teacher + 0.01).requires_grad_()
    teacher = teacher.clone().requires_grad_()
    total = token_loss(student.bfloat16(), teacher, spec).total
    assert total.dtype == torch.float32
    total.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert torch.equal(student.grad[:, REGISTERS], torch.zeros(2, 2, 4))


def test_other_architecture_is_refused(spec, teacher):
    with pytest.raises(ConfigError, match=r"\(2, 6, 5\).*\(2, 6, 4\).*slimmed from"):
        token_loss(torch.zeros(2, 6, 5), teacher, spec)
