"""Errors for people: what was wrong, where, what is allowed, how to mend it; each with a stable exit code.

Exit codes: 0 done, 1 bug, 2 usage or configuration, 3 data, 4 training diverged, 5 environment
(disk, port, store), 75 stopped as asked.
"""

from __future__ import annotations

REQUEUE_CODE = 75
"""EX_TEMPFAIL of sysexits.h: batch systems are told to start this again."""


class FrepaError(Exception):
    """Base of every error that a user can mend; shown as one line, without a traceback.

    Args:
        what: what was wrong, as a sentence without a full stop.
        where: the file, key or object that it concerns.
        allowed: what would have been accepted.
        fix: what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: object = None, allowed: str = "", fix: str = "") -> None:
        self.what, self.where, self.allowed, self.fix = what, where, allowed, fix
        parts = [f"{where}: {what}" if where is not None else what]
        if allowed:
            parts.append(f"allowed: {allowed}")
        if fix:
            parts.append(f"to mend it: {fix}")
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the way back from a worker process, keyword arguments included."""
        return _rebuild, (type(self), self.what, self.where, self.allowed, self.fix)


def _rebuild(kind: type[FrepaError], what: str, where: object, allowed: str, fix: str) -> FrepaError:
    return kind(what, where=where, allowed=allowed, fix=fix)


class ConfigError(FrepaError):
    """A setting or an argument is unknown, malformed or contradicts another."""


class DataError(FrepaError):
    """Images, shards or checkpoints are missing, damaged or not what they claim to be."""

    exit_code = 3


class DivergedError(FrepaError):
    """Training left the finite numbers and could not be brought back."""

    exit_code = 4


class EnvironmentFault(FrepaError):
    """The machine refused: disk full, read-only folder, port in use, store unreachable."""

    exit_code = 5
