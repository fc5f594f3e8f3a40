"""Started on each rank by test_zero.py: the loop's steps in every ZeRO stage beside plain autograd's.

Writes FOLDER/rank-R.json: case -> what deviates by how much, over the norm of what it should be. FOLDER holds
aux.safetensors, weights of timm's `test_vit`.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from frepa_dist.methods.base import Method
from frepa_dist.methods.registry import create_method
from frepa_dist.train import ema, engines
from frepa_dist.train.engines import World, process_group
from frepa_dist.train.records import Averages, PhaseTimer
from frepa_dist.train.step import Stepper
from frepa_dist.train.submodules import Submodules
from tests.frepa_dist.methods.steps import build_nets, cut
from tests.frepa_dist.train.zero_cases import (
    ACCUMULATION,
    CLIPPING,
    Case,
    Expected,
    cases,
    infos,
    method_settings,
    step_batch,
    train_config,
    train_plainly,
)


def record_gradients(submodules: Submodules, into: dict[str, dict[str, Tensor]]) -> None:
    """Copy all gradients before each optimizer step, whole."""
    for name, owner in submodules.engines.items():
        module = owner.module.net if name in submodules.opponents else owner.module
        step = owner.step

        def recording_step(name=name, owner=owner, module=module, step=step) -> None:
            if owner.engine.is_gradient_accumulation_boundary():
                into[name] = {
                    key: safe_get_full_grad(p).float().clone()
                    for key, p in module.named_parameters()
                    if key in into[name]
                }
            step()

        into[name] = dict.fromkeys(key for key, p in module.named_parameters() if key not in owner.fixed)
        owner.step = recording_step
    for name, plain in submodules.plain.items():

        def record(*_: Any, name=name, module=plain.module) -> None:
            into[name] = {key: p.grad.clone() for key, p in module.named_parameters()}

        plain.optimizer.register_step_pre_hook(record)


def full_weights(submodules: Submodules) -> dict[str, dict[str, Tensor]]:
    """Of all networks that change, in fp32; all ranks must call it."""

    # ZeRO 0 in bf16 has masters that DeepSpeed's functions do not know
    optimizer = submodules.student.engine.optimizer
    own, kept = (getattr(optimizer, f"{kind}_groups", []) for kind in ("fp16", "fp32"))
    masters = {p: m for group, ms in zip(own, kept, strict=False) for p, m in zip(group, ms, strict=True)}

    def whole(p: Tensor) -> Tensor:
        master = masters.get(p) if p in masters else safe_get_full_fp32_param(p)
        return (p if master is None else master).detach().float().clone()

    fixed = submodules.student.fixed
    student = submodules.student.module.named_parameters()
    found = {"student": {key: fixed[key] if key in fixed else whole(p) for key, p in student}}
    found |= {
        name: {key: whole(p) for key, p in opponent.module.named_parameters()}
        for name, opponent in submodules.opponents.items()
    }
    found |= {name: dict(plain.module.named_parameters()) for name, plain in submodules.plain.items()}
    return found | {name: teacher.state_dict() for name, teacher in submodules.teachers.items()}


def deviation(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Over the norm of all that is expected."""
    assert set(expected) <= set(found), set(expected) - set(found)
    apart = sum(
        float((found[name].detach() - value).double().square().sum()) for name, value in expected.items()
    )
    whole = sum(float(value.double().square().sum()) for value in expected.values())
    return (apart / max(1e-30, whole)) ** 0.5


class Gathered:
    """The largest share of a student's elements that was whole at once, at rest and at work."""

    def __init__(self, student: nn.Module) -> None:
        self.parameters = list(student.parameters())
        self.total = sum(p.ds_numel for p in self.parameters)
        self.at_work = 0.0
        for module in student.modules():
            module.register_forward_hook(self._look)

    def at_rest(self) -> float:
        return sum(p.numel() for p in self.parameters) / self.total

    def _look(self, *_: Any) -> None:
        self.at_work = max(self.at_work, self.at_rest())


class Shadow:
    """The teacher as it should be: the whole average in fp32 of all that the student trains."""

    def __init__(self, submodules: Submodules) -> None:
        self.averages = {name: dict(t.state_dict()) for name, t in submodules.teachers.items()}
        self.averages = copy.deepcopy(self.averages)
        self.fixed = submodules.student.fixed

    def follow(self, student: Mapping[str, Tensor], momenta: Mapping[str, float]) -> None:
        for name, average in self.averages.items():
            moving = [key for key in average if key in student and key not in self.fixed]
            values = [average[key] for key in moving]
            torch._foreach_lerp_(values, [student[key] for key in moving], 1 - momenta[name])

    def apart(self, found: Mapping[str, Mapping[str, Tensor]]) -> float:
        differences = [
            float((found[name][key].detach() - value).abs().max())
            for name, average in self.averages.items()
            for key, value in average.items()
        ]
        return max(differences, default=0.0)


def run_case(
    case: Case, folder: Path, nets: Mapping[str, nn.Module], expected: list[Expected], world: World
) -> tuple[dict[str, float], list[Expected]]:
    """Run a case; return how it deviates from what is expected, and what it gave."""
    settings, train = method_settings(case, folder), train_config(case, world.size)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    method: Method = create_method(settings, compute_dtype=dtype)
    specs = {
        name: replace(spec, build=lambda name=name: copy.deepcopy(nets[name]))
        for name, spec in method.submodules().items()
    }
    method.submodules = lambda: specs  # the same weights as beside it
    submodules = Submodules(method, train, ACCUMULATION, world)
    gradients: dict[str, dict[str, Tensor]] = {}
    record_gradients(submodules, gradients)
    shadow, averages = Shadow(submodules), Averages()
    stepper = Stepper(method, submodules, world, PhaseTimer(), averages)
    gathered = Gathered(submodules.student.module) if case.stage == 3 else None
    worst: dict[str, float] = {}
    seen: list[Expected] = []

    def note(name: str, value: float) -> None:
        worst[name] = max(worst.get(name, 0.0), value)

    for number, info in enumerate(infos()):
        share = train.micro_batch_size
        first = world.rank * share * ACCUMULATION
        batch = step_batch(number, case.backbone)
        stepper.run(
            [cut(batch, first + i * share, first + (i + 1) * share) for i in range(ACCUMULATION)], info
        )
        means = averages.take(world)
        terms = {name.rpartition("/")[2]: torch.tensor(value) for name, value in means.items()}
        weights = full_weights(submodules)
        whole = {n: {k: v.detach().clone() for k, v in values.items()} for n, values in weights.items()}
        state = {n: v.clone() for n, v in method.state_dict().items()}
        norms = {n: torch.as_tensor(engine.gradient_norm()) for n, engine in submodules.engines.items()}
        seen.append(
            Expected(norms, {n: dict(values) for n, values in gradients.items()}, terms, whole, state)
        )
        for known in expected[number : number + 1]:
            note("terms", max(deviation(terms, {name: value}) for name, value in known.terms.items()))
            for name, norm in known.norms.items():
                assert norm > 2 * CLIPPING, f"{name}: {norm} is not clipped"
                note("norm", deviation(norms, {name: norm}))
            for name, values in known.gradients.items():
                note(f"gradient/{name}", deviation(gradients[name], values))
            for name, values in known.weights.items():
                note(f"weight/{name}", deviation(weights[name], values))
            if known.state:
                note("state", deviation(state, known.state))
        student = weights["student"]
        if case.stage < 3:  # what it follows there
            student = {key: p.detach().float() for key, p in submodules.student.module.named_parameters()}
        momenta = {n: specs[n].momentum(info) for n in submodules.teachers}
        shadow.follow(student, momenta)
        note("ema", shadow.apart(weights))
        for name, teacher in submodules.teachers.items():
            apart = {k: v - student[k] for k, v in shadow.averages[name].items() if k not in shadow.fixed}
            distance = sum(float(v.double().square().sum()) for v in apart.values())
            distance /= sum(float(student[k].double().square().sum()) for k in apart)
            note("distance", abs(float(teacher.distance()) / distance**0.5 - 1))
    outer = submodules.student.engine.optimizer
    inner = outer if isinstance(outer, torch.optim.Optimizer) else outer.optimizer
    for adam in inner.state.values():
        note("count", abs(float(adam["step"]) - len(infos())))
    if gathered is not None:
        note("whole/at_rest", gathered.at_rest())
        note("whole/at_work", gathered.at_work)
        teachers = [p for t in submodules.teachers.values() for p in t.module.parameters()]
        note("whole/teacher", sum(p.numel() for p in teachers) / max(1, gathered.total))
    return worst, seen


def main(folder: Path, soak: bool) -> None:
    """Run every case."""
    engines.PERSISTENT_ELEMENTS = 1000  # so that weights come and go in small networks too
    engines.LIVE_ELEMENTS = engines.PREFETCH_ELEMENTS = 20_000
    ema.GATHER_ELEMENTS = 500_000
    with process_group() as world:
        torch.set_num_threads(1)
        results: dict[str, Any] = {}
        expected: dict[tuple[str, str, str], list[Expected]] = {}
        for case in cases(world.size, soak):
            settings = method_settings(case, folder)
            nets = build_nets(settings)
            kind = (case.method, case.backbone, case.precision)
            if kind not in expected and (case.precision == "fp32" or case.method == "mae"):
                expected[kind] = train_plainly(settings, nets, train_config(case, world.size), case.backbone)
            elif kind not in expected:  # bf16 makes much of small differences: stages are compared
                _, expected[kind] = run_case(case, folder, nets, [], world)
            # and steps after the first start from weights that differ by a rounding
            known = expected[kind][: 1 if case.precision == "bf16" else None]
            worst, _ = run_case(case, folder, nets, known, world)
            results[case.name] = worst
            if world.is_main:
                print(case.name, results[case.name], flush=True)
        (folder / f"rank-{world.rank}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[1] == "soak")
