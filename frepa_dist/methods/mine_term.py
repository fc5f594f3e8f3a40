"""Mutual information as a term of a loss: what RetMAE's L_hmi and L_aux (openreview K5tcKEQaUr) share.

Shapes: B micro-batch, G global batch, D widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from frepa_dist.draws import SampleDraws
from frepa_dist.methods.base import Batch, Comm, StepInfo
from frepa_dist.methods.terms import TermConfig
from frepa_dist.mutual_information import (
    EstimatorName,
    LogMovingAverage,
    Pairs,
    cosine_scores,
    create_estimator,
    draw_columns,
    mine_loss,
)
from shards.support.settings import Settings


class MineConfig(Settings):
    """How mutual information is estimated. No public source states these numbers.

    Attributes:
        estimator: see `frepa_dist.mutual_information`.
        negatives: negatives of each row, or all other samples of a smaller global batch. The estimate depends
            on it.
        hidden: width of the critic.
        average_momentum: share of the old moving average of the denominator kept in a step (`dv`, `smile`).
        tau: `smile` clips the scores of negatives to this.
        partition_limit: a micro-batch with |log E_product[e^T]| beyond it is skipped.
    """

    estimator: EstimatorName = "dv"
    negatives: int = Field(default=256, ge=1)
    hidden: int = Field(default=512, ge=1)
    average_momentum: float = Field(default=0.9, gt=0, lt=1)
    tau: float = Field(default=5.0, gt=0)
    # the moving average takes exponentials in float32, which ends at e^88
    partition_limit: float = Field(default=20.0, gt=0, le=80)


class HmiConfig(MineConfig, TermConfig):
    """The term with the HF tokens, as an exponential moving average (EMA) of the encoder sees them.

    Attributes:
        ema_momentum: share of the teacher kept in a step at the start; it rises to 1 by a cosine.
        tokens: what the teacher sees. "random" is a control: as many tokens, drawn anew for every view, tell
            whether it is their detail that helps.
    """

    weight: float = Field(default=0.1, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    ramp_fraction: float = Field(default=0.05, ge=0, le=1)
    tokens: Literal["hf", "random"] = "hf"
    ema_momentum: float = Field(default=0.996, ge=0, le=1)


def ema_momentum(config: HmiConfig, info: StepInfo) -> float:
    """Return the share of the teacher kept after a step: from `ema_momentum` to 1 by half a cosine."""
    progress = info.step / max(info.total_steps - 1, 1)
    return 1 - (1 - config.ema_momentum) * (1 + math.cos(math.pi * progress)) / 2


class MineTerm:
    """One mutual-information loss: its critic's name, its estimator, its moving average.

    Args:
        config: how it is estimated.
        target: name of the target it is taken with.
    """

    def __init__(self, config: MineConfig, target: str) -> None:
        self.config, self.target = config, target
        self.critic_name = f"{target}_critic"
        self.has_critic = config.estimator != "cosine"
        self.average = LogMovingAverage(config.average_momentum)
        self._estimator = create_estimator(config.estimator, config.tau)

    def loss(
        self,
        nets: Mapping[str, nn.Module],
        z: Tensor,
        batch: Batch,
        targets: Mapping[str, Tensor],
        pool: Mapping[str, Tensor],
        info: StepInfo,
        comm: Comm,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of embeddings (B, D) and its metrics; all ranks must call it."""
        everything = pool[self.target]
        columns = draw_columns(len(everything), self.config.negatives, seed=info.seed, step=info.step)
        columns = columns.to(z.device, non_blocking=True)
        log_average = self.average.value.to(z.device)
        result = mine_loss(
            self._estimator,
            nets[self.critic_name] if self.has_critic else cosine_scores,
            Pairs(z, targets[self.target], everything, batch["slot"], columns),
            log_average,
            limit=self.config.partition_limit,
            any_rank=comm.any,
        )
        self.average.observe(torch.where(result.skipped, log_average, result.clipped_log_partition))
        return result.loss, {
            "estimate": result.estimate,
            "critic_mean": result.mean_score,
            "critic_max": result.max_score,
            "log_partition": result.log_partition,
            "skipped": result.skipped.float(),
        }


def teacher_tokens(config: HmiConfig, batch: Batch) -> Tensor:
    """Which tokens of each view the teacher sees, (B, K) int64: the HF tokens, or as many at random."""
    indices: Tensor = batch["hf_indices"]
    if config.tokens == "hf":
        return indices
    num_tokens = batch["mask_noise"].shape[1]
    generators = SampleDraws(batch["draw_key"], "cpu").generators("tokens of the teacher")
    drawn = [generator.permutation(num_tokens)[: indices.shape[1]] for generator in generators]
    return torch.from_numpy(np.stack(drawn)).to(indices)
