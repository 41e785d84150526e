"""`ampdeploy models`: the registry."""

from __future__ import annotations

import dataclasses

import click

from ampdeploy.commands import common
from ampdeploy.models.registry import REGISTRY


@click.command("models")
@common.as_json
@common.verbosity
def command(json_: bool) -> None:
    """List the registered models with their published size and cost."""
    if json_:
        common.print_json([dataclasses.asdict(entry) for entry in REGISTRY.values()])
        return
    for entry in REGISTRY.values():
        published = entry.published
        click.echo(
            f"{entry.name:15} {published.params / 1e6:7.1f} M params {published.flops / 1e9:7.1f} "
            f"GFLOPs at {published.image_size} px  {entry.licence:10}  {entry.timm_name}"
        )
    click.echo("\nAny timm ViT works as timm:<name>. Published figures; `inspect` counts them.")
