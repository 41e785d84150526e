"""`ampdeploy bundle`: a run, packed for the device that builds its own engine."""

from __future__ import annotations

from pathlib import Path

import click

from ampdeploy.commands import common


@click.command("bundle")
@click.argument("run", type=common.FOLDER)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder, or a file that ends in .tar. Default: <run>-bundle.",
)
@common.as_json
@common.verbosity
def command(run: Path, out: Path | None, json_: bool) -> None:
    """Pack RUN: graphs, golden images and outputs, a feature bank, checksums, instructions."""
    from ampdeploy.device.bundle.pack import pack_run
    from ampdeploy.report.codec import to_plain

    packed = pack_run(run, out)
    if json_:
        facts = {"path": str(packed.path), "bytes": packed.bytes, "sha256": packed.sha256}
        common.print_json({**facts, "manifest": to_plain(packed.manifest)})
        return
    manifest = packed.manifest
    click.echo(f"{packed.path}: {len(manifest.files)} files, {packed.bytes / 1e6:.1f} MB")
    click.echo(f"bundle.json has sha256 {packed.sha256}")
    bank = f"a bank of {manifest.bank_images} features" if manifest.bank_images else "no labels"
    click.echo(
        f"{manifest.onnx} in {manifest.precision}, {manifest.golden_images} golden images, {bank}"
    )
    click.echo(f"On the device: ampdeploy engine {packed.path.name}")
