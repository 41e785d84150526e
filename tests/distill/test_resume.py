"""A run that was stopped, by whatever, ends with the weights of one that was not."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ampdeploy.distill.state import (
    TrainState,
    load_state,
    rng_state,
    save_state,
    set_rng_state,
    uninterrupted,
)
from ampdeploy.errors import AmpDeployError
from tests.conftest import REPOSITORY
from tests.distill.tiny_run import CONFIG, STEPS, make_pair, run

CHILD_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def undisturbed(train_folder, tmp_path_factory):
    """Weights and history of the run nobody stopped."""
    student, result = run(train_folder, tmp_path_factory.mktemp("undisturbed") / "state.pt")
    return student.state_dict(), result.history


def check_equal(student, result, undisturbed):
    weights, history = undisturbed
    assert result.history == history
    assert student.state_dict().keys() == weights.keys()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def steps_in(state):
    return torch.load(state, weights_only=True)["step"]


def test_killed_run_resumes_bit_for_bit(train_folder, tmp_path, undisturbed, caplog):
    state = tmp_path / "state.pt"
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.distill.tiny_run", str(train_folder), str(state)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + CHILD_TIMEOUT_S
    while not state.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.kill()
    _, errors = child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL, errors.decode()
    reached = steps_in(state)
    assert 0 < reached < STEPS

    with caplog.at_level(logging.INFO, logger="ampdeploy"):
        student, result = run(train_folder, state)
    assert f"steps {reached + 1} to {STEPS}" in caplog.text
    check_equal(student, result, undisturbed)


@contextmanager
def interrupt_forward(model, call):
    """Ctrl-C in the middle of a forward pass."""
    calls = 0

    def hook(module, args):
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGINT)

    handle = model.blocks[3].register_forward_pre_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize(
    ("call", "done"), [(1, 0), (8, 7), (11, 10)], ids=["first step", "mid epoch", "epoch's first"]
)
def test_interrupted_run_resumes_bit_for_bit(train_folder, tmp_path, undisturbed, call, done):
    state = tmp_path / "state.pt"
    student, teacher = make_pair()
    with interrupt_forward(student, call), pytest.raises(KeyboardInterrupt):
        run(train_folder, state, pair=(student, teacher))
    assert not student.training
    assert steps_in(state) == done
    check_equal(*run(train_folder, state), undisturbed)


def test_interrupt_within_an_optimizer_step_waits_for_its_end(train_folder, tmp_path, undisturbed):
    state = tmp_path / "state.pt"
    calls = 0

    def hook(optimizer, args, kwargs):
        nonlocal calls
        calls += 1
        if calls == 7:
            signal.raise_signal(signal.SIGINT)

    handle = register_optimizer_step_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        run(train_folder, state)
    handle.remove()
    assert steps_in(state) == 7  # not 6: the step was finished first
    check_equal(*run(train_folder, state), undisturbed)


def test_interrupt_between_epochs_repeats_the_call(train_folder, tmp_path, undisturbed):
    state = tmp_path / "state.pt"
    calls = []

    def on_epoch(done):
        calls.append(done)
        if calls == [0, 1, 2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(train_folder, state, on_epoch=on_epoch)
    resumed = run(train_folder, state, on_epoch=on_epoch)
    assert calls == [0, 1, 2, 2, 3, 4]
    check_equal(*resumed, undisturbed)


def test_the_state_is_saved_after_every_step_or_by_the_clock(train_folder, tmp_path, undisturbed):
    saved = []
    state = tmp_path / "state.pt"
    run(train_folder, state, on_epoch=lambda done: done and saved.append(steps_in(state)))
    assert saved == [5, 10, 15, 20]

    rarely, state = dataclasses.replace(CONFIG, checkpoint_seconds=1e6), tmp_path / "rarely.pt"
    check_equal(*run(train_folder, state, rarely), undisturbed)
    assert not state.exists()


def test_a_finished_state_is_not_trained_again(train_folder, tmp_path, undisturbed):
    state = tmp_path / "state.pt"
    run(train_folder, state)
    assert steps_in(state) == STEPS
    student, teacher = make_pair()
    handle = teacher.register_forward_pre_hook(lambda *_: pytest.fail("a step was taken"))
    resumed = run(train_folder, state, pair=(student, teacher))
    handle.remove()
    check_equal(*resumed, undisturbed)


def test_dropout_draws_the_same_after_a_resume(train_folder, tmp_path):
    """The shipped models have no dropout; one that has is where generator states matter."""
    config = dataclasses.replace(CONFIG, epochs=2)

    def pair():
        student, teacher = make_pair()
        for block in student.blocks:
            block.mlp.drop1.p = 0.3
        return student, teacher

    alone = run(train_folder, tmp_path / "a.pt", config, pair=pair())
    stopped = pair()
    # Half of the eighth step's dropout is drawn by then; a resume must draw it again.
    with interrupt_forward(stopped[0], 8), pytest.raises(KeyboardInterrupt):
        run(train_folder, tmp_path / "b.pt", config, pair=stopped)
    resumed = run(train_folder, tmp_path / "b.pt", config, pair=pair())
    check_equal(*resumed, (alone[0].state_dict(), alone[1].history))


@pytest.fixture
def stopped(train_folder, tmp_path):
    """The state of a run that was interrupted after two steps."""
    state = tmp_path / "state.pt"
    student, teacher = make_pair()
    with interrupt_forward(student, 3), pytest.raises(KeyboardInterrupt):
        run(train_folder, state, pair=(student, teacher))
    return state


def test_state_of_another_identity_is_ignored(train_folder, stopped, undisturbed, caplog):
    changed = torch.load(stopped, weights_only=True)
    torch.save({**changed, "identity": "another"}, stopped)
    with caplog.at_level(logging.INFO, logger="ampdeploy"):
        resumed = run(train_folder, stopped)
    assert "belongs to another run" in caplog.text
    assert f"steps 1 to {STEPS}" in caplog.text
    check_equal(*resumed, undisturbed)


def cut_short(data):
    return data[: len(data) // 2]


def flip_one_bit(data):
    middle = len(data) // 2  # inside a weight: the archive and the pickle stay readable
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [cut_short, flip_one_bit, lambda data: b"", lambda data: b"not a state"],
    ids=["cut short", "bit flip", "empty", "text"],
)
def test_damaged_state_is_ignored_with_a_warning(
    train_folder, stopped, undisturbed, damage, caplog
):
    stopped.write_bytes(damage(stopped.read_bytes()))
    with caplog.at_level(logging.INFO, logger="ampdeploy"):
        resumed = run(train_folder, stopped)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "is damaged" in warnings[0]
    assert "starts over" in warnings[0]
    check_equal(*resumed, undisturbed)


def test_a_file_that_may_not_grow_keeps_the_last_state(stopped):
    before = stopped.read_bytes()
    student, _ = make_pair()
    optimizer = torch.optim.AdamW(student.parameters())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(AmpDeployError, match="a file may not be as large") as caught:
            save_state(stopped, "tiny", TrainState(), student, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert stopped.read_bytes() == before
    assert os.listdir(stopped.parent) == [stopped.name]


def test_no_state_is_nothing_to_resume(tmp_path):
    student, _ = make_pair()
    optimizer = torch.optim.AdamW(student.parameters())
    assert load_state(tmp_path / "none.pt", "tiny", student, optimizer) is None


def test_generator_states_come_back_from_disk(tmp_path):
    path = tmp_path / "rng.pt"
    random.seed(1)
    np.random.seed(1)
    np.random.standard_normal()  # leaves a cached gaussian behind
    torch.manual_seed(1)
    torch.save(rng_state(), path)

    def draw():
        return random.random(), np.random.standard_normal(), torch.rand(1).item()

    expected = draw()
    assert draw() != expected
    set_rng_state(torch.load(path, weights_only=True))
    assert draw() == expected


def test_uninterrupted_holds_one_signal_back_and_restores_the_handler():
    before = signal.getsignal(signal.SIGINT)
    reached = False
    with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is before
