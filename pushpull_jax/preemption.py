"""Being told to stop: SIGTERM asks a program to end, as clusters do before they take a machine.

A training only notes the signal when it comes, and asks for it between two chunks of steps, so that no step is ever
half done and the state is saved; of several processes JAX notes it, and all of them are told after the same chunk.
Anything else it ends at once, as Ctrl-C does: files are written whole or not at all.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

# Of the command line, when a run was preempted: EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
EXIT_CODE = 75


class Preempted(BaseException):  # as KeyboardInterrupt, so that nobody takes it for a failure of what it came into
    """A program was told to stop, and the same command goes on with its work."""


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
def sigterm_raised() -> Iterator[None]:
    """While it lasts the first SIGTERM raises `Preempted`; others, which clusters send, must not disturb the ending."""
    is_ending = False

    def stop(*_: object) -> None:
        nonlocal is_ending
        if not is_ending:
            is_ending = True
            raise Preempted("told to stop")

    with _handled(stop):
        yield


@contextlib.contextmanager
def sigterm_noted() -> Iterator[Notice]:
    """While it lasts SIGTERM is noted instead of ending the process."""
    notice = Notice()
    if _are_several():
        yield notice
        return

    def note(*_: object) -> None:
        notice.came = True

    with _handled(note):
        yield notice


@contextlib.contextmanager
def _handled(handler: Callable[..., None]) -> Iterator[None]:
    """While it lasts SIGTERM calls a handler; only in the main thread, as Python has it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
