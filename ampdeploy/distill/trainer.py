"""Distillation: the slim student learns the tokens of the dense model it came from. No labels.

AMP (arXiv 2603.08100), section 3.5 and appendix: AdamW, linear warm-up and cosine to 0, weight
decay rising along a cosine, gradient clipping, random crops of the training images.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ampdeploy.config import DistillConfig
from ampdeploy.data.folder import ImageSet
from ampdeploy.data.loading import TrainImages
from ampdeploy.distill.loss import token_loss
from ampdeploy.distill.schedule import Schedule, parameter_groups, plan_schedule
from ampdeploy.distill.state import (
    TrainState,
    load_state,
    rng_state,
    save_state,
    seed_everything,
    set_rng_state,
    uninterrupted,
)
from ampdeploy.errors import AmpDeployError, ConfigError
from ampdeploy.models.device import resolve_device
from ampdeploy.models.vision import VisionModel
from ampdeploy.progress import log, task

ADAM_BETAS = (0.9, 0.95)

# Decoding and augmenting on the cores beside a GPU. On a CPU the model wants the cores itself.
MAX_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What a finished run did."""

    steps: int
    epochs: int
    images: int
    """Training images in the folder; every epoch sees all but the last incomplete batch."""
    device: str
    autocast: str
    """``bfloat16`` or ``none``."""
    first_loss: float
    """Mean over the first tenth of the steps."""
    last_loss: float
    """Mean over the last tenth of the steps."""
    history: list[dict[str, Any]]
    """Per step: step, epoch, loss, cls_loss (None without a CLS token), patch_loss, lr,
    weight_decay. Steps and epochs count from 1."""
    seconds: float
    """Training time, data loading included, over all the processes of a resumed run."""


def distill(
    student: VisionModel,
    teacher: VisionModel,
    images: ImageSet,
    config: DistillConfig,
    *,
    state_path: Path,
    identity: str,
    on_epoch: Callable[[int], None] | None = None,
) -> DistillResult:
    """Train `student` in place to produce `teacher`'s tokens.

    Killed at any moment, it continues from `state_path` when called again with the same arguments
    and freshly loaded models; on a CPU the weights then equal those of an undisturbed run bit for
    bit. (On CUDA the backward pass of attention is itself not deterministic.)

    The final norm and pooling stand behind the loss, so they keep the dense model's weights.

    Args:
        student: The slim model, float32; afterwards in eval mode on the CPU.
        teacher: The dense model it was slimmed from; not changed, and put back on its device.
        images: Training images; labels are not used.
        config: The recipe; `epochs` must be 1 or more.
        state_path: Where the trainer's state goes every `checkpoint_seconds` and at Ctrl-C.
            The caller removes it once the student is saved.
        identity: Names models, images and options; a state of another identity is not resumed.
        on_epoch: Called with the number of finished epochs: 0 before training, then after every
            epoch, `student` in eval mode on the training device. A resumed run may repeat a call.

    Raises:
        DataError: The images do not fill one batch.
        MissingDependencyError: CUDA was asked for and there is none.
        ConfigError: No epochs, or student and teacher are not the same architecture.
        AmpDeployError: The loss or its gradient is not finite; a state saved before is good. Or
            the GPU ran out of memory, or the state cannot be written.
        KeyboardInterrupt: Ctrl-C, once the state is saved.
    """
    if config.epochs == 0:
        raise ConfigError("distillation was asked for with 0 epochs. Give 1 or more.")
    device = resolve_device(config.device)
    autocast = _pick_autocast(config.autocast, device)
    schedule = plan_schedule(config, len(images))
    data = TrainImages(
        images,
        student.spec,
        min_scale=config.min_scale,
        strong=config.strong_augment,
        seed=config.seed,
    )
    teacher_home = next(teacher.parameters()).device
    callers_rng = rng_state()
    try:
        student.to(device)
        teacher.to(device).eval()
        optimizer = torch.optim.AdamW(
            parameter_groups(student), lr=schedule.peak_lr, betas=ADAM_BETAS
        )
        seed_everything(config.seed)
        state = load_state(state_path, identity, student, optimizer) or TrainState()
        log.info(
            "  distil on %s (autocast %s): steps %d to %d, %d per epoch, peak rate %.3g",
            device,
            autocast,
            state.step + 1,
            schedule.steps,
            schedule.steps_per_epoch,
            schedule.peak_lr,
        )

        def save() -> None:
            save_state(state_path, identity, state, student, optimizer)

        try:
            _train(
                student,
                teacher,
                data,
                config,
                schedule,
                optimizer,
                state,
                device=device,
                autocast=autocast,
                save=save,
                on_epoch=on_epoch,
            )
        except KeyboardInterrupt:
            save()
            log.warning("  stopped after step %d; the same command continues there", state.step)
            raise
        except torch.OutOfMemoryError as error:
            raise AmpDeployError(
                f"the GPU ran out of memory distilling at batch {config.batch_size}: {error}. "
                "Lower the distillation batch size; the learning rate follows it."
            ) from error
    finally:
        student.eval().to("cpu")
        teacher.to(teacher_home)
        set_rng_state(callers_rng)

    losses = [row["loss"] for row in state.history]
    window = max(len(losses) // 10, 1)
    return DistillResult(
        steps=state.step,
        epochs=config.epochs,
        images=len(images),
        device=str(device),
        autocast=autocast,
        first_loss=sum(losses[:window]) / window,
        last_loss=sum(losses[-window:]) / window,
        history=state.history,
        seconds=state.seconds,
    )


def _train(
    student: VisionModel,
    teacher: VisionModel,
    data: TrainImages,
    config: DistillConfig,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    *,
    device: torch.device,
    autocast: str,
    save: Callable[[], None],
    on_epoch: Callable[[int], None] | None,
) -> None:
    """The loop, from `state.step` to the end."""

    def observe(epochs_done: int) -> None:
        if on_epoch is not None:
            student.eval()
            on_epoch(epochs_done)
            set_rng_state(state.rng)  # whatever the caller drew must not change the training

    saved = time.monotonic()
    with task("distil", schedule.steps - state.step) as shown:
        for epoch in range(state.step // schedule.steps_per_epoch, config.epochs):
            position = state.step % schedule.steps_per_epoch
            if position == 0:
                observe(epoch)
            student.train()
            data.set_epoch(epoch)
            clock = time.monotonic()

            for images in _batches(data, config, epoch, position, device):
                lr = schedule.lr(state.step)
                weight_decay = schedule.weight_decay(state.step)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                    group["weight_decay"] = weight_decay if group["decays"] else 0.0

                images = images.to(device, non_blocking=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast == "bfloat16"):
                    with torch.no_grad():
                        target = teacher.forward_tokens(images)
                    tokens = student.forward_tokens(images)
                loss = token_loss(tokens, target, student.spec)

                optimizer.zero_grad()
                loss.total.backward()
                norm = nn.utils.clip_grad_norm_(student.parameters(), config.clip_grad_norm)
                row = {
                    "step": state.step + 1,
                    "epoch": epoch + 1,
                    "loss": loss.total.item(),
                    "cls_loss": None if loss.cls is None else loss.cls.item(),
                    "patch_loss": loss.patch.item(),
                    "lr": lr,
                    "weight_decay": weight_decay,
                }
                _check_finite(row, norm.item(), schedule)

                with uninterrupted():
                    optimizer.step()
                    now = time.monotonic()
                    state.finish_step(row, now - clock)
                    clock = now
                if now - saved >= config.checkpoint_seconds:
                    save()
                    saved = time.monotonic()
                shown.note(
                    f"epoch {epoch + 1}/{config.epochs} loss {row['loss']:.4g} rate {lr:.2g}"
                )
                shown.advance()

            recent = [row["loss"] for row in state.history[-schedule.steps_per_epoch :]]
            mean = sum(recent) / len(recent)
            log.info("  epoch %d/%d: mean loss %.5g", epoch + 1, config.epochs, mean)
        observe(config.epochs)


def _batches(
    data: TrainImages, config: DistillConfig, epoch: int, position: int, device: torch.device
) -> DataLoader[torch.Tensor]:
    """The batches of `epoch` from number `position` on, (B, 3, S, S) each.

    Order and augmentation follow from seed, epoch and index alone, never from what ran before.
    """
    order = np.random.default_rng([config.seed, epoch]).permutation(len(data))
    full = len(data) // config.batch_size
    batches = order[: full * config.batch_size].reshape(full, config.batch_size)[position:]
    on_gpu = device.type == "cuda"
    return DataLoader(
        data,
        batch_sampler=batches.tolist(),
        num_workers=min(MAX_WORKERS, os.cpu_count() or 1) if on_gpu else 0,
        pin_memory=on_gpu,
        # A loader draws a seed when it starts; from the global generator that would tell a
        # resumed run, which starts one more loader, from an undisturbed one.
        generator=torch.Generator().manual_seed(config.seed),
    )


def _check_finite(row: dict[str, Any], gradient_norm: float, schedule: Schedule) -> None:
    if math.isfinite(row["loss"]) and math.isfinite(gradient_norm):
        return
    raise AmpDeployError(
        f"distillation diverged at step {row['step']} of {schedule.steps}: loss {row['loss']}, "
        f"gradient norm {gradient_norm}, learning rate {row['lr']:.3g}. That step was not taken "
        "and the last saved state is good. Lower the base learning rate, raise the warm-up, or "
        "use autocast none; if it happens at step 1, check the weights of student and teacher."
    )


def _pick_autocast(choice: str, device: torch.device) -> str:
    if choice == "auto":
        return "bfloat16" if device.type == "cuda" else "none"
    return choice
