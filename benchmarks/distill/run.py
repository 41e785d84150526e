"""What distillation gives back: fidelity of a pruned model before, during and after training.

    python -m benchmarks.distill.run --run runs/dinov2_s-ort --epochs 5 \
        --images calib_data/train --eval calib_data/val \
        --out benchmarks/results/distill_dinov2_s.json

The teacher is the run's ``baseline.safetensors``, the student its ``slim.safetensors``. Before
training and after every epoch both see the same held-out images, and the result holds the mean
and first-percentile cosine of their pooled features, the mean cosine of their patch features and
the agreement of their nearest neighbours. Images that are also in the training folder, by
content, are taken out of training. The result also holds every step's loss and rates, the time
of a step, and the facts of the machine. Nothing in it names the machine's folders.

Stopped, the same command continues: state and finished rows are kept in ``RUN/bench-distill``,
which is removed once the result is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from ampdeploy.artifacts import (
    BASELINE,
    DISTILL_STATE,
    SLIM,
    prepare_folder,
    read_json,
    remove_stale_temporaries,
    run_lock,
    sha256_file,
    sha256_json,
    write_json,
)
from ampdeploy.bench.accuracy import compare
from ampdeploy.bench.host import host_facts
from ampdeploy.checkpoint import load_model
from ampdeploy.config import DistillConfig, to_json
from ampdeploy.data.folder import ImageSet, scan_folder
from ampdeploy.data.loading import iter_batches
from ampdeploy.distill.trainer import distill
from ampdeploy.errors import AmpDeployError
from ampdeploy.models.profile import profile_model
from ampdeploy.models.vision import VisionModel
from ampdeploy.progress import log, set_up_logging, track
from ampdeploy.targets.torch import TorchRunner

EVAL_BATCH = 16


def measure_fidelity(
    teacher: VisionModel, student: VisionModel, images: ImageSet
) -> dict[str, Any]:
    """Closeness of the student's features to the teacher's, on the device both are on."""
    device = str(next(student.parameters()).device)
    batches = (batch.numpy() for batch in iter_batches(images, teacher.spec, EVAL_BATCH))
    with (
        TorchRunner(teacher, name="teacher", device=device) as reference,
        TorchRunner(student, name="student", device=device) as candidate,
    ):
        count = -(-len(images) // EVAL_BATCH)
        return compare(reference, candidate, track(batches, "fidelity", count)).result()


def describe_images(images: ImageSet) -> dict[str, Any]:
    """What identifies an image set anywhere: the end of its path, size and hash."""
    return {
        "name": "/".join(images.root.resolve().parts[-2:]),
        "images": len(images),
        "sha256": images.sha256,
    }


def describe_model(model: VisionModel, path: Path) -> dict[str, Any]:
    """Name, size and hash of one of the two checkpoints."""
    profile = profile_model(model)
    return {
        "model": model.spec.name,
        "sha256": sha256_file(path),
        "params": profile.params,
        "flops": profile.flops,
        "hidden": [site.hidden for site in model.spec.sites],
    }


def run_benchmark(
    run: Path, train: ImageSet, held_out: ImageSet, config: DistillConfig
) -> dict[str, Any]:
    """Distil the run's student and judge it after every epoch.

    Args:
        run: A finished run directory; nothing in it changes but ``bench-distill``.
        train: Training images.
        held_out: Images to judge on; they are taken out of `train`.
        config: The recipe.

    Returns:
        The result as plain data.

    Raises:
        AmpDeployError: A checkpoint or the images cannot be used, or training diverged.
    """
    found, train = len(train), train.without(held_out)
    teacher, student = load_model(run / BASELINE), load_model(run / SLIM)
    recipe = to_json(dataclasses.replace(config, images=None))
    del recipe["checkpoint_seconds"]  # when the state is saved does not change what is computed
    facts = {
        "teacher": describe_model(teacher, run / BASELINE),
        "student": describe_model(student, run / SLIM),
        "config": recipe,
        "train": {**describe_images(train), "taken_out": found - len(train)},
        "held_out": describe_images(held_out),
    }
    identity = sha256_json(facts)
    work = run / "bench-distill"
    prepare_folder(work)
    remove_stale_temporaries(work)
    rows_path = work / "fidelity.json"
    rows = _finished_rows(rows_path, identity)

    def on_epoch(epochs_done: int) -> None:
        if epochs_done < len(rows):  # judged by the process that was stopped
            return
        row = {"epoch": epochs_done, **measure_fidelity(teacher, student, held_out)}
        rows.append(row)
        write_json(rows_path, {"identity": identity, "rows": rows})
        log.info(
            "  after epoch %d: cosine %.4f, first percentile %.4f, patches %s",
            epochs_done,
            row["cosine_mean"],
            row["cosine_p1"],
            "none" if row["patch_cosine_mean"] is None else f"{row['patch_cosine_mean']:.4f}",
        )

    result = distill(
        student,
        teacher,
        train,
        config,
        state_path=work / DISTILL_STATE,
        identity=identity,
        on_epoch=on_epoch,
    )
    training = dataclasses.asdict(result)
    history = training.pop("history")
    return {
        "benchmark": "distill",
        **facts,
        "host": host_facts(),
        "before": rows[0],
        "after": rows[-1],
        "fidelity": rows,
        "training": {**training, "seconds_per_step": result.seconds / result.steps},
        "history": history,
    }


def _finished_rows(path: Path, identity: str) -> list[dict[str, Any]]:
    """What a stopped run of the same identity measured; it resumes exactly, so the rows hold."""
    if not path.exists():
        return []
    stored = read_json(path)
    rows: list[dict[str, Any]] = stored["rows"] if stored["identity"] == identity else []
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options; the recipe's defaults are those of `DistillConfig`."""
    recipe = DistillConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="finished run directory")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--images", type=Path, required=True, help="training folder")
    parser.add_argument("--eval", type=Path, required=True, help="held-out folder")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--train-images", type=int, help="at most this many; default all")
    parser.add_argument("--eval-images", type=int, help="at most this many; default all")
    parser.add_argument("--batch-size", type=int, default=recipe.batch_size)
    parser.add_argument("--base-lr", type=float, default=recipe.base_lr, help="at batch 256")
    parser.add_argument("--warmup-epochs", type=float, default=recipe.warmup_epochs)
    parser.add_argument("--min-scale", type=float, default=recipe.min_scale)
    parser.add_argument("--no-strong-augment", dest="strong_augment", action="store_false")
    parser.add_argument("--checkpoint-seconds", type=float, default=recipe.checkpoint_seconds)
    parser.add_argument("--device", default=recipe.device)
    parser.add_argument("--seed", type=int, default=recipe.seed)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and write its result."""
    options = parse(arguments)
    set_up_logging(logging.INFO)
    try:
        config = DistillConfig(
            epochs=options.epochs,
            batch_size=options.batch_size,
            base_lr=options.base_lr,
            warmup_epochs=options.warmup_epochs,
            min_scale=options.min_scale,
            strong_augment=options.strong_augment,
            checkpoint_seconds=options.checkpoint_seconds,
            device=options.device,
            seed=options.seed,
        )
        prepare_folder(options.out.parent)
        train = scan_folder(options.images, limit=options.train_images, seed=options.seed)
        held_out = scan_folder(options.eval, limit=options.eval_images, seed=options.seed)
        with run_lock(options.run):
            write_json(options.out, run_benchmark(options.run, train, held_out, config))
            shutil.rmtree(options.run / "bench-distill")
    except AmpDeployError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
