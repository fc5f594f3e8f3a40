"""RetMAE (ICLR 2026, openreview K5tcKEQaUr): MAE that keeps what the high-frequency tokens tell.

Branch 1 is MAE. Branch 2 is the exponential moving average (EMA) of its encoder, the teacher, on the
high-frequency (HF) tokens of the same view alone. The mean Z of branch 1's visible tokens shall share much
information with the mean Z_c of branch 2's and, where given, with an auxiliary encoder's embedding Z_aux:

    L = L_rec + 0.1 L_hmi + 0.01 L_aux,  L_hmi = -MI(Z, Z_c),  L_aux = -MI(Z, Z_aux)

each MI estimated by a critic that minimizes the same loss. In the first tenth of the steps, while the teacher
is not yet worth following, L_hmi is left out altogether (its critic rests, the teacher is not run).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from frepa_dist.methods.base import Batch, Comm, Losses, Method, StepInfo, SubmoduleSpec
from frepa_dist.methods.mae import (
    ReconstructionConfig,
    create_model,
    create_student,
    normalize_images,
    reconstruct,
)
from frepa_dist.models.auxiliary import auxiliary_width, create_auxiliary_encoder
from frepa_dist.models.critic import MineCritic
from frepa_dist.models.vit_mae import VIT_SIZES, MaeEncoder, MaskedAutoencoderViT
from frepa_dist.mutual_information import (
    EstimatorName,
    LogMovingAverage,
    Pairs,
    cosine_scores,
    create_estimator,
    draw_columns,
    mine_loss,
)
from shards.read.windows import to_unit_range
from shards.support.errors import ConfigError
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


class HmiConfig(MineConfig):
    """The term with the HF tokens.

    Attributes:
        weight: of the term, after warm-up and ramp.
        warmup_fraction: share of the steps without the term.
        ramp_fraction: share of the steps, after those, in which the weight rises linearly from 0.
        ema_momentum: share of the teacher kept in a step at the start; it rises to 1 by a cosine.
    """

    weight: float = Field(default=0.1, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    ramp_fraction: float = Field(default=0.05, ge=0, le=1)
    ema_momentum: float = Field(default=0.996, ge=0, le=1)


class AuxConfig(MineConfig):
    """The term with a frozen encoder.

    Attributes:
        model: a timm name, `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.
        weights: file with its weights; None takes timm's pretrained ones.
        weight: of the term.
    """

    model: str
    weights: Path | None = None
    weight: float = Field(default=0.01, ge=0)


class RetMaeConfig(ReconstructionConfig):
    """Settings of RetMAE; without `hmi` (null) or without `aux` it is an ablation of the paper."""

    name: Literal["retmae"] = "retmae"
    hmi: HmiConfig | None = HmiConfig()
    aux: AuxConfig | None = None


def hmi_weight(config: HmiConfig, info: StepInfo) -> float:
    """Return the weight of the HF term in a step: 0 in the warm-up, then a ramp, then `weight`."""
    past = info.step - config.warmup_fraction * info.total_steps
    ramp = config.ramp_fraction * info.total_steps
    share = float(past >= 0) if ramp == 0 else min(max(past / ramp, 0.0), 1.0)
    return config.weight * share


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


class RetMae(Method):
    """Reconstruction and mutual information: losses `rec`, `hmi` and `aux`.

    Args:
        config: the settings.
        compute_dtype: what the frozen auxiliary encoder computes in, by autocast.

    Raises:
        ConfigError: timm does not know the auxiliary encoder, or its width does not suit `cosine`.
    """

    name: ClassVar[str] = "retmae"
    config_class = RetMaeConfig

    @classmethod
    def create_student(cls, config: RetMaeConfig) -> MaskedAutoencoderViT:
        """See `Method`."""
        return create_model(config)

    def __init__(self, config: RetMaeConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        self.config, self._compute_dtype = config, compute_dtype
        self._width = VIT_SIZES[config.model.size].width
        self._terms: dict[str, MineTerm] = {}
        if config.hmi is not None:
            self._terms["hmi"] = MineTerm(config.hmi, "teacher")
        if config.aux is not None:
            self._terms["aux"] = MineTerm(config.aux, "auxiliary")
            self._aux_width = auxiliary_width(config.aux.model)
            if config.aux.estimator == "cosine" and self._aux_width != self._width:
                raise ConfigError(
                    f"cosine compares embeddings of one width: {self._width} and {self._aux_width}",
                    where="method.aux",
                    fix="choose another estimator or another auxiliary encoder",
                )

    def submodules(self) -> dict[str, SubmoduleSpec]:
        """See `Method`."""
        config = self.config
        specs = {"student": SubmoduleSpec(build=lambda: create_student(config), kind="engine")}
        widths = {}
        if (hmi := config.hmi) is not None:
            specs["teacher"] = SubmoduleSpec(
                build=self._create_teacher,
                kind="ema",
                of="student",
                momentum=lambda info: ema_momentum(hmi, info),
            )
            widths["hmi"] = self._width
        if (aux := config.aux) is not None:
            specs["auxiliary"] = SubmoduleSpec(
                build=lambda: create_auxiliary_encoder(aux.model, aux.weights), kind="frozen"
            )
            widths["aux"] = self._aux_width
        for name, term in self._terms.items():
            if term.has_critic:
                specs[term.critic_name] = SubmoduleSpec(
                    build=lambda term=term, width=widths[name]: MineCritic(  # type: ignore[misc]
                        self._width, width, term.config.hidden
                    ),
                    kind="plain",
                )
        return specs

    def _create_teacher(self) -> MaeEncoder:
        model = self.config.model
        return MaeEncoder(
            VIT_SIZES[model.size], image_size=model.image_size, patch_size=model.patch_size, in_channels=3
        )

    def _weights(self, info: StepInfo) -> dict[str, float]:
        """Return the weights of a step; a term of weight 0 is not computed at all."""
        weights = {"rec": 1.0}
        if self.config.hmi is not None:
            weights["hmi"] = hmi_weight(self.config.hmi, info)
        if self.config.aux is not None:
            weights["aux"] = self.config.aux.weight
        return weights

    @torch.no_grad()
    def targets(self, nets: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See `Method`: `teacher` (B, D) of the HF tokens, `auxiliary` (B, D') of the whole view."""
        weights, targets = self._weights(info), {}
        if weights.get("hmi"):
            images = normalize_images(batch, self.config.model)
            targets["teacher"] = pool_tokens(nets["teacher"](images, batch["hf_indices"]))
        if weights.get("aux"):
            dtype, device = self._compute_dtype, batch["image"].device.type
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                images = to_unit_range(batch["image"], batch["window"])
                targets["auxiliary"] = nets["auxiliary"](images).float()
        return targets

    def losses(
        self,
        nets: Mapping[str, nn.Module],
        batch: Batch,
        targets: Mapping[str, Tensor],
        pool: Mapping[str, Tensor],
        info: StepInfo,
        comm: Comm,
    ) -> Losses:
        """See `Method`."""
        images = normalize_images(batch, self.config.model)
        output = reconstruct(nets["student"], images, batch, self.config)
        losses = Losses(terms={"rec": output.loss}, weights=self._weights(info))
        z = pool_tokens(output.latent)
        for name, term in self._terms.items():
            if losses.weights[name]:
                losses.terms[name], metrics = term.loss(nets, z, batch, targets, pool, info, comm)
                prefix = "mi" if name == "hmi" else "mi_aux"
                losses.metrics |= {f"{prefix}/{key}": value for key, value in metrics.items()}
        return losses

    def after_step(self, info: StepInfo, comm: Comm) -> None:
        """See `Method`."""
        for term in self._terms.values():
            term.average.update(comm.mean)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        return {f"{name}.log_average": term.average.value for name, term in self._terms.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Method`."""
        super().load_state_dict(state)
        for name, term in self._terms.items():
            term.average.value = state[f"{name}.log_average"].clone()


def pool_tokens(tokens: Tensor) -> Tensor:
    """Average the patches of (B, 1 + K, D), without the class token, in float32 -> (B, D)."""
    return tokens[:, 1:].float().mean(dim=1)
