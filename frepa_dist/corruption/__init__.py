"""Corruptions of whole images: those of Frepa, and the controls beside them."""

from frepa_dist.corruption.batch import Corrupted, corrupt
from frepa_dist.corruption.plan import CorruptionConfig, KindName, Mode

__all__ = ["Corrupted", "CorruptionConfig", "KindName", "Mode", "corrupt"]
