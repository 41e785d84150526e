"""What the student is asked to match: the teacher's tokens before the final norm.

Tensor legend: B images, N tokens (prefix + patches), P patches, C model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ampdeploy.errors import ConfigError
from ampdeploy.models.spec import ModelSpec


class TokenLoss(NamedTuple):
    """The two terms, each a float32 scalar."""

    cls: Tensor | None
    """MSE of the CLS token; None for models that do not pool by it."""
    patch: Tensor
    """MSE of the patch tokens."""

    @property
    def total(self) -> Tensor:
        """What is minimised: the plain sum, as published."""
        return self.patch if self.cls is None else self.cls + self.patch


def token_loss(student_BNC: Tensor, teacher_BNC: Tensor, spec: ModelSpec) -> TokenLoss:
    """MSE on CLS and MSE on patch tokens, both before the final norm (AMP, section 3.5).

    Each term is a mean over its own elements, so the one CLS token weighs as much as all patches
    together. Register tokens are scratch space of the network that nobody reads, so neither term
    holds them. A model that pools its patches (``avg``, ``map``) has no CLS token that anybody
    reads either, even where the architecture carries one: there the patch term stands alone.

    Args:
        student_BNC: `VisionModel.forward_tokens` of the student, any float type.
        teacher_BNC: The same of the teacher; no gradient flows into it.
        spec: Of either model; they differ in hidden widths only.

    Raises:
        ConfigError: The two do not have the same shape, so they are not the same architecture.
    """
    if student_BNC.shape != teacher_BNC.shape:
        raise ConfigError(
            f"the student's tokens are {tuple(student_BNC.shape)} and the teacher's "
            f"{tuple(teacher_BNC.shape)}. Distil from the dense model that the student was "
            "slimmed from, at the same image size."
        )
    # Squares of the residual stream of a large ViT do not fit bfloat16's eight bits of precision.
    student, teacher = student_BNC.float(), teacher_BNC.detach().float()
    patches = slice(spec.num_prefix_tokens, None)
    patch = F.mse_loss(student[:, patches], teacher[:, patches])
    if spec.pooling != "token":
        return TokenLoss(None, patch)
    return TokenLoss(F.mse_loss(student[:, 0], teacher[:, 0]), patch)
