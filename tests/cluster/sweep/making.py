"""Sweeps and journals made in memory."""

from __future__ import annotations

from cluster.sweep.config import SweepConfig
from cluster.sweep.journal import digest

SPACE = {
    "method.hmi.weight": {"loguniform": [0.01, 1.0]},
    "train.base_learning_rate": {"choice": [1e-3, 4e-3]},
}
SEEDS = {"train.seed": {"grid": [0, 1, 2]}}
METRIC = {"kind": "high_band", "images": "images"}


def make_sweep(**over):
    """A sweep of demo/retmae that asks for nothing on disk."""
    data = {"base": "demo/retmae", "space": SPACE, "metric": METRIC, "output": "runs/sweep", "num_trials": 4}
    return SweepConfig.model_validate({**data, **over})


def trial(number, values=None, parent=None, name=None):
    name = name or f"{number:03d}"
    return {
        "event": "trial",
        "trial": f"trial_{number:05d}",
        "name": name,
        "values": values or {},
        "parent": parent,
    }


def report(number, k, value, *, stopped=False, last=False, name=None, step=None):
    return {
        "event": "report",
        "trial": f"trial_{number:05d}",
        "name": name or f"{number:03d}",
        "report": k,
        "step": step or 10 * k,
        "value": value,
        "details": {"high_band": value, "n": 8.0},
        "stopped": stopped,
        "last": last,
    }


def failure(number, cause, *, final, at=1.0):
    name = f"{number:03d}"
    return {
        "event": "failure",
        "trial": f"trial_{number:05d}",
        "name": name,
        "cause": cause,
        "at": at,
        "final": final,
    }


def finished(values_and_results):
    """Records of trials that came to their end: settings -> value."""
    entries = []
    for number, (values, result) in enumerate(values_and_results):
        entries += [trial(number, values), report(number, 1, result, last=True)]
    return digest(entries)
