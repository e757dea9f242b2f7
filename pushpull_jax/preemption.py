"""Being told to stop: SIGTERM asks a training to save its state and end, as clusters do before they take a machine.

The signal is only noted when it comes, and asked for between two chunks of steps, so that no step is ever half done.
Of several processes JAX notes it, and all of them are told after the same chunk.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

# Of the command line, when a run was preempted: EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
EXIT_CODE = 75


class Preempted(Exception):
    """A run was told to stop; its state is saved, and the same command goes on with it."""


class Notice:
    """Whether to stop.

    Attributes:
        came: the signal; of several processes, that they have agreed to stop.
    """

    def __init__(self) -> None:
        self.came, self._asked = False, 0

    def is_due(self) -> bool:
        """Whether to stop now; asked once after every chunk, by all processes."""
        self._asked += 1
        if _are_several():
            from jax.experimental import multihost_utils

            # JAX stops them where they have asked equally often.
            self.came = self.came or multihost_utils.reached_preemption_sync_point(self._asked)
        return self.came


def _are_several() -> bool:
    import jax  # not at the top: the command line needs this module at once

    return jax.process_count() > 1


@contextlib.contextmanager
def sigterm_noted() -> Iterator[Notice]:
    """While it lasts SIGTERM is noted instead of ending the process; only in the main thread, as Python has it."""
    notice = Notice()
    if threading.current_thread() is not threading.main_thread() or _are_several():
        yield notice
        return

    def note(*_: object) -> None:
        notice.came = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield notice
    finally:
        signal.signal(signal.SIGTERM, before)
