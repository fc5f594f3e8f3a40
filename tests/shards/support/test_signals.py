from __future__ import annotations

import contextlib
import os
import signal

from shards.support.signals import hearing


def test_signals_are_heard_inside_the_block_and_answered_as_before_after_it():
    outer, inner = [], []
    with hearing([signal.SIGUSR1, signal.SIGUSR2], outer.append):
        with contextlib.suppress(ZeroDivisionError), hearing([signal.SIGUSR1], inner.append):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR2)
            raise ZeroDivisionError
        os.kill(os.getpid(), signal.SIGUSR1)
    assert inner == [signal.SIGUSR1]
    assert outer == [signal.SIGUSR2, signal.SIGUSR1]
