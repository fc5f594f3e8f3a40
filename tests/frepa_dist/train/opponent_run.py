"""Started on each rank by test_opponent.py: whole runs of a method with a discriminator.

FOLDER/whole, interrupted (4 steps and back to the checkpoint of 2) and compiled are run folders. Both ranks
of the first are scraped while it runs; the second has one of DeepSpeed's monitors on.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

# as frepa_dist.train does
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import torch
import torch.distributed as dist

from frepa_dist.config import RunConfig
from frepa_dist.methods.registry import METHODS
from frepa_dist.runs import find_checkpoint
from frepa_dist.train.__main__ import serve_metrics
from frepa_dist.train.engines import World, process_group
from tests.frepa_dist.train.adversarial_method import Pair, PairConfig
from tests.frepa_dist.train.small_runs import create_trainer, make_config, with_train
from tests.scraping import scrape


def scrape_all(targets: Path) -> dict[str, Any]:
    """What every process in a folder of targets shows now: labels and samples, by rank."""
    shown = {}
    for path in sorted(targets.glob("*.json")):
        (group,) = json.loads(path.read_text())
        port = int(group["targets"][0].rpartition(":")[2])
        samples = {" ".join(key): value for key, value in scrape(port).items()}
        shown[group["labels"]["rank"]] = {"labels": group["labels"], "samples": samples}
    return shown


def run_scraped(config: RunConfig, world: World, targets: Path) -> None:
    """Train while rank 0 scrapes both ranks; FOLDER/scraped.json holds all that it saw."""
    seen: list[dict[str, Any]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            seen.append(scrape_all(targets))

    with serve_metrics(config, world) as telemetry:
        trainer = create_trainer(config, world, telemetry)
        dist.barrier()  # both are there
        watcher = threading.Thread(target=watch)
        if world.is_main:
            watcher.start()
        trainer.run()
        dist.barrier()  # both have ended
        if world.is_main:
            over.set()
            watcher.join()
            seen.append(scrape_all(targets))
            (targets.parent / "scraped.json").write_text(json.dumps(seen))
        dist.barrier()


def main(dataset: Path, folder: Path) -> None:
    METHODS["pair"] = Pair
    method, targets = PairConfig(rests_before=1), folder / "targets"
    serving = {"port": 0, "targets": str(targets)}
    whole = make_config(dataset, folder / "whole", method, opponent={"zero_stage": 1}, metrics=serving)
    with process_group() as world:
        torch.set_num_threads(1)
        run_scraped(whole, world, targets)
        config = with_train(whole, deepspeed={"csv_monitor": {"enabled": True}})
        config = config.model_copy(update={"output": folder / "interrupted"})
        create_trainer(config, world).run()
        trainer = create_trainer(config, world)
        trainer.resume(find_checkpoint(config.output, 2))
        trainer.run()
        for name, is_compiled in (("compiled", True), ("eager", False)):
            short = with_train(whole, compile=is_compiled, precision="fp32", steps=2)
            create_trainer(short.model_copy(update={"output": folder / name}), world).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
