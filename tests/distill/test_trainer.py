"""What a run does to student and teacher, and how it refuses."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from ampdeploy.distill.loss import token_loss
from ampdeploy.distill.trainer import ADAM_BETAS
from ampdeploy.errors import AmpDeployError, ConfigError, DataError, MissingDependencyError
from tests.distill.tiny_run import CONFIG, IMAGES, STEPS, make_pair, run


def weights_of(model):
    return copy.deepcopy(model.state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fixed_loss(student, teacher):
    """The loss on images that no augmentation touched."""
    generator = torch.Generator().manual_seed(5)
    images = torch.nn.functional.interpolate(
        torch.randn(8, 3, 8, 8, generator=generator), size=160, mode="bicubic"
    )
    with torch.no_grad():
        tokens, target = student.forward_tokens(images), teacher.forward_tokens(images)
        return token_loss(tokens, target, student.spec).total.item()


@pytest.fixture(scope="module")
def finished(train_folder, tmp_path_factory):
    """An undisturbed run: pair, weights before, result."""
    pair = make_pair()
    before = [weights_of(model) for model in pair]
    loss_before = fixed_loss(*pair)
    state = tmp_path_factory.mktemp("run") / "state.pt"
    _, result = run(train_folder, state, pair=pair)
    return pair, before, loss_before, result


def test_student_comes_closer_to_the_teacher(finished):
    (student, teacher), _, loss_before, result = finished
    assert result.last_loss < 0.8 * result.first_loss
    assert fixed_loss(student, teacher) < 0.8 * loss_before


def test_teacher_is_unchanged_bit_for_bit(finished):
    (_, teacher), (_, before), _, _ = finished
    assert same(teacher.state_dict(), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_student_ends_in_eval_mode_and_its_final_norm_is_the_teachers(finished):
    (student, teacher), (before, _), _, _ = finished
    assert not any(module.training for module in student.modules())
    assert {p.device.type for p in student.parameters()} == {"cpu"}
    assert torch.equal(student.backbone.norm.weight, teacher.backbone.norm.weight)
    changed = {n for n, p in student.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == set(before) - {"backbone.norm.weight", "backbone.norm.bias"}


def test_history_has_every_step_with_its_rates(finished):
    *_, result = finished
    assert (result.steps, result.epochs, result.images) == (STEPS, 4, IMAGES)
    assert (result.device, result.autocast) == ("cpu", "none")
    assert [row["step"] for row in result.history] == list(range(1, STEPS + 1))
    assert [row["epoch"] for row in result.history] == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5
    peak = CONFIG.base_lr * 4 / 256
    assert [row["lr"] for row in result.history[:5]] == pytest.approx(
        [peak * share for share in (0.2, 0.4, 0.6, 0.8, 1.0)]
    )
    assert result.history[0]["weight_decay"] == pytest.approx(0.04)
    for row in result.history:
        assert row["loss"] == pytest.approx(row["cls_loss"] + row["patch_loss"])
    # A tenth of 20 steps is two.
    losses = [row["loss"] for row in result.history]
    assert result.first_loss == pytest.approx(np.mean(losses[:2]))
    assert result.last_loss == pytest.approx(np.mean(losses[-2:]))
    assert result.seconds > 0


def test_first_step_is_what_the_recipe_says(train_folder, tmp_path):
    """One step against AdamW written out: clipped gradient, decay on matrices alone."""
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=IMAGES, clip_grad_norm=1e-3)
    student, teacher = make_pair()
    before = weights_of(student)
    seen = []
    handle = teacher.backbone.patch_embed.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    run(train_folder, tmp_path / "state.pt", config, pair=(student, teacher))
    handle.remove()

    fresh, _ = make_pair()
    loss = token_loss(fresh.forward_tokens(seen[0]), teacher.forward_tokens(seen[0]), fresh.spec)
    loss.total.backward()
    gradients = {n: p.grad for n, p in fresh.named_parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert norm > 1e-3  # the clip is at work
    lr, decay = config.base_lr * IMAGES / 256, config.weight_decay
    assert ADAM_BETAS == (0.9, 0.95)
    for name, gradient in gradients.items():
        clipped = gradient * 1e-3 / (norm + 1e-6)
        # At step 1 both moments, bias-corrected, are the gradient and its square.
        matrix = name.endswith(".weight") and before[name].ndim >= 2
        expected = before[name] * (1 - lr * decay if matrix else 1)
        expected -= lr * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(student.get_parameter(name), expected, rtol=1e-4, atol=2e-5)


def test_every_epoch_sees_its_own_order_and_no_image_twice(train_folder, tmp_path):
    """21 images would leave one over; 20 in batches of 8 leave four out of every epoch."""
    config = dataclasses.replace(CONFIG, epochs=2, batch_size=8, strong_augment=False, min_scale=1)
    student, teacher = make_pair()
    batches = []
    handle = teacher.backbone.patch_embed.register_forward_pre_hook(
        lambda module, args: batches.append(args[0].clone())
    )
    run(train_folder, tmp_path / "state.pt", config, pair=(student, teacher))
    handle.remove()
    assert [len(batch) for batch in batches] == [8, 8, 8, 8]
    epochs = []
    for epoch in (batches[:2], batches[2:]):
        # The mean colour names an image: cropping to full area and flipping hardly change it.
        colours = torch.cat(epoch).mean((2, 3))
        distances = torch.cdist(colours, colours) + torch.eye(16)
        assert distances.min() > 0.01
        epochs.append(colours)
    assert not torch.allclose(epochs[0], epochs[1], atol=0.01)


def test_on_epoch_is_called_around_every_epoch_and_changes_nothing(train_folder, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=2)
    students, calls = [], []

    def on_epoch(done):
        calls.append((done, students[-1].training))
        torch.rand(7)

    for name, options in (("a.pt", {"on_epoch": on_epoch}), ("b.pt", {})):
        student, teacher = make_pair()
        for block in student.blocks:
            block.mlp.drop1.p = 0.3  # so that training draws from the generators as well
        students.append(student)
        run(train_folder, tmp_path / name, config, pair=(student, teacher), **options)
    assert calls == [(0, False), (1, False), (2, False)]
    assert same(students[0].state_dict(), students[1].state_dict())


def test_the_callers_generators_are_left_alone(train_folder, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1)
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(3), np.random.rand(3)
    pair = make_pair()
    torch.manual_seed(3)
    np.random.seed(3)
    run(train_folder, tmp_path / "state.pt", config, pair=pair)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_bfloat16_on_the_cpu_when_asked_for(train_folder, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1, autocast="bfloat16")
    student, teacher = make_pair()
    types = set()
    handle = student.backbone.blocks[0].mlp.fc1.register_forward_hook(
        lambda module, args, output: types.add(output.dtype)
    )
    _, result = run(train_folder, tmp_path / "state.pt", config, pair=(student, teacher))
    handle.remove()
    assert types == {torch.bfloat16}
    assert result.autocast == "bfloat16"
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_a_diverging_run_stops_and_its_last_state_is_good(train_folder, tmp_path):
    state = tmp_path / "state.pt"
    student, teacher = make_pair()
    calls = 0

    def poison(module, args, output):
        nonlocal calls
        calls += 1
        return output * float("nan") if calls == 8 else output

    handle = student.backbone.blocks[2].register_forward_hook(poison)
    with pytest.raises(
        AmpDeployError, match=r"diverged at step 8 of 20: loss nan.*rate 0\.000\d+.*Lower the base"
    ):
        run(train_folder, state, pair=(student, teacher))
    handle.remove()
    saved = torch.load(state, weights_only=True)
    assert saved["step"] == 7
    assert all(torch.isfinite(tensor).all() for tensor in saved["student"].values())
    # The step that failed was not taken either.
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_a_gradient_that_is_not_finite_stops_the_run_too(train_folder, tmp_path):
    student, teacher = make_pair()
    student.backbone.cls_token.register_hook(lambda gradient: gradient * float("inf"))
    before = weights_of(student)
    with pytest.raises(AmpDeployError, match=r"diverged at step 1 .*gradient norm (nan|inf)"):
        run(train_folder, tmp_path / "state.pt", pair=(student, teacher))
    assert same(student.state_dict(), before)


def test_too_few_images(train_folder, tmp_path):
    config = dataclasses.replace(CONFIG, batch_size=IMAGES + 1)
    with pytest.raises(DataError, match=r"20 training images.*one batch of 21"):
        run(train_folder, tmp_path / "state.pt", config)


def test_no_epochs(train_folder, tmp_path):
    with pytest.raises(ConfigError, match="0 epochs"):
        run(train_folder, tmp_path / "state.pt", dataclasses.replace(CONFIG, epochs=0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_gpu_is_not_a_silent_cpu_run(train_folder, tmp_path):
    with pytest.raises(MissingDependencyError, match="cuda"):
        run(train_folder, tmp_path / "state.pt", dataclasses.replace(CONFIG, device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_bfloat16_is_the_default_and_the_loss_falls(train_folder, tmp_path):
    student, teacher = make_pair()
    config = dataclasses.replace(CONFIG, device="auto")
    _, result = run(train_folder, tmp_path / "state.pt", config, pair=(student, teacher))
    assert (result.device, result.autocast) == ("cuda", "bfloat16")
    assert result.last_loss < 0.8 * result.first_loss
    assert {p.device.type for p in (*student.parameters(), *teacher.parameters())} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_stopped_run_continues(train_folder, tmp_path):
    config = dataclasses.replace(CONFIG, device="cuda")
    state = tmp_path / "state.pt"

    def stop(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(train_folder, state, config, on_epoch=stop)
    _, resumed = run(train_folder, state, config)
    _, alone = run(train_folder, tmp_path / "other.pt", config)
    assert [row["step"] for row in resumed.history] == list(range(1, STEPS + 1))
    # Attention's backward pass on CUDA adds in no fixed order.
    assert resumed.last_loss == pytest.approx(alone.last_loss, rel=0.05)
