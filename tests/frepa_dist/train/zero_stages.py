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
from typing import Any, NamedTuple

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from frepa_dist.config import TrainConfig
from frepa_dist.methods.base import Method, MethodSettings, StepInfo
from frepa_dist.methods.mae import MaeConfig, ModelConfig
from frepa_dist.methods.mine_term import HmiConfig
from frepa_dist.methods.registry import create_method
from frepa_dist.methods.retmae import AuxConfig, RetMaeConfig
from frepa_dist.train import ema, engines
from frepa_dist.train.engines import World, parameter_groups, process_group
from frepa_dist.train.records import Averages, PhaseTimer
from frepa_dist.train.schedule import learning_rate, opponent_learning_rate
from frepa_dist.train.step import Stepper
from frepa_dist.train.submodules import Submodules
from tests.frepa_dist.methods.steps import NUM_SAMPLES, build_nets, cut, make_batch, run_step
from tests.frepa_dist.methods.test_frepa import everything

FIRST_STEP, STEPS, TOTAL_STEPS = 90, 2, 100  # late, when all terms are on
ACCUMULATION = 2
METHODS = ("mae", "retmae", "frepa")


class Case(NamedTuple):
    """One run of two steps."""

    method: str
    stage: int
    precision: str = "fp32"
    offload: bool = False
    checkpointing: bool = False

    @property
    def name(self) -> str:
        more = [word for word, on in (("offload", self.offload), ("ac", self.checkpointing)) if on]
        return "-".join([self.method, str(self.stage), self.precision, *more])


def cases(world_size: int, soak: bool) -> list[Case]:
    """Of `make test`, on two ranks: each stage with all terms; of `make soak` all that there is."""
    chosen = [Case(method, stage) for method in METHODS for stage in range(4)]
    if not soak:
        assert world_size == 2
        few = [Case("mae", 0), Case("mae", 3, checkpointing=True), Case("retmae", 1), Case("retmae", 3)]
        return [*few, Case("retmae", 2, offload=True), Case("frepa", 2), Case("frepa", 3)]
    chosen += [Case(method, stage, "bf16") for method in METHODS for stage in range(4)]
    chosen += [Case("mae", stage, offload=True) for stage in (1, 2, 3)]
    chosen += [Case("retmae", stage, "bf16", offload=True) for stage in (1, 2, 3)]
    chosen += [Case(method, 3, checkpointing=True) for method in METHODS]
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
    config = everything()
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
        opponent={"clipping": None, "learning_rate": 1e-4},
    )


def step_batch(number: int) -> dict[str, Any]:
    """A global batch of a step; each has others' images and draws."""
    batch = make_batch()
    images, keys = batch["image"], batch["draw_key"]
    return {**batch, "image": images.roll(number, -1), "draw_key": [key + 100 * number for key in keys]}


def infos() -> list[StepInfo]:
    return [StepInfo(FIRST_STEP + number, TOTAL_STEPS, seed=0) for number in range(STEPS)]


class Expected(NamedTuple):
    """After a step: gradients, clipped where the loop clips; losses; weights; state of the method."""

    gradients: dict[str, dict[str, Tensor]]
    terms: dict[str, Tensor]
    weights: dict[str, dict[str, Tensor]]
    state: dict[str, Tensor]


def train_plainly(
    method: MethodSettings, nets: Mapping[str, nn.Module], train: TrainConfig
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
        step = run_step(method, nets, step_batch(number), info=info, state=state)
        state = step.state
        gradients: dict[str, dict[str, Tensor]] = {}
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
        expected.append(Expected(gradients, step.terms, weights, step.state))
    return expected


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

    def whole(p: Tensor) -> Tensor:
        master = safe_get_full_fp32_param(p)
        return (p.detach().float() if master is None else master).clone()

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
    apart = sum(float((found[name].detach() - expected[name]).double().square().sum()) for name in expected)
    return (apart / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


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
) -> dict[str, Any]:
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

    def note(name: str, value: float) -> None:
        worst[name] = max(worst.get(name, 0.0), value)

    for number, info in enumerate(infos()):
        share = train.micro_batch_size
        first = world.rank * share * ACCUMULATION
        batch = step_batch(number)
        stepper.run(
            [cut(batch, first + i * share, first + (i + 1) * share) for i in range(ACCUMULATION)], info
        )
        means = averages.take(world)
        terms = {name.rpartition("/")[2]: torch.tensor(value) for name, value in means.items()}
        known = expected[number]
        note("terms", max(deviation(terms, {name: value}) for name, value in known.terms.items()))
        for name, values in known.gradients.items():
            note(f"gradient/{name}", deviation(gradients[name], values))
        weights = full_weights(submodules)
        for name, values in known.weights.items():
            note(f"weight/{name}", deviation(weights[name], values))
        student = weights["student"]
        if case.stage < 3:  # what it follows there
            student = {key: p.detach().float() for key, p in submodules.student.module.named_parameters()}
        momenta = {n: specs[n].momentum(info) for n in submodules.teachers}
        shadow.follow(student, momenta)
        note("ema", shadow.apart(weights))
        if known.state:
            note("state", deviation(method.state_dict(), known.state))
        for name, teacher in submodules.teachers.items():
            apart = {k: v - student[k] for k, v in shadow.averages[name].items() if k not in shadow.fixed}
            whole = {k: student[k] for k in apart}
            distance = sum(float(v.double().square().sum()) for v in apart.values())
            distance /= sum(float(v.double().square().sum()) for v in whole.values())
            note("distance", abs(float(teacher.distance()) / distance**0.5 - 1))
    if gathered is not None:
        note("whole/at_rest", gathered.at_rest())
        note("whole/at_work", gathered.at_work)
        teachers = [p for t in submodules.teachers.values() for p in t.module.parameters()]
        note("whole/teacher", sum(p.numel() for p in teachers) / max(1, gathered.total))
    return worst


def main(folder: Path, soak: bool) -> None:
    """Run every case."""
    engines.PERSISTENT_ELEMENTS = 1000  # so that weights come and go in small networks too
    engines.LIVE_ELEMENTS = engines.PREFETCH_ELEMENTS = 20_000
    ema.GATHER_ELEMENTS = 500_000
    with process_group() as world:
        torch.set_num_threads(1)
        results: dict[str, Any] = {}
        plain: dict[str, tuple[Mapping[str, nn.Module], list[Expected]]] = {}
        for case in cases(world.size, soak):
            if case.method not in plain:
                settings = method_settings(case, folder)
                nets = build_nets(settings)
                plain[case.method] = nets, train_plainly(settings, nets, train_config(case, world.size))
            results[case.name] = run_case(case, folder, *plain[case.method], world)

            if world.is_main:
                print(case.name, results[case.name], flush=True)
        (folder / f"rank-{world.rank}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[1] == "soak")
