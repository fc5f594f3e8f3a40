"""Checkpoints of a run: `Checkpoints` writes them, `load_checkpoint` goes back to one."""

from frepa_dist.train.checkpoint.folders import is_intact, newest_good, newest_intact
from frepa_dist.train.checkpoint.resume import load_checkpoint
from frepa_dist.train.checkpoint.save import Checkpoints

__all__ = ["Checkpoints", "is_intact", "load_checkpoint", "newest_good", "newest_intact"]
