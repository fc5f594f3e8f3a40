"""Started on each rank by test_guards.py: whole runs with faults, each a run folder in FOLDER.

guard_runs.py DATASET FIRST COUNT FOLDER; with COUNT 0 these, else `run_at_random`:

transient      a gradient breaks on one rank in step 3; the batch is skipped
without        the same batch is passed over from the start
persistent     gradients break in steps 6 and 7; the run goes back to step 4
avoiding       the batches of steps 6 and 7 are passed over from the start
broken         the critic's weights break in step 6, and stay so; the run goes back at once
late           the critic's weights break at the end of step 8, whose checkpoint is not good; as above
hopeless       the critic breaks in every step from 6 on; FOLDER/hopeless/error-R.txt says how rank R ends
spiking        the loss is far too high on one rank in step 5, and spikes are skipped
never          the same from step 2 on, before there is a checkpoint
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

# as frepa_dist.train does
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import numpy as np
import torch

from frepa_dist.config import RunConfig
from frepa_dist.methods.registry import METHODS
from frepa_dist.train.engines import World, process_group
from shards.support.errors import DivergedError
from tests.frepa_dist.train.faulty_method import FAULTS, Faulty, FaultyConfig
from tests.frepa_dist.train.small_runs import create_trainer, make_config, with_train

STEPS, LAST_GOOD, PATIENCE = 10, 4, 2
BATCHES_PER_EPOCH = 3  # of 2 samples: the dataset has 7


def place_of(step: int) -> tuple[int, int]:
    """Epoch and batch of the step of this number, from 1."""
    return divmod(step - 1, BATCHES_PER_EPOCH)


def make_run(dataset: Path, output: Path) -> RunConfig:
    train = {
        "global_batch_size": 2,
        "steps": STEPS,
        "base_learning_rate": 0.5,
        "checkpoint_every": LAST_GOOD,
        "log_keys": True,
        "guard": {"patience": PATIENCE, "most_returns": 1},
    }
    return make_config(dataset, output, FaultyConfig(), **train)


def run(
    config: RunConfig,
    world: World,
    *,
    faults: Mapping[int, str] = {},
    once: bool = True,
    passed: Iterable[int] = (),
    faulty_rank: int = 1,
) -> None:
    """Run with faults in steps of these numbers, from 1, or without the batches of `passed`.

    Args:
        config: the run.
        world: this rank.
        faults: what breaks when.
        once: whether a fault comes back when the run has gone back.
        passed: steps whose batches are passed over from the start.
        faulty_rank: where it breaks.
    """
    trainer = create_trainer(config, world)
    method = trainer.method
    assert isinstance(method, Faulty)
    method.rank, method.faulty_rank = world.rank, faulty_rank
    method.faults = {step - 1: fault for step, fault in faults.items()}
    trainer.ledger.passed |= {place_of(step) for step in passed}
    if config.train.guard.skip_spikes:
        trainer.ledger.losses.extend([1.0, 1.1] * 10)  # as if it had run for longer
    go_back = trainer._go_back

    def going_back() -> int:
        if once:
            method.faults = {}
        return go_back()

    trainer._go_back = going_back  # type: ignore[method-assign]
    try:
        trainer.run()
    except DivergedError as error:
        (config.output / f"error-{world.rank}.txt").write_text(str(error))


def run_all(dataset: Path, folder: Path, world: World) -> None:
    """Each case once."""
    always = dict.fromkeys(range(1, STEPS + 1), "critic_weight")

    def config(name: str) -> RunConfig:
        return make_run(dataset, folder / name)

    run(config("transient"), world, faults={3: "student_gradient"})
    run(config("without"), world, passed=[3])
    run(config("persistent"), world, faults={6: "batch", 7: "critic_gradient"})
    run(config("avoiding"), world, passed=[6, 7])
    run(config("broken"), world, faults={6: "critic_weight"})
    run(config("late"), world, faults={8: "critic_late"})
    late = {step: fault for step, fault in always.items() if step >= 6}
    run(config("hopeless"), world, faults=late, once=False)
    run(with_train(config("spiking"), guard={"skip_spikes": True}), world, faults={5: "spike"})
    run(config("never"), world, faults={2: "critic_weight"}, once=False)


def run_at_random(dataset: Path, folder: Path, world: World, repeats: range) -> None:
    """Faults of any kind but lasting ones in random steps, on a random rank, in every ZeRO stage in turn.

    FOLDER/faulty-N and without-N: the same run without the batches.
    """
    kinds = [fault for fault in FAULTS if fault != "critic_weight"]
    for repeat in repeats:
        draws = np.random.default_rng(repeat)
        steps = sorted(draws.choice(np.arange(2, STEPS), size=2, replace=False).tolist())
        faults = {step: kinds[draws.integers(len(kinds))] for step in steps}
        changes = {"zero_stage": repeat % 4, "precision": ("fp32", "bf16")[repeat // 4 % 2]}
        rank = int(draws.integers(world.size))
        for name, own in (("faulty", {"faults": faults}), ("without", {"passed": steps})):
            config = with_train(make_run(dataset, folder / f"{name}-{repeat}"), **changes, guard={})
            run(config, world, faulty_rank=rank, **own)


def main(dataset: Path, repeats: range, folder: Path) -> None:
    METHODS["faulty"] = Faulty
    with process_group() as world:
        torch.set_num_threads(1)
        if repeats:
            run_at_random(dataset, folder, world, repeats)
        else:
            run_all(dataset, folder, world)


if __name__ == "__main__":
    first, count = int(sys.argv[2]), int(sys.argv[3])
    main(Path(sys.argv[1]), range(first, first + count), Path(sys.argv[4]))
