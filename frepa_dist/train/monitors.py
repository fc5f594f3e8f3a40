"""DeepSpeed's own monitors (TensorBoard, CSV, W&B, Comet), given the lines of metrics.jsonl.

Blocks of `train.deepspeed` turn them on: `csv_monitor: {enabled: true}`. Engines are not told of them: an
engine would write a loss of its own at every micro-batch, and wait for the device to know it. Files go to
RUN/monitors where a block names no `output_path`. A run that goes back to a checkpoint drops the steps after
it from CSV files, and tells TensorBoard to. Services that keep a run by themselves see such steps twice; W&B
goes on with one run where WANDB_RUN_ID and WANDB_RESUME say so.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frepa_dist.config import MONITOR_BLOCKS
from shards.stores.atomic import replace_text
from shards.support.errors import ConfigError

FOLDER = "monitors"


class Monitors:
    """Writes logged records to the monitors that a run's settings turn on; of rank 0.

    Args:
        deepspeed: `train.deepspeed`.
        run_dir: the run folder.

    Raises:
        ConfigError: a block is wrong, or a package that it needs is not installed.
    """

    def __init__(self, deepspeed: Mapping[str, Any], run_dir: Path) -> None:
        blocks = {name: dict(deepspeed[name]) for name in MONITOR_BLOCKS if deepspeed.get(name)}
        self._master: Any = None
        if any(block.get("enabled") for block in blocks.values()):
            for name in blocks.keys() & {"tensorboard", "csv_monitor"}:
                blocks[name].setdefault("output_path", str(run_dir / FOLDER))
                blocks[name].setdefault("job_name", name.removesuffix("_monitor"))
            self._master = _create_master(blocks)
            files = self._csv_files()
            if files:  # it would write a header into each once more
                self._master.csv_monitor.filenames.extend(path.stem for path in files)

    def write(self, record: Mapping[str, float]) -> None:
        """Write a line of metrics.jsonl; a disk that is full is no reason to end a run."""
        if self._master is None:
            return
        step = int(record["step"])
        try:
            self._master.write_events(
                [(name, value, step) for name, value in record.items() if name != "step"]
            )
        except OSError as error:
            print(f"frepa: the monitors of step {step} are not written: {error}", file=sys.stderr, flush=True)

    def go_back(self, step: int) -> None:
        """Drop what was written of steps after `step`: they are computed, and written, again."""
        for path in self._csv_files():
            header, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
            kept = io.StringIO()
            csv.writer(kept, lineterminator="\n").writerows(
                [header, *(row for row in rows if len(row) == len(header) and int(row[0]) <= step)]
            )
            replace_text(path, kept.getvalue())
        if self._master is not None and self._master.tb_monitor is not None:
            _restart_tensorboard(self._master.tb_monitor.summary_writer, step)

    def _csv_files(self) -> list[Path]:
        if self._master is None or self._master.csv_monitor is None:
            return []
        return sorted(Path(self._master.csv_monitor.log_dir).glob("*.csv"))


def _create_master(blocks: Mapping[str, Mapping[str, Any]]) -> Any:
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster
    from pydantic import ValidationError

    try:
        return MonitorMaster(get_monitor_config(blocks))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("train.deepspeed", *first["loc"])))
        raise ConfigError(first["msg"], where=where) from error
    except ImportError as error:
        raise ConfigError(
            f"a monitor needs a package that is not installed: {error}",
            where="train.deepspeed",
            fix=f"install '{error.name}', or leave the monitor out",
        ) from error


def _restart_tensorboard(writer: Any, step: int) -> None:
    """Have TensorBoard drop what it was told of later steps, as SummaryWriter(purge_step=...) does."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer.file_writer.add_event(Event(step=step + 1, file_version="brain.Event:2"))
    writer.file_writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
