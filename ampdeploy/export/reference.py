"""What PyTorch computes in float32: the truth that exports and engines are compared with.

Tensor legend: B images, S image side, T tokens, C width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ampdeploy.export.names import OUTPUTS
from ampdeploy.models.vision import VisionModel


def block_references(
    model: VisionModel, images: Tensor, *, batch: int = 4
) -> tuple[dict[int, np.ndarray], dict[str, np.ndarray]]:
    """Tokens after every block, and the outputs, in float32.

    Args:
        model: In eval mode, on its own device.
        images: (N, 3, S, S), float32, normalised.
        batch: Images a pass.

    Returns:
        Block -> (N, T, C); output name -> (N, C) or (N, P, C).
    """
    device = next(model.parameters()).device
    blocks: dict[int, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for part in images.split(batch):
            state = model.stem(part.to(device))
            for index in range(len(model.blocks)):
                state = model.run_block(index, state)
                blocks.setdefault(index, []).append(state.tokens.float().cpu())
            for name, output in zip(OUTPUTS, model.head(state.tokens), strict=True):
                if output is not None:
                    outputs.setdefault(name, []).append(output.float().cpu())
    return (
        {index: torch.cat(parts).numpy() for index, parts in blocks.items()},
        {name: torch.cat(parts).numpy() for name, parts in outputs.items()},
    )
