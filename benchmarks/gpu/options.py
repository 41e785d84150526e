"""The command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = ["dinov2_s", "dinov2_b", "dinov2_l", "dinov2_g"]
TYPED = MODELS[:2]  # emulation on the CPU takes minutes for the others
IMAGES = Path(__file__).parents[2] / "calib_data"
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse_list(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",") if part]
        if len(set(values)) != len(values):
            raise argparse.ArgumentTypeError(f"{text!r} names something twice")
        return values

    return parse_list


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse_positive(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
        return value

    return parse_positive


def parse(arguments: list[str] | None, *, description: str) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole, number = _positive(int), _positive(float)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--state", type=Path, help="default runs/<name of --out>")
    parser.add_argument("--models", type=_list_of(str), default=MODELS, help="smallest first")
    parser.add_argument(
        "--typed",
        type=_list_of(str),
        help=f"models whose typed graph is made; default those of {','.join(TYPED)} in --models",
    )
    parser.add_argument(
        "--weights", help="of the one model; default random ones. Pruning stays blind"
    )
    parser.add_argument("--image-size", type=whole)
    parser.add_argument("--params-cut", type=number, default=0.3)
    parser.add_argument("--width-multiple", type=whole, default=64)
    parser.add_argument("--batches", type=_list_of(whole), default=[1, 8, 32])
    parser.add_argument("--ways", type=_list_of(str), help="default all of the device")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="cuda")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder with train and val")
    parser.add_argument("--count", type=whole, default=32, help="images to time and judge with")
    parser.add_argument("--minutes", type=number, default=9.0, help="start no row after them")
    parser.add_argument("--compile-minutes", type=number, default=3.0)
    parser.add_argument("--compile-mode", choices=COMPILE_MODES, default="default")
    parser.add_argument("--seconds", type=number, default=1.0, help="of timed calls per row")
    parser.add_argument("--min-runs", type=whole, default=20, help="timed pairs per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--retry-failed", action="store_true")
    options = parser.parse_args(arguments)
    if not options.models or not options.batches:
        parser.error("--models and --batches need at least one entry")
    if options.weights is not None and len(options.models) != 1:
        parser.error("--weights is for one model; name it with --models")
    if options.typed is None:
        options.typed = [model for model in options.models if model in TYPED]
    elif not set(options.typed) <= set(options.models):
        parser.error("--typed names a model that is not in --models")
    options.batches = tuple(options.batches)
    if options.state is None:
        options.state = Path("runs") / options.out.stem
    return options
