"""The methods by name, and how a config becomes one."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from frepa_dist.methods.base import Method
from frepa_dist.methods.mae import Mae, MaeConfig
from frepa_dist.methods.retmae import RetMae, RetMaeConfig

MethodConfig = Annotated[MaeConfig | RetMaeConfig, Field(discriminator="name")]


def create_method(config: MaeConfig | RetMaeConfig, compute_dtype: torch.dtype = torch.float32) -> Method:
    """Create the method that a config names.

    Args:
        config: its settings.
        compute_dtype: what networks outside the engines compute in, by autocast, where the method runs them.

    Raises:
        ConfigError: the settings contradict each other.
    """
    if isinstance(config, MaeConfig):
        return Mae(config)
    return RetMae(config, compute_dtype)
