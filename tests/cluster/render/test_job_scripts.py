"""Job scripts run by a real shell; `srun`, `scontrol` and `frepa` stand in and write down their arguments.

How they do on Slurm itself: RELIABILITY.md, "Once by hand".
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cluster.render.settings import LaunchConfig
from shards.support.settings import apply_overrides
from tests.cluster.render.test_files import render
from tests.cluster.render.test_quoting import HOSTILE

# a stand-in writes its name and arguments to CALLS, then does as its own variable says
STAND_IN = """#!/bin/bash
printf '%s\\n' "$(basename "$0") $*" >> "$CALLS"
printf '%s\\0' "$@" > "$CALLS.$(basename "$0")"
"""
SCONTROL = 'if [ "$1" = show ]; then echo localhost; fi\n'


def script(
    tmp_path: Path, name: str, stand_ins: dict[str, str], **settings: object
) -> tuple[list[str], dict]:
    """A job script, and the environment in which its programs are stand-ins."""
    config = LaunchConfig.model_validate({"slurm": {"environment": None}, **settings})
    path = tmp_path / name
    path.write_text(render(config, "slurm")[name])
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for program, does in {"scontrol": SCONTROL, **stand_ins}.items():
        (programs / program).write_text(STAND_IN + does)
        (programs / program).chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
    }
    return ["bash", str(path)], environment


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("code", "requeue", "again"), [(0, True, False), (75, True, True), (75, False, False), (3, True, False)]
)
def test_a_job_that_was_stopped_is_queued_again(tmp_path, code, requeue, again):
    command, environment = script(
        tmp_path, "pretrain.sbatch", {"srun": f"exit {code}"}, slurm={"environment": None, "requeue": requeue}
    )
    assert subprocess.run(command, env=environment, check=False).returncode == code
    assert ("scontrol requeue 7" in calls(tmp_path)) == again


def test_the_ranks_are_started_with_what_was_asked_for(tmp_path):
    pretrain = {"output": HOSTILE, "overrides": [f"data.cache_dir={HOSTILE}"]}
    command, environment = script(
        tmp_path,
        "pretrain.sbatch",
        {"srun": 'printf %s "$ODD" > "$CALLS.odd"'},
        pretrain=pretrain,
        env={"ODD": HOSTILE},
    )
    subprocess.run(command, env=environment, check=True)
    words = (tmp_path / "calls.srun").read_bytes().decode().split("\0")[:-1]
    assert words[words.index("frepa") :][:3] == ["frepa", "pretrain", "--or-resume"]
    output, root, given = words[-5::2]
    assert apply_overrides({}, [output]) == {"output": f"/shared/frepa/{HOSTILE}"}  # read as YAML
    assert (root, given) == ("data.root=s3://datasets/retina", f"data.cache_dir={HOSTILE}")
    assert (tmp_path / "calls.odd").read_text() == HOSTILE


@pytest.mark.parametrize("name", ["sweep.sbatch", "shards.sbatch"])
@pytest.mark.parametrize(("asked", "code"), [(True, 75), (False, 0), (False, 5)])
def test_work_on_ray_is_ended_in_time_and_queued_again(tmp_path, name, asked, code):
    ends = f"trap 'exit {code}' TERM; for _ in {{1..100}}; do sleep 0.05; done" if asked else f"exit {code}"
    stand_ins = {"srun": "exec sleep 20", "python": "", "frepa": ends}
    command, environment = script(tmp_path, name, stand_ins)
    begin = time.monotonic()
    with subprocess.Popen(command, env=environment) as job:
        if asked:
            while not (tmp_path / "calls.frepa").exists():
                time.sleep(0.02)
            job.send_signal(signal.SIGUSR1)
        assert job.wait(15) == code
    assert time.monotonic() - begin < 4, "neither the work nor Ray is waited for to its own end"
    assert ("scontrol requeue 7" in calls(tmp_path)) == asked
    (work,) = (call for call in calls(tmp_path) if call.startswith("frepa"))
    assert "127.0.0.1:20007" in work
