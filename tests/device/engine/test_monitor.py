import os
import signal
import threading
import time

import pytest

from ampdeploy.device.engine.monitor import BuildProgress, run_aside
from ampdeploy.progress import Task


def test_nested_phases_are_one_number():
    task = Task("building", 100)
    progress = BuildProgress(task)
    progress.start("build", None, 4)
    progress.step("build", 0)
    assert task.done == 25
    progress.start("tactics", "build", 10)
    assert task.text == "tactics"
    progress.step("tactics", 4)
    assert task.done == 37  # 1/4 and half of the next
    progress.finish("tactics")
    progress.step("build", 1)
    assert task.done == 50
    progress.start("build again", None, 2)  # it never goes back
    progress.step("build again", 0)
    assert task.done == 50
    progress.step("build", 3)
    assert task.done == 100


def test_what_tensorrt_should_not_send_does_no_harm():
    progress = BuildProgress(Task("building", 100))
    progress.step("never started", 0)
    progress.finish("never started")
    progress.start("a", "b", 0)
    progress.start("b", "a", 0)  # each the other's parent
    progress.step("a", 7)


def test_what_is_raised_aside_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        run_aside(lambda: 1 // 0)
    assert run_aside(threading.current_thread).name == "tensorrt"


def test_ctrl_c_asks_to_stop_and_waits_for_the_end():
    stopped = threading.Event()
    ended = []

    def call():
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped.wait(10)
        time.sleep(0.1)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        run_aside(call, on_interrupt=stopped.set)
    assert ended


def test_a_second_ctrl_c_does_not_wait():
    release = threading.Event()

    def call():
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(30)

    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_aside(call, on_interrupt=lambda: os.kill(os.getpid(), signal.SIGINT))
    finally:
        release.set()
    assert time.monotonic() - started < 10
