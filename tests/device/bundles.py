"""Changing bundles, and killing who works on them."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys

import numpy as np

from ampdeploy.artifacts import sha256_file
from ampdeploy.device.bundle import contents as form
from ampdeploy.targets.base import get_target

QUICK = ("--no-compare", "-q")


def reseal(folder, **changes):
    """Seal a changed bundle, as somebody who means it would."""
    manifest = form.read_bundle(folder).manifest
    kept = ("schema_version", "tool_version", "files")
    fields = {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest)}
    facts = {name: value for name, value in fields.items() if name not in kept}
    return form.seal(folder, **{**facts, **changes})


def tree(folder) -> dict[str, str]:
    """Every file below `folder` with its hash."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def swap_goldens(bundle) -> None:
    """Let the goldens be those of another model: the unpruned one."""
    arrays = form.read_bundle(bundle).arrays(form.GOLDENS)
    with get_target("ort").open(bundle / "baseline.fp16.onnx") as runner:
        arrays.update(runner.run(arrays["images"]))
    np.savez(bundle / form.GOLDENS, **arrays)
    reseal(bundle)


KILLED = """
import importlib, os, signal, sys
from pathlib import Path
module = importlib.import_module('ampdeploy.device.{module}')
real, left = module.{name}, [{calls}]
def dies(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0 and not {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args, **kwargs)
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
module.{name} = dies
from ampdeploy.cli import main
sys.exit(main({command!r}))
"""


def killed(command, module, name, *, calls=1, after=False) -> None:
    """Run `command` in a process that dies at a call of a function of ours."""
    code = KILLED.format(module=module, name=name, calls=calls, after=after, command=command)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
