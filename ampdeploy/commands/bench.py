"""`ampdeploy bench`: is it faster and smaller, on this machine?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ampdeploy.commands import common
from ampdeploy.commands.pair import PairFiles, files_options, find_files, find_pair
from ampdeploy.config import BenchConfig
from ampdeploy.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

IMAGES_KEY = "images"  # as in a bundle's goldens.npz


@click.command("bench")
@files_options
@click.option("--images", type=common.FOLDER, help="Folder of images, to be preprocessed here.")
@click.option(
    "--inputs",
    type=common.FILE,
    help="Preprocessed images instead: `images`, (N, 3, S, S) float32, in an .npz file such as a "
    "bundle's goldens.npz. Needs no torch.",
)
@click.option("--batches", default="1,8", show_default=True, help="Batch sizes, e.g. 1,8.")
@click.option("--min-runs", type=int, default=BenchConfig.min_runs, show_default=True)
@click.option("--seconds", type=float, default=BenchConfig.max_seconds, show_default=True)
@click.option(
    "--loads", type=int, default=BenchConfig.loads, show_default=True,
    help="Open both files anew so often; runs and seconds are spread over the loads. Below 5 there "
    "are no intervals.",
)  # fmt: skip
@click.option(
    "--throughput-seconds", type=float, default=BenchConfig.throughput_seconds, show_default=True,
    help="Per batch size; 0: not counted.",
)  # fmt: skip
@click.option(
    "--in-flight", type=int, default=BenchConfig.in_flight, show_default=True,
    help="Batches under way at once while throughput is counted.",
)  # fmt: skip
@common.energy_seconds
@click.option("--threads", type=int, help="CPU threads of the runtime. Default: its own choice.")
@common.as_json
@common.verbosity
def command(
    artifact: Path | None,
    baseline: Path | None,
    run: Path | None,
    target: str | None,
    images: Path | None,
    inputs: Path | None,
    batches: str,
    min_runs: int,
    seconds: float,
    loads: int,
    throughput_seconds: float,
    in_flight: int,
    energy_seconds: float | None,
    threads: int | None,
    json_: bool,
) -> None:
    """Latency, compute, throughput and memory of a pruned model against its baseline."""
    config = BenchConfig(
        batch_sizes=common.integers(batches, "--batches"),
        min_runs=min_runs,
        max_seconds=seconds,
        loads=loads,
        throughput_seconds=throughput_seconds,
        in_flight=in_flight,
        energy_seconds=energy_seconds,
        threads=threads,
    )
    if (images is None) == (inputs is None):
        raise ConfigError(
            "bench times with real images: give a folder with --images, or preprocessed ones with "
            "--inputs FILE.npz, not both."
        )
    from ampdeploy.bench.run import measure_pair
    from ampdeploy.report.codec import to_plain

    files: PairFiles
    if inputs is not None:
        files = find_files("bench", artifact, baseline, run, target)
        _check_opens(files)
        pixels = _read_inputs(inputs)
    else:
        assert images is not None
        files, pixels = _prepare(images, artifact, baseline, run, target, config)
    measured = measure_pair(files.target, files.baseline, files.pruned, pixels, config)
    if json_:
        common.print_json({"target": files.target, **to_plain(measured)})
        return
    from rich.console import Console

    from ampdeploy.bench.table import bench_table, footnotes

    console = Console(highlight=False)
    console.print(bench_table(measured, title=f"{files.pruned.name} on {files.target}"))
    for note in footnotes(measured):
        click.echo(note)


def _prepare(
    images: Path,
    artifact: Path | None,
    baseline: Path | None,
    run: Path | None,
    target: str | None,
    config: BenchConfig,
) -> tuple[PairFiles, np.ndarray]:
    pair = find_pair("bench", artifact, baseline, run, target)
    _check_opens(pair)
    from ampdeploy.bench.latency import BUFFERS
    from ampdeploy.data.folder import scan_folder
    from ampdeploy.data.loading import load_all

    chosen = scan_folder(images, limit=BUFFERS * max(config.batch_sizes), seed=0, minimum=2)
    return pair, load_all(chosen, pair.spec).numpy()


def _check_opens(files: PairFiles) -> None:
    """Open both files once: what is in the way is said better here than by a worker's end.

    Raises:
        MissingDependencyError: This machine cannot run the target.
        ArtifactError: A file is of another kind, damaged, or an engine for another machine.
    """
    from ampdeploy.targets.base import get_target

    for path in (files.baseline, files.pruned):
        with get_target(files.target).open(path):
            pass


def _read_inputs(path: Path) -> Any:
    """The preprocessed images of an .npz file; their size is for the runner to check.

    Raises:
        DataError: There is no such file, or none with float32 images.
    """
    import zipfile

    import numpy as np

    wanted = f"an .npz file with {IMAGES_KEY!r}, (N, 3, S, S) float32, such as goldens.npz"
    if not path.is_file():
        raise DataError(f"there is no file {path}. --inputs takes {wanted} of a bundle.")
    try:
        with np.load(path, allow_pickle=False) as content:
            names = content.files
            pixels = content[IMAGES_KEY] if IMAGES_KEY in names else None
    # What numpy raises for what is no archive, is cut short, or is an .npy file.
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}. --inputs takes {wanted}.") from error
    if pixels is None:
        raise DataError(f"{path} holds {names or 'nothing'}. --inputs takes {wanted}.")
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != np.float32:
        raise DataError(
            f"{IMAGES_KEY!r} in {path} has the shape {pixels.shape} and type {pixels.dtype}. "
            f"--inputs takes {wanted}."
        )
    return pixels
