"""What test_zero.py trains in ZeRO stages: the cases, and the same training by plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frepa_dist.config import TrainConfig
from frepa_dist.methods.base import MethodSettings, StepInfo
from frepa_dist.methods.mae import MaeConfig, ModelConfig
from frepa_dist.methods.mine_term import HmiConfig
from frepa_dist.methods.registry import create_method
from frepa_dist.methods.retmae import AuxConfig, RetMaeConfig
from frepa_dist.train.engines import parameter_groups
from frepa_dist.train.schedule import learning_rate, opponent_learning_rate
from tests.frepa_dist.methods.steps import NUM_SAMPLES, make_batch, run_step
from tests.frepa_dist.methods.test_frepa import everything

FIRST_STEP, STEPS, TOTAL_STEPS = 90, 2, 100  # late, when all terms are on
ACCUMULATION = 2
CLIPPING = 0.05  # below all norms, which differ from step to step: so do the factors, and Adam shows it
METHODS = ("mae", "retmae", "frepa")
BACKBONES = ("swin_pico", "swinv2_pico", "convnext_twin")


class Case(NamedTuple):
    """One run of two steps."""

    method: str
    stage: int
    precision: str = "fp32"
    offload: bool = False
    checkpointing: bool = False
    backbone: str = "vit_pico"  # of Frepa

    @property
    def name(self) -> str:
        more = [word for word, on in (("offload", self.offload), ("ac", self.checkpointing)) if on]
        more += [self.backbone] if self.backbone != "vit_pico" else []
        return "-".join([self.method, str(self.stage), self.precision, *more])


def cases(world_size: int, soak: bool) -> list[Case]:
    """Of `make test`, on two ranks: each stage with all terms; of `make soak` all that there is."""
    chosen = [Case(method, stage) for method in METHODS for stage in range(4)]
    if not soak:
        assert world_size == 2
        few = [
            Case("mae", 0, "bf16"),
            Case("mae", 3, checkpointing=True),
            Case("retmae", 1),
            Case("retmae", 3),
        ]
        return [*few, Case("retmae", 2, offload=True), Case("frepa", 2), Case("frepa", 3)]
    chosen += [Case(method, stage, "bf16") for method in METHODS for stage in range(4)]
    chosen += [Case("mae", stage, offload=True) for stage in (1, 2, 3)]
    chosen += [Case("retmae", stage, "bf16", offload=True) for stage in (1, 2, 3)]
    chosen += [Case(method, 3, checkpointing=True) for method in METHODS]
    chosen += [Case("frepa", stage, backbone=name) for name in BACKBONES for stage in (0, 3)]
    return chosen


def method_settings(case: Case, folder: Path) -> MethodSettings:
    """Every term on, each heavy enough to be seen in the gradients."""
    model = ModelConfig(size="tiny", image_size=64, activation_checkpointing=case.checkpointing)
    if case.method == "mae":
        return MaeConfig(model=model)
    if case.method == "retmae":
        aux = AuxConfig(
            model="test_vit", weights=folder / "aux.safetensors", weight=1.0, negatives=3, hidden=16
        )
        return RetMaeConfig(model=model, hmi=HmiConfig(weight=1.0, negatives=3, hidden=16), aux=aux)
    config = everything(case.backbone)
    with_checkpointing = {"activation_checkpointing": case.checkpointing}
    return config.model_copy(update={"model": config.model.model_copy(update=with_checkpointing)})


def train_config(case: Case, world_size: int) -> TrainConfig:
    return TrainConfig(
        global_batch_size=NUM_SAMPLES,
        micro_batch_size=NUM_SAMPLES // world_size // ACCUMULATION,
        steps=TOTAL_STEPS,
        base_learning_rate=0.32,
        warmup_fraction=0.0,
        precision=case.precision,
        zero_stage=case.stage,
        offload_optimizer=case.offload,
        gradient_clipping=CLIPPING,
        opponent={"clipping": CLIPPING, "learning_rate": 1e-4},
    )


def step_batch(number: int, backbone: str = "vit_pico") -> dict[str, Any]:
    """A global batch of a step; each has others' images and draws."""
    batch = make_batch(cells=16 if backbone == "vit_pico" else 4)
    images, keys = batch["image"], batch["draw_key"]
    return {**batch, "image": images.roll(number, -1), "draw_key": [key + 100 * number for key in keys]}


def infos() -> list[StepInfo]:
    return [StepInfo(FIRST_STEP + number, TOTAL_STEPS, seed=0) for number in range(STEPS)]


class Expected(NamedTuple):
    """After a step: gradients, of critics clipped; norms; losses; weights; state of the method."""

    norms: dict[str, Tensor]
    gradients: dict[str, dict[str, Tensor]]
    terms: dict[str, Tensor]
    weights: dict[str, dict[str, Tensor]]
    state: dict[str, Tensor]


def train_plainly(
    method: MethodSettings, nets: Mapping[str, nn.Module], train: TrainConfig, backbone: str
) -> list[Expected]:
    """The same training over whole batches by autograd alone."""
    nets = {name: copy.deepcopy(net) for name, net in nets.items()}
    specs = create_method(method).submodules()
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, spec in specs.items():
        own: Any = train if spec.kind == "engine" else train.opponent
        if spec.kind == "plain":
            optimizers[name] = torch.optim.AdamW(nets[name].parameters(), lr=train.critic_learning_rate)
        elif spec.kind in ("engine", "opponent"):
            groups = parameter_groups(nets[name], own.weight_decay)
            optimizers[name] = torch.optim.AdamW(groups, betas=own.betas)
    state: dict[str, Tensor] | None = None
    expected = []
    for number, info in enumerate(infos()):
        step = run_step(method, nets, step_batch(number, backbone), info=info, state=state)
        state = step.state
        gradients: dict[str, dict[str, Tensor]] = {}
        norms: dict[str, Tensor] = {}
        for name, optimizer in optimizers.items():
            params = {key: p for key, p in nets[name].named_parameters() if p.requires_grad}
            for key, p in params.items():
                p.grad = step.gradients[f"{name}.{key}"].clone()
            if specs[name].kind == "plain":
                nn.utils.clip_grad_norm_(list(params.values()), train.critic_clipping)
            else:
                rate = learning_rate if specs[name].kind == "engine" else opponent_learning_rate
                for group in optimizer.param_groups:
                    group["lr"] = rate(train, info.step, info.total_steps)
            gradients[name] = {key: p.grad.clone() for key, p in params.items()}
            if specs[name].kind != "plain":  # engines clip as they step
                norms[name] = nn.utils.clip_grad_norm_(list(params.values()), CLIPPING)
            optimizer.step()
        for name, spec in specs.items():
            if spec.kind == "ema":
                source = dict(nets["student"].named_parameters())
                for key, p in nets[name].named_parameters():
                    if source[key].requires_grad:
                        p.data.lerp_(source[key].data, 1 - spec.momentum(info))
            if hasattr(nets[name], "after_step"):
                nets[name].after_step()
        weights = {
            name: {key: p.detach().clone() for key, p in net.named_parameters()}
            for name, net in nets.items()
            if specs[name].kind != "frozen"
        }
        expected.append(Expected(norms, gradients, step.terms, weights, step.state))
    return expected
