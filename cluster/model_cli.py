"""Commands about networks: what can be trained, and what a run of it costs."""

from __future__ import annotations

import json
from typing import Any

import click

from cluster.options import set_option
from shards.support.errors import ConfigError


@click.command()
@click.option("--image-size", default=512, show_default=True, help="Side of the images in pixels.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def backbones(image_size: int, as_json: bool) -> None:
    """List the backbones: their size, what they cost, and what they can do.

    GFLOPs are of the forward pass of one image, a multiplication and an addition counted as two. "tokens"
    says whether some patches can be encoded alone, as RetMAE does with high-frequency ones.
    """
    from frepa_dist.models.catalog import BACKBONES, describe_sizes, fits_size
    from frepa_dist.models.cost import count_backbone

    rows = []
    for name, entry in BACKBONES.items():
        row: dict[str, Any] = {
            "name": name,
            "timm": entry.architecture,
            "stride": entry.stride,
            "sizes": describe_sizes(name),
            "tokens": entry.family == "vit",
            "pretrained": entry.pretrained,
        }
        if fits_size(name, image_size):
            width, parameters, flops = count_backbone(name, image_size)
            row |= {"width": width, "parameters": parameters, "gflops": flops / 1e9}
        rows.append(row)
    if not any("width" in row for row in rows):
        raise ConfigError(
            f"no backbone takes images of {image_size} pixels",
            where="--image-size",
            allowed="multiples of 32",
        )
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo(f"GFLOPs forward at {image_size} x {image_size}")
    head = f"{'name':<16} {'timm':<30} {'stride':>6} {'width':>5} {'M param.':>8} {'GFLOPs':>8}  "
    click.echo(head + f"{'tokens':<6} {'weights':<7} sizes")
    for row in rows:
        counted = f"{'-':>5} {'-':>8} {'-':>8}"
        if "width" in row:
            counted = f"{row['width']:>5} {row['parameters'] / 1e6:>8.1f} {row['gflops']:>8.2f}"
        yes = {True: "yes", False: "no"}
        click.echo(
            f"{row['name']:<16} {row['timm']:<30} {row['stride']:>6} {counted}  "
            f"{yes[row['tokens']]:<6} {yes[row['pretrained']]:<7} {row['sizes']}"
        )


@click.command()
@click.option("--config", required=True, help="Run config: a file, or the name of a shipped one.")
@set_option
@click.option("--ranks", type=click.IntRange(min=1), default=1, show_default=True, help="Number of GPUs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cost(config: str, overrides: tuple[str, ...], ranks: int, as_json: bool) -> None:
    """Count what a run costs, without running it: parameters, operations, memory of a GPU.

    Operations are those of matrix products, convolutions and attention, forward and backward. Memory leaves
    out workspaces of libraries, fragmentation and the CUDA context.
    """
    from dataclasses import asdict

    from frepa_dist.config import RunConfig
    from frepa_dist.models.cost import count_cost
    from shards.read.order import check_batch_sizes
    from shards.support.settings import apply_overrides, merge, read_config, validate

    # where a run goes and what it reads cost nothing, and need not be there
    places = {"output": "unused", "data": {"root": "unused"}}
    run = validate(RunConfig, merge(places, apply_overrides(read_config(config), overrides)), where=config)
    train = run.train
    accumulation = check_batch_sizes(train.global_batch_size, ranks, train.micro_batch_size)
    counted = count_cost(run, ranks)
    if as_json:
        click.echo(json.dumps(asdict(counted), indent=1))
        return
    for name, number in counted.parameters.items():
        inside = f" ({counted.encoder_parameters / 1e6:.2f} encoder)" if name == "student" else ""
        click.echo(f"parameters  {name:<18} {number / 1e6:>10.2f} M{inside}")
    for name, operations in counted.flops.items():
        click.echo(f"GFLOPs      {name:<18} {operations / 1e9:>10.2f} per image")
    per_step = counted.total_flops * train.global_batch_size
    click.echo(f"            {'step':<18} {per_step / 1e12:>10.2f} T, {train.global_batch_size} images")
    for name, number in counted.memory.items():
        click.echo(f"memory      {name:<18} {number / 2**30:>10.2f} GiB of each GPU")
    click.echo(
        f"            {'together':<18} {counted.total_memory / 2**30:>10.2f} GiB; {ranks} ranks, micro-batch "
        f"{train.micro_batch_size}, accumulation {accumulation}, ZeRO {train.zero_stage}, {train.precision}"
    )


MODEL_COMMANDS = (backbones, cost)
