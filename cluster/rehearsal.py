"""A run in small: everything is built, two steps are taken, and nothing is left behind."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster.doctor import count_steps
from cluster.nodes import Nodes
from cluster.supervise import supervise
from cluster.verdict import Patience
from frepa_dist.config import MONITOR_BLOCKS, RunConfig
from frepa_dist.runs import read_metrics
from shards.support.errors import ConfigError

STEPS = 2
HOUR = 3600


def rehearse(config: str, overrides: Sequence[str], run: RunConfig, nodes: Nodes) -> int:
    """Take two steps of a run in a folder that is thrown away; return an exit code.

    Prints how long the whole run would take at the pace of the last step: a pessimistic figure where a first
    step compiles, opens files and warms up.

    Raises:
        ConfigError: there are several nodes, whose ranks would need a folder that they share.
    """
    if len(nodes.slots) > 1:
        raise ConfigError(
            "--dry-run is for one node", where="--dry-run", fix="start it on one, without options about nodes"
        )
    _, steps = count_steps(run, nodes.world_size)
    with tempfile.TemporaryDirectory(prefix="frepa-rehearsal-") as name:
        folder = Path(name) / "run"
        own = [
            f"output={folder}",
            "train.epochs=null",
            f"train.steps={STEPS}",
            f"train.checkpoint_every={STEPS}",
            "train.checkpoint_copy=null",
            "train.metrics.port=null",
            *(f"train.deepspeed.{block}=null" for block in MONITOR_BLOCKS if block in run.train.deepspeed),
            "train.log_every=1",
        ]
        sets = [part for item in (*overrides, *own) for part in ("--set", item)]
        code = supervise(["--config", config, *sets], folder, nodes, Patience(max_restarts=0))
        if code == 0:
            last = read_metrics(folder)[-1]
            hours = steps * last["time/total"] / HOUR
            print(
                f"{STEPS} steps taken: loss {last.get('loss', math.nan):.4f}, "
                f"{last['samples_per_second']:.1f} images/s, {last['time/total']:.2f} s a step of which "
                f"{last['time/data']:.2f} s wait for data; {steps} steps would take {hours:.1f} hours at "
                "this pace"
            )
    return code
