"""`ampdeploy inspect`: size and cost, counted rather than quoted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ampdeploy.commands import common
from ampdeploy.errors import ConfigError
from ampdeploy.optional import require


@click.command("inspect")
@click.argument("checkpoint", type=common.FILE, required=False)
@click.option("--model", help="Registered name or timm:<name>, instead of a checkpoint.")
@click.option("--image-size", type=int, help="Side of the square input, pixels.")
@common.as_json
@common.verbosity
def command(
    checkpoint: Path | None, model: str | None, image_size: int | None, json_: bool
) -> None:
    """Count parameters, FLOPs and widths of --model (no weights needed) or of a CHECKPOINT."""
    if (checkpoint is None) == (model is None):
        raise ConfigError("inspect takes a CHECKPOINT or --model NAME, one of the two.")
    if checkpoint is not None and checkpoint.suffix != ".safetensors":
        raise ConfigError(
            f"inspect reads .safetensors checkpoints of a run, and {checkpoint} is none."
        )
    if image_size is not None and checkpoint is not None:
        raise ConfigError("--image-size goes with --model; a checkpoint has its own size.")
    facts = _facts(checkpoint, model, image_size)
    if json_:
        common.print_json(facts)
    else:
        _print_table(facts)


def _facts(checkpoint: Path | None, model: str | None, image_size: int | None) -> dict[str, Any]:
    for module in ("torch", "timm"):
        require(module, needed_by="ampdeploy inspect")
    from ampdeploy.models.build import build_model
    from ampdeploy.models.profile import count_params, profile_model
    from ampdeploy.models.registry import lookup

    if checkpoint is not None:
        require("safetensors", needed_by="ampdeploy inspect")
        from ampdeploy.checkpoint import load_model

        vision = load_model(checkpoint)
    else:
        assert model is not None
        vision = build_model(model, image_size=image_size, device="meta")
    # A checkpoint's spec has the widths it was slimmed to; the name says what it was made from.
    dense = build_model(vision.spec.name, image_size=vision.spec.image_size, device="meta")
    entry = lookup(vision.spec.name)
    profile = profile_model(vision)
    return {
        "spec": vision.spec.to_json(),
        **dataclasses.asdict(profile),
        "mlp_share": profile.mlp_params / profile.params,
        "params_dense": count_params(dense),
        "hidden_dense": [site.hidden for site in dense.spec.sites],
        "published": dataclasses.asdict(entry.published) if entry else None,
    }


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    spec = facts["spec"]
    flops, attention = facts["flops"] / 1e9, facts["attention_flops"] / 1e9
    click.echo(f"{spec['name']} ({spec['timm_name']}), licence {spec['licence']}")
    click.echo(
        f"input {spec['image_size']} px ({facts['tokens']} tokens), features "
        f"{spec['feature_dim']} ({spec['pooling']} pooling), patch features: "
        f"{'yes' if spec['has_patch_features'] else 'no'}"
    )
    click.echo(f"parameters {facts['params'] / 1e6:.2f} M, of which MLP {facts['mlp_share']:.1%}")
    kept = facts["params"] / facts["params_dense"]
    if facts["params"] != facts["params_dense"]:
        click.echo(f"kept: {kept:.1%} of {facts['params_dense'] / 1e6:.2f} M parameters")
    click.echo(f"FLOPs (2 x MACs) {flops:.2f} G, of which attention products {attention:.2f} G")
    published = facts["published"]
    if published:
        without = "" if published["counts_attention"] else " without attention products"
        click.echo(
            f"published{'' if kept == 1 else ', dense'}: {published['params'] / 1e6:.2f} M, "
            f"{published['flops'] / 1e9:.2f} G"
            f"{without} at {published['image_size']} px ({published['source']})"
        )
    table = Table(box=None)
    for title in ("block", "hidden", "kept", "parameters", "MLP parameters", "MLP FLOPs"):
        table.add_column(title, justify="right")
    for block, dense in zip(facts["blocks"], facts["hidden_dense"], strict=True):
        table.add_row(
            str(block["block"]),
            str(block["hidden"]),
            f"{block['hidden'] / dense:.0%}",
            f"{block['params'] / 1e6:.2f} M",
            f"{block['mlp_params'] / 1e6:.2f} M",
            f"{block['mlp_flops'] / 1e9:.2f} G",
        )
    Console().print(table)
