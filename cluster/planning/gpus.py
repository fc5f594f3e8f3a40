"""Kinds of GPUs, as their data sheets describe them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from shards.support.errors import ConfigError
from shards.support.settings import Settings, parse_yaml

CUSTOM = "custom"
_TABLE = Path(__file__).with_name("gpus.yaml")


class Gpu(Settings):
    """A kind of GPU.

    Attributes:
        name: as its vendor calls it.
        memory_gb: in 10^9 bytes.
        tflops: dense peak of matrix products by precision, in 10^12 operations per second; None: it has none.
        link_gb_per_second: to other GPUs of its node, one direction, in 10^9 bytes per second.
        network_gbit_per_second: to other nodes, one direction; None: its data sheets do not say.
        source: where that is from.
    """

    name: str = "custom GPU"
    memory_gb: float = Field(gt=0)
    tflops: dict[str, float | None]
    link_gb_per_second: float = Field(gt=0)
    network_gbit_per_second: float | None = Field(None, gt=0)
    source: str = "given on the command line"

    @property
    def memory_bytes(self) -> float:
        """Bytes of memory."""
        return self.memory_gb * 1e9

    def peak_flops(self, precision: str) -> float:
        """Operations per second at most.

        Raises:
            ConfigError: it has no matrix products in this precision.
        """
        peak = self.tflops.get(precision)
        if peak is None:
            known = ", ".join(name for name, value in self.tflops.items() if value is not None)
            raise ConfigError(
                f"{self.name} has no {precision} matrix products (it has {known})",
                where="train.precision",
                allowed="bf16, fp32",
                fix="--set train.precision=fp32, or another --gpu",
            )
        return peak * 1e12

    def network_bytes_per_second(self) -> float:
        """Bytes per second to other nodes.

        Raises:
            ConfigError: they are not known.
        """
        if self.network_gbit_per_second is None:
            raise ConfigError(
                f"the network between nodes of {self.name} is not known: servers with it differ",
                where="gpu.network_gbit_per_second",
                fix="--assume gpu.network_gbit_per_second=NUMBER, of each GPU",
            )
        return self.network_gbit_per_second * 1e9 / 8


def read_gpus() -> dict[str, dict[str, Any]]:
    """The known kinds, as fields of `Gpu`, by their short names."""
    table: dict[str, dict[str, Any]] = parse_yaml(_TABLE.read_text(encoding="utf-8"), where=_TABLE)
    return table


def gpu_fields(name: str) -> dict[str, Any]:
    """What is known of a kind; nothing of `custom`.

    Raises:
        ConfigError: there is no such kind.
    """
    if name == CUSTOM:
        return {}
    table = read_gpus()
    if name not in table:
        raise ConfigError(
            f"no such kind of GPU: {name}",
            where="--gpu",
            allowed=", ".join([*table, CUSTOM]),
            fix=f"describe it: --gpu {CUSTOM} --assume gpu.memory_gb=N --assume gpu.tflops.bf16=N "
            "--assume gpu.link_gb_per_second=N --assume gpu.network_gbit_per_second=N",
        )
    return table[name]
