"""Started on each rank by test_opponent.py: gradients and weights of the loop's step beside plain autograd's.

Writes FOLDER/rank-R.json: case -> name of the network -> largest deviation of gradients, weights and vectors
of spectral normalization in a step, each over the norm of what it should be.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from frepa_dist.config import OpponentConfig, TrainConfig
from frepa_dist.methods.base import Losses, StepInfo
from frepa_dist.train.engines import EngineSubmodule, World, parameter_groups, process_group
from frepa_dist.train.records import Averages, PhaseTimer
from frepa_dist.train.schedule import learning_rate, opponent_learning_rate
from frepa_dist.train.step import Stepper
from frepa_dist.train.submodules import Submodules
from tests.frepa_dist.train.adversarial_method import Pair, PairConfig

STEPS, ACCUMULATION, MICRO = 2, 2, 2
STAGES = [(0, 0), (1, 0), (1, 1), (2, 2), (3, 0), (3, 2), (0, 3)]  # of the student and its opponent
CASES = [*((student, opponent, "fp32") for student, opponent in STAGES), (2, 0, "bf16")]
Weights = dict[str, dict[str, Tensor]]


def make_config(student: int, opponent: int, precision: str) -> TrainConfig:
    config = TrainConfig(
        global_batch_size=8,
        micro_batch_size=MICRO,
        steps=STEPS,
        base_learning_rate=0.32,  # 0.01 at this batch
        warmup_fraction=0.0,
        precision=precision,
    )
    # stage 3 is not offered, and this part of it works
    judged = OpponentConfig(learning_rate=0.005, clipping=None).model_copy(update={"zero_stage": opponent})
    return config.model_copy(update={"zero_stage": student, "opponent": judged})


def draw_micro_batches(size: int, step: int) -> list[dict[str, Any]]:
    """Those of all ranks, in slot order."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (size * ACCUMULATION * MICRO, 3, 32, 32), generator=generator)
    window = torch.tensor([0.0, 255.0]).expand(MICRO, 2)
    return [{"image": part.to(torch.uint8), "window": window} for part in images.split(MICRO)]


class Plain:
    """The same training on one rank, by autograd alone, over the whole global batch."""

    def __init__(self, method: Pair, config: TrainConfig) -> None:
        torch.manual_seed(config.seed)
        self.method, self.config = method, config
        self.nets: dict[str, nn.Module] = {n: spec.build() for n, spec in method.submodules().items()}
        groups = {
            "student": (config.weight_decay, config.betas),
            "judge": (config.opponent.weight_decay, config.opponent.betas),
        }
        self.optimizers = {
            name: torch.optim.AdamW(parameter_groups(self.nets[name], decay), betas=betas)
            for name, (decay, betas) in groups.items()
        }

    def step(self, micro_batches: list[dict[str, Any]], info: StepInfo, world: World) -> Weights:
        rates = {
            "student": learning_rate(self.config, info.step, info.total_steps),
            "judge": opponent_learning_rate(self.config, info.step, info.total_steps),
        }
        sums: dict[str, list[Tensor]] = {}
        for batch in micro_batches:
            losses = self.method.losses(self.nets, batch, {}, {}, info, world)
            outputs = {name: value.detach() for name, value in losses.outputs.items()}
            judged = self.method.opponent_losses("judge", self.nets, outputs, info)
            assert isinstance(judged, Losses)
            for name, total in (("student", losses.total), ("judge", judged.total)):
                parts = torch.autograd.grad(total / len(micro_batches), list(self.nets[name].parameters()))
                before = sums.get(name, [torch.zeros_like(part) for part in parts])
                sums[name] = [a + b for a, b in zip(before, parts, strict=True)]
        for name, optimizer in self.optimizers.items():
            for parameter, gradient in zip(self.nets[name].parameters(), sums[name], strict=True):
                parameter.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = rates[name]
            optimizer.step()
        self.nets["judge"].after_step()
        self.method.guard.update(lambda mean: mean)
        return {n: dict(zip(dict(self.nets[n].named_parameters()), s, strict=True)) for n, s in sums.items()}

    def weights(self) -> Weights:
        return {name: dict(net.named_parameters()) for name, net in self.nets.items()}


def record_gradients(engine: EngineSubmodule, net: nn.Module, into: dict[str, Tensor]) -> None:
    """Copy the full gradients before each optimizer step."""
    step = engine.step

    def recording_step() -> None:
        if engine.engine.is_gradient_accumulation_boundary():
            for name, parameter in net.named_parameters():
                gradient = safe_get_full_grad(parameter)
                assert gradient is not None, name
                into[name] = gradient.float().clone()
        step()

    engine.step = recording_step  # type: ignore[method-assign]


def full_weight(parameter: Tensor) -> Tensor:
    master = safe_get_full_fp32_param(parameter)
    return parameter.detach().float() if master is None else master


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over the norm of all that is expected."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[name] - expected[name].detach()).square().sum()) for name in expected)
    return (apart / sum(float(value.detach().square().sum()) for value in expected.values())) ** 0.5


def run_case(student: int, opponent: int, precision: str, world: World) -> dict[str, dict[str, float]]:
    config = make_config(student, opponent, precision)
    plain = Plain(Pair(PairConfig()), config)
    method = Pair(PairConfig())
    submodules = Submodules(method, config, ACCUMULATION, world)
    judge = submodules.opponents["judge"]
    nets = {"student": submodules.student.module, "judge": judge.module}
    gradients: Weights = {"student": {}, "judge": {}}
    record_gradients(submodules.student, nets["student"], gradients["student"])
    record_gradients(judge.own, nets["judge"], gradients["judge"])
    stepper = Stepper(method, submodules, world, PhaseTimer(), Averages())
    worst = {name: {"gradient": 0.0, "weight": 0.0, "vector": 0.0} for name in nets}
    for number in range(STEPS):
        info = StepInfo(step=number, total_steps=STEPS, seed=0)
        everyone = draw_micro_batches(world.size, number)
        expected = plain.step(everyone, info, world)
        stepper.run(everyone[world.rank * ACCUMULATION :][:ACCUMULATION], info)
        for name, net in nets.items():
            weights = {key: full_weight(value) for key, value in net.named_parameters()}
            seen = worst[name]
            seen["gradient"] = max(seen["gradient"], deviation(gradients[name], expected[name]))
            seen["weight"] = max(seen["weight"], deviation(weights, plain.weights()[name]))
        vectors, known = dict(judge.module.named_buffers()), dict(plain.nets["judge"].named_buffers())
        worst["judge"]["vector"] = max(worst["judge"]["vector"], deviation(vectors, known))
    guard, known = method.guard, plain.method.guard
    apart = max(abs(float(value - known.state_dict()[name])) for name, value in guard.state_dict().items())
    return {**worst, "guard": {"updates": float(guard.updates), "deviation": apart}}


def main(folder: Path) -> None:
    """Run every case; an error in one is told, and the next is run."""
    with process_group() as world:
        torch.set_num_threads(1)
        results: dict[str, Any] = {}
        for student, opponent, precision in CASES:
            case = f"{student}-{opponent}-{precision}"
            results[case] = run_case(student, opponent, precision, world)
        (folder / f"rank-{world.rank}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
