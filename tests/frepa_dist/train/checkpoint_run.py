"""Started on each rank by checkpoint/test_save.py: runs of RetMAE, and of a method with a discriminator.

checkpoint_run.py CASE DATASET FOLDER, where CASE is
all     what one start of two ranks can show; leaves FOLDER/result.json
go-on   go on with FOLDER/moved to the step in FOLDER/until
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import pytest
import torch
import torch.distributed as dist

from frepa_dist.config import RunConfig
from frepa_dist.methods.registry import METHODS
from frepa_dist.runs import find_checkpoint, list_checkpoints, read_json_lines
from frepa_dist.train.checkpoint import newest_intact, write
from frepa_dist.train.checkpoint.files import TensorReader
from frepa_dist.train.checkpoint.pieces import engine_parts
from frepa_dist.train.engines import World, process_group
from frepa_dist.train.loop import Trainer
from shards.support.errors import DataError, DivergedError, EnvironmentFault
from tests.frepa_dist.train.adversarial_method import Pair, PairConfig
from tests.frepa_dist.train.small_runs import create_trainer, make_config, with_train

STEPS = 6
STAGES = (0, 1, 2, 3)


def make_run(dataset: Path, output: Path, **changes: Any) -> RunConfig:
    """A small RetMAE; changes are of `train`."""
    model = {"size": "tiny", "image_size": 64}
    method = {"name": "retmae", "model": model, "hmi": {"warmup_fraction": 0.0}}
    train = {"steps": STEPS, "precision": "fp32", "base_learning_rate": 0.1, **changes}
    return make_config(dataset, output, method, **train)


def pair(config: RunConfig) -> RunConfig:
    """A student and a discriminator: all that every ZeRO stage can hold."""
    return config.model_copy(update={"method": PairConfig(rests_before=1)})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with TensorReader(folder) as reader:
        return {name: reader.read(name, reader.numel(name)).clone() for name in reader.names()}


class Cases:
    """What is tried; all ranks do the same."""

    def __init__(self, dataset: Path, folder: Path, world: World) -> None:
        self.dataset, self.folder, self.world = dataset, folder, world
        self.result: dict[str, Any] = {}

    def trainer(self, config: RunConfig) -> Trainer:
        return create_trainer(config, self.world)

    def whole_run(self) -> None:
        """An uninterrupted run, of which `moved` is a copy as it was after step 2."""
        run = self.folder / "whole"
        self.trainer(make_run(self.dataset, run, keep_checkpoints=9)).run()
        dist.barrier()
        if self.world.is_main:
            moved = self.folder / "moved"
            shutil.copytree(run, moved, ignore=shutil.ignore_patterns("step-00000004", "step-00000006"))
        dist.barrier()

    def other_stages(self) -> None:
        """Restored in any stage and saved at once, a checkpoint holds the same numbers."""
        for precision in ("fp32", "bf16"):
            config = pair(make_run(self.dataset, self.folder / f"pair-{precision}", precision=precision))
            self.trainer(config).run()
            source = find_checkpoint(config.output)
            expected = tensors(source)
            for stage in STAGES:
                again = with_train(config, zero_stage=stage)
                trainer = self.trainer(again)
                trainer.resume(source)
                trainer.save()
                trainer.checkpoints.finish()
                found = tensors(source)
                key = f"{precision}-{stage}"
                different = [
                    name
                    for name in expected
                    if not name.startswith("random/") and not torch.equal(expected[name], found[name])
                ]
                self.result[f"stage-{key}"] = [
                    *different,
                    *sorted(expected.keys() ^ found.keys()),
                    *self.not_following(trainer),
                ]
        self.result["names"] = sorted(expected)

    def not_following(self, trainer: Trainer) -> list[str]:
        """Weights that the student computes with that are not its master weights, rounded."""
        student = trainer.submodules.student
        from deepspeed.runtime.zero import GatheredParameters

        wrong = []
        stored = tensors(find_checkpoint(trainer.run_dir))
        parameters = dict(student.module.named_parameters())
        for name in engine_parts(student).shapes():
            parameter = parameters[name]
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                master = stored[f"student/master/{name}"].to(parameter.dtype)
                if not torch.equal(parameter.detach().reshape(-1).cpu(), master):
                    wrong.append(f"weight of {name}")
        return wrong

    def full_disk(self) -> None:
        """Rank 1's disk fills up for a while, and then for good."""
        config = make_run(self.dataset, self.folder / "full", checkpoint_every=1, checkpoint_failures=3)
        trainer = self.trainer(config)
        whole = write.write_bytes
        failing: set[int] = {3, 4}

        def write_bytes(path: Path, parts: Any) -> Any:
            if trainer.world.rank == 1 and int(path.parent.name[-8:]) in failing:
                path.write_bytes(b"torn")
                raise OSError(28, "No space left on device")
            return whole(path, parts)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(write, "write_bytes", write_bytes)
            trainer.run()
            self.result["disk passes"] = self.left(config)
            failing |= set(range(100))
            for step in (7, 8, 9):
                trainer.step = step
                trainer.save()
            self.result["disk stays"] = self.caught(EnvironmentFault, trainer.save)
            self.result["disk left"] = self.left(config)
            trainer.save()
            self.result["disk at the end"] = self.caught(EnvironmentFault, trainer.checkpoints.finish)

    def not_finite(self) -> None:
        config = make_run(self.dataset, self.folder / "nan", steps=2)
        trainer = self.trainer(config)
        trainer.run()
        for hold in engine_parts(trainer.submodules.student).holds[:1]:
            if self.world.rank == 1:  # alone
                hold.of(hold.holder)[0] = torch.nan
        trainer.step = 3
        trainer.save()
        self.result["not finite"] = self.caught(DivergedError, trainer.checkpoints.finish)
        self.result["not finite left"] = self.left(config)

    def caught(self, kind: type[Exception], action: Callable[[], Any]) -> list[str]:
        """What every rank was told."""
        try:
            action()
            text = "nothing"
        except kind as error:
            text = str(error)
        texts: list[Any] = [None] * self.world.size
        dist.all_gather_object(texts, text)
        return texts

    def left(self, config: RunConfig) -> dict[str, Any]:
        dist.barrier()
        return {
            "steps": [int(folder.name[5:]) for folder in list_checkpoints(config.output)],
            "folders": sorted(path.name for path in (config.output / "checkpoints").iterdir()),
            "events": [
                (event["event"], event["step"]) for event in read_json_lines(config.output / "events.jsonl")
            ],
        }

    def other_model(self) -> None:
        """A checkpoint of a smaller network is refused by all."""
        source = find_checkpoint(self.folder / "pair-fp32")
        config = make_run(self.dataset, self.folder / "whole")
        trainer = self.trainer(config)
        from frepa_dist.train.checkpoint.pieces import restore_submodules

        with TensorReader(source) as reader:
            self.result["other model"] = self.caught(
                DataError, lambda: restore_submodules(trainer.submodules, reader)
            )

    def waiting(self) -> None:
        """How long training waits while each write takes a second more."""
        config = make_run(self.dataset, self.folder / "slow", checkpoint_every=1, steps=2)
        trainer = self.trainer(config)
        whole = write.write_bytes

        def write_bytes(path: Path, parts: Any) -> Any:
            time.sleep(1)
            return whole(path, parts)

        trainer.run()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(write, "write_bytes", write_bytes)
            before = trainer.checkpoints.waited_seconds
            trainer.step = 3
            trainer.save()
            self.result["waited"] = trainer.checkpoints.waited_seconds - before
            for parameter in trainer.submodules.plain["teacher_critic"].module.parameters():
                parameter.data.fill_(7)  # training goes on
            trainer.checkpoints.finish()
        stored = tensors(find_checkpoint(config.output, 3))
        names = [name for name in stored if name.startswith("teacher_critic/master/")]
        self.result["torn in time"] = [name for name in names if bool((stored[name] == 7).all())]
        self.result["critic"] = names


def go_on(dataset: Path, folder: Path, world: World) -> None:
    """Go on with a run on as many ranks as there are now, and stop after the step in FOLDER/until."""
    until = int((folder / "until").read_text())
    stage = 0 if world.size == 1 else 3
    config = make_run(dataset, folder / "moved", keep_checkpoints=9, zero_stage=stage)
    trainer = create_trainer(config, world)
    found = newest_intact(config.output)
    assert found is not None
    trainer.resume(found)
    save = trainer.save

    def stop() -> None:
        save()
        if trainer.step == until:
            trainer.checkpoints.finish()
            raise KeyboardInterrupt

    trainer.save = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def main(case: str, dataset: Path, folder: Path) -> None:
    METHODS["pair"] = Pair
    with process_group() as world:
        torch.set_num_threads(1)
        if case == "go-on":
            go_on(dataset, folder, world)
            return
        cases = Cases(dataset, folder, world)
        cases.whole_run()
        cases.other_stages()
        cases.other_model()
        cases.full_disk()
        cases.not_finite()
        cases.waiting()
        (folder / f"result-{world.rank}.json").write_text(json.dumps(cases.result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
