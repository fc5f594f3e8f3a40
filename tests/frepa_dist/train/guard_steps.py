"""Started on each rank by test_guards.py: single steps with a fault, in every ZeRO stage.

Writes FOLDER/rank-R.json: case -> fault -> what was found, and what it changed that it must not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frepa_dist.config import TrainConfig
from frepa_dist.methods.base import StepInfo
from frepa_dist.train.engines import World, process_group
from frepa_dist.train.guards import inner_optimizer, masters
from frepa_dist.train.records import Averages, PhaseTimer
from frepa_dist.train.step import Stepper
from frepa_dist.train.submodules import Submodules
from tests.frepa_dist.train.faulty_method import FAULTS, Faulty, FaultyConfig

ACCUMULATION, MICRO = 2, 2
# stage of the student, of its discriminator, precision, whether masters and moments are on the host
CASES = {
    "0-fp32": (0, 0, "fp32", False),
    "0-bf16": (0, 1, "bf16", False),
    "1-fp32": (1, 2, "fp32", False),
    "2-bf16": (2, 0, "bf16", False),
    "2-bf16-offload": (2, 0, "bf16", True),
    "3-fp32": (3, 0, "fp32", False),
    "3-bf16": (3, 0, "bf16", False),
}
STEPS = 40


def draw_batch(step: int, rank: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    images = torch.randint(0, 256, (ACCUMULATION * MICRO, 3, 32, 32), generator=generator)
    window = torch.tensor([0.0, 255.0]).expand(MICRO, 2)
    return [{"image": part.to(torch.uint8), "window": window} for part in images.split(MICRO)]


def everything(method: Faulty, submodules: Submodules) -> dict[str, Tensor]:
    """Copies of all that a step may change on this rank."""
    found: dict[str, Tensor] = {f"method.{name}": value for name, value in method.state_dict().items()}
    engines = submodules.engines
    optimizers = {name: (inner_optimizer(engine), masters(engine)) for name, engine in engines.items()}
    modules = {name: engine.module for name, engine in submodules.engines.items()}
    for name, plain in submodules.plain.items():
        optimizers[name] = plain.optimizer, list(plain.module.parameters())
        modules[name] = plain.module
    modules |= {name: teacher.module for name, teacher in submodules.teachers.items()}
    parts = {name: getattr(teacher, "_flat", None) for name, teacher in submodules.teachers.items()}
    found |= {f"{name}.flat": part for name, part in parts.items() if part is not None}
    for name, module in modules.items():
        tensors = [*module.named_parameters(), *module.named_buffers()]
        found |= {f"{name}.{key}": getattr(value, "ds_tensor", value) for key, value in tensors}
    for name, (optimizer, trained) in optimizers.items():
        for number, master in enumerate(trained):
            found[f"{name}.master.{number}"] = master
            for key, value in optimizer.state[master].items():
                found[f"{name}.master.{number}.{key}"] = value
    return {name: value.detach().clone() for name, value in found.items()}


def is_same(before: Tensor | None, after: Tensor) -> bool:
    """Bit for bit: what fills the last part of a weight under ZeRO 3 was never written and may be a NaN."""
    if before is None:
        return False
    return torch.equal(before.reshape(-1).view(torch.uint8), after.reshape(-1).view(torch.uint8))


def run_case(student: int, judge: int, precision: str, is_offloaded: bool, world: World) -> dict[str, Any]:
    opponent = {"zero_stage": judge, "learning_rate": 0.01}
    config = TrainConfig(
        global_batch_size=world.size * ACCUMULATION * MICRO,
        micro_batch_size=MICRO,
        steps=STEPS,
        base_learning_rate=0.32,
        critic_learning_rate=0.01,
        warmup_fraction=0.0,
        precision=precision,
        zero_stage=student,
        offload_optimizer=is_offloaded,
        opponent=opponent,
    )
    method = Faulty(FaultyConfig())
    method.rank = world.rank
    submodules = Submodules(method, config, ACCUMULATION, world)
    averages = Averages()
    stepper = Stepper(method, submodules, world, PhaseTimer(), averages)
    step = 0

    def run(fault: str | None, rank: int = 0) -> tuple[Any, list[str], bool]:
        nonlocal step
        before = everything(method, submodules)
        method.faults, method.faulty_rank = ({step: fault} if fault else {}), rank
        reading = stepper.run(draw_batch(step, world.rank), StepInfo(step, STEPS, 0))
        step += 1
        after = everything(method, submodules)
        changed = [name for name in after if not is_same(before.get(name), after[name])]
        return reading, changed, len(averages.take(world)) > 0

    results: dict[str, Any] = {}
    run(None)  # moments are made in the first step
    for number, fault in enumerate(FAULTS):
        rank = number % world.size
        if fault == "critic_weight":
            critic = submodules.plain["critic"].module.state_dict()
            whole = {name: value.clone() for name, value in critic.items()}
        reading, changed, logged = run(fault, rank)
        if fault == "critic_weight":
            submodules.plain["critic"].module.load_state_dict(whole)
            changed.remove("critic.weight")
            changed.remove("critic.master.0")
        own = reading.own_loss_is_bad
        results[fault] = {"bad": sorted(reading.bad), "changed": changed, "logged": logged, "own": own}
        good, changed, logged = run(None)
        still = sorted({name.split(".")[0] for name in before_names(method, submodules)} - roots(changed))
        results[f"after {fault}"] = {"bad": sorted(good.bad), "still": still, "logged": logged}
    return results


def before_names(method: Faulty, submodules: Submodules) -> list[str]:
    return list(everything(method, submodules))


def roots(names: list[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def main(folder: Path) -> None:
    """Run every case."""
    with process_group() as world:
        torch.set_num_threads(1)
        results = {}
        for name, (student, judge, precision, is_offloaded) in CASES.items():
            results[name] = run_case(student, judge, precision, is_offloaded, world)
        (folder / f"rank-{world.rank}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
