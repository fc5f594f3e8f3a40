"""RetMAE (ICLR 2026, openreview K5tcKEQaUr): MAE that keeps what the high-frequency tokens tell.

Branch 1 is MAE. Branch 2 is the exponential moving average (EMA) of its encoder, the teacher, on the
high-frequency (HF) tokens of the same view alone. The mean Z of branch 1's visible tokens shall share much
information with the mean Z_c of branch 2's and, where given, with an auxiliary encoder's embedding Z_aux:

    L = L_rec + 0.1 L_hmi + 0.01 L_aux,  L_hmi = -MI(Z, Z_c),  L_aux = -MI(Z, Z_aux)

each MI estimated by a critic that minimizes the same loss. In the first tenth of the steps, while the teacher
is not yet worth following, L_hmi is left out altogether (its critic rests, the teacher is not run).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from frepa_dist.methods.base import Batch, Comm, Losses, Method, Preview, StepInfo, SubmoduleSpec
from frepa_dist.methods.mae import (
    ReconstructionConfig,
    create_encoder,
    create_model,
    create_student,
    encoder_width,
    masked_detail,
    normalize_images,
    preview_masked,
    reconstruct,
)
from frepa_dist.methods.mine_term import HmiConfig, MineConfig, MineTerm, ema_momentum, teacher_tokens
from frepa_dist.methods.terms import scheduled_weight
from frepa_dist.models.auxiliary import (
    auxiliary_width,
    create_auxiliary_encoder,
    outline_auxiliary_encoder,
)
from frepa_dist.models.critic import MineCritic
from frepa_dist.models.masked_backbone import MaskedBackbone
from frepa_dist.models.vit_mae import MaskedAutoencoderViT, pool_tokens
from shards.read.windows import to_unit_range
from shards.support.errors import ConfigError


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
    def create_student(cls, config: RetMaeConfig) -> MaskedAutoencoderViT | MaskedBackbone:
        """See `Method`."""
        return create_model(config)

    @classmethod
    def previews(
        cls, student: nn.Module, images: Tensor, config: RetMaeConfig, draw_keys: Sequence[int]
    ) -> list[Preview]:
        """See `Method`."""
        return preview_masked(student, images, config, draw_keys)

    def __init__(self, config: RetMaeConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        self.config, self._compute_dtype = config, compute_dtype
        self._width = encoder_width(config)
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
                build=lambda: create_encoder(config),
                kind="ema",
                of="student",
                momentum=lambda info: ema_momentum(hmi, info),
            )
            widths["hmi"] = self._width
        if (aux := config.aux) is not None:
            specs["auxiliary"] = SubmoduleSpec(
                build=lambda: create_auxiliary_encoder(aux.model, aux.weights),
                kind="frozen",
                outline=lambda: outline_auxiliary_encoder(aux.model),
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

    def _weights(self, info: StepInfo) -> dict[str, float]:
        """Return the weights of a step; a term of weight 0 is not computed at all."""
        weights = {"rec": 1.0}
        if self.config.hmi is not None:
            weights["hmi"] = scheduled_weight(self.config.hmi, info)
        if self.config.aux is not None:
            weights["aux"] = self.config.aux.weight
        return weights

    @torch.no_grad()
    def targets(self, nets: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See `Method`: `teacher` (B, D) of its tokens, `auxiliary` (B, D') of the whole view."""
        weights, targets = self._weights(info), {}
        if weights.get("hmi"):
            images = normalize_images(batch, self.config.model)
            assert self.config.hmi is not None
            told = nets["teacher"](images, teacher_tokens(self.config.hmi, batch))
            # tokens of a vision transformer; a backbone has pooled its cells already
            targets["teacher"] = told if told.ndim == 2 else pool_tokens(told)
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
        losses.metrics |= masked_detail(output, images, self.config, info)
        z = output.pooled
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
