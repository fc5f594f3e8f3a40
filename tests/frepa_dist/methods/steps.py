"""One optimizer step of a method as the loop runs it, on any cut of one global batch, without an engine."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from frepa_dist.methods.base import Losses, MethodSettings, StepInfo
from frepa_dist.methods.registry import create_method

NUM_SAMPLES = 8
LATE = StepInfo(step=90, total_steps=100, seed=7)


class ThreadComm:
    """Ranks as threads: each call waits for the others, as a collective would."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._values: dict[int, Tensor] = {}

    def _gather(self, x: Tensor) -> Tensor:
        self._values[threading.get_ident()] = x.detach().clone()
        self._barrier.wait()
        everything = torch.stack(list(self._values.values()))
        self._barrier.wait()
        self._values.pop(threading.get_ident())
        self._barrier.wait()
        return everything

    def any(self, flag: Tensor) -> Tensor:
        return self._gather(flag).any()

    def mean(self, x: Tensor) -> Tensor:
        return self._gather(x).mean(0)


def make_batch(size: int = 64, cells: int = 16) -> dict[str, object]:
    """A global batch of smooth images with some detail, half of them grey levels of a narrow range."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(NUM_SAMPLES, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    images = (smooth + 0.2 * torch.rand(NUM_SAMPLES, 3, size, size, generator=generator)) / 1.2
    images[NUM_SAMPLES // 2 :] = 0.3 + 0.3 * images[NUM_SAMPLES // 2 :]
    return {
        "image": (255 * images).to(torch.uint8),
        "window": torch.tensor([[0.0, 255.0]]).repeat(NUM_SAMPLES, 1),
        "hf_indices": torch.rand(NUM_SAMPLES, cells, generator=generator).argsort(1)[:, : max(1, cells // 4)],
        "mask_noise": torch.rand(NUM_SAMPLES, cells, generator=generator),
        "slot": torch.arange(NUM_SAMPLES),
        "draw_key": [1000 + 7 * number for number in range(NUM_SAMPLES)],
    }


def cut(batch: Mapping[str, object], start: int, stop: int) -> dict[str, object]:
    return {name: value[start:stop] for name, value in batch.items()}


def build_nets(config: MethodSettings) -> dict[str, nn.Module]:
    """The networks of a method; the critic's zero layer is filled so that it has something to say."""
    torch.manual_seed(0)
    nets = {name: spec.build() for name, spec in create_method(config).submodules().items()}
    for name, net in nets.items():
        if name.endswith("critic"):
            nn.init.normal_(net.last.weight, std=0.3)
    if "teacher" in nets:
        own = nets["teacher"].state_dict()
        assert own.keys() <= nets["student"].state_dict().keys()
        nets["teacher"].load_state_dict({k: v for k, v in nets["student"].state_dict().items() if k in own})
    return nets


@dataclass
class Step:
    """What a step left: gradients by network and parameter, losses and metrics as means over everything."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


def run_step(
    config: MethodSettings,
    nets: Mapping[str, nn.Module],
    batch: Mapping[str, object],
    world_size: int = 1,
    accumulation: int = 1,
    info: StepInfo = LATE,
    state: Mapping[str, Tensor] | None = None,
) -> Step:
    """Cut a global batch, run every rank in a thread, and average as the loop does."""
    comm, per_rank = ThreadComm(world_size), NUM_SAMPLES // world_size
    micro = per_rank // accumulation
    cuts = [[r * per_rank + m * micro for m in range(accumulation)] for r in range(world_size)]
    batches = [[cut(batch, at, at + micro) for at in rank] for rank in cuts]
    first = create_method(config)
    targets = [[first.targets(nets, b, info) for b in rank] for rank in batches]
    names = targets[0][0].keys()
    pool = {name: torch.cat([t[name] for rank in targets for t in rank]) for name in names}

    def run(rank: int) -> Step:
        own, method, step = {k: copy.deepcopy(v) for k, v in nets.items()}, create_method(config), Step()
        if state is not None:
            method.load_state_dict(state)
        opponents = [name for name, spec in method.submodules().items() if spec.kind == "opponent"]

        def note(losses: Losses) -> None:
            (losses.total / accumulation).backward()
            share = 1 / (accumulation * world_size)
            for into, values in ((step.terms, losses.terms), (step.metrics, losses.metrics)):
                for name, value in values.items():
                    into[name] = into.get(name, 0) + share * value.detach()

        for b, t in zip(batches[rank], targets[rank], strict=True):
            for name in opponents:
                own[name].requires_grad_(False)
            losses = method.losses(own, b, t, pool, info, comm)
            assert not any(value.requires_grad for value in losses.outputs.values())
            note(losses)
            for name in opponents:
                own[name].requires_grad_(True)
                opponent = method.opponent_losses(name, own, losses.outputs, info)
                if opponent is not None:
                    note(opponent)
        method.after_step(info, comm)
        step.state = method.state_dict()
        step.gradients = {
            f"{net}.{name}": p.grad / world_size
            for net, module in own.items()
            for name, p in module.named_parameters()
            if p.grad is not None
        }
        return step

    with ThreadPoolExecutor(world_size) as threads:
        steps = list(threads.map(run, range(world_size)))
    whole = Step(state=steps[0].state)
    for step in steps:
        torch.testing.assert_close(step.state, whole.state, rtol=0, atol=0)  # all ranks hold the same
        for into, values in (
            (whole.gradients, step.gradients),
            (whole.terms, step.terms),
            (whole.metrics, step.metrics),
        ):
            for name, value in values.items():
                into[name] = into.get(name, 0) + value
    return whole
