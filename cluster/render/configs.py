"""The config files that jobs are started with: found, checked as far as this machine can, and read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from cluster.render.files import ConfigFile, pretrain_arguments
from cluster.render.settings import LaunchConfig
from shards.support.errors import ConfigError
from shards.support.settings import dump_yaml, find_config, load_settings, read_config


def check_run(config: LaunchConfig) -> ConfigFile:
    """Find the run config and see that the run would start with so many ranks.

    Raises:
        ConfigError: there is none of this name, it is wrong, or the global batch does not divide.
    """
    from frepa_dist.config import RunConfig
    from shards.read.order import check_batch_sizes

    name = config.pretrain.config
    arguments = pretrain_arguments(config, name)
    overrides = [value for option, value in pairwise(arguments) if option == "--set"]
    run = load_settings(RunConfig, name, overrides)
    try:
        check_batch_sizes(
            run.train.global_batch_size, config.nodes * config.ranks, run.train.micro_batch_size
        )
    except ConfigError as error:
        raise ConfigError(
            f"on {config.nodes} nodes with {config.ranks} ranks each: {error.what}",
            where=name,
            fix=f"{error.fix} (pretrain.overrides: [train.micro_batch_size=...]), or other machines",
        ) from error
    if not Path(name).is_file():
        return ConfigFile(name)
    # with its bases, which pods would not find
    return ConfigFile(str(Path(name).resolve()), dump_yaml(read_config(name)))


def find_sweep(config: LaunchConfig) -> ConfigFile:
    """Find the config of the sweep: a file here, a shipped one, or one in the storage of the cluster."""
    name = config.sweep.config
    path = Path(name)
    if path.is_file():
        return ConfigFile(str(path.resolve()), path.read_text(encoding="utf-8"))
    try:
        find_config(name)
    except ConfigError:
        return ConfigFile(config.place(name))
    return ConfigFile(name)
