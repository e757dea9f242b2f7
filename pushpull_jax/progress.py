"""What a program says while it runs, on stderr: progress bars and single lines.

On a terminal a bar is drawn by tqdm, and lines go above it. Elsewhere, as in the log of a cluster, a bar is plain
lines: one when it starts, at most one every `SECONDS`, and one at its end.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # some hundred lines an hour
_LINE = "{desc}:{unit} {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left, {rate_noinv_fmt}{postfix}"


def progress_bar(iterable: Iterable | None = None, *, desc: str, total: int, unit: str, initial: int = 0) -> Any:
    """A bar, or lines, with count, rate and an estimate of the time left: a `tqdm.tqdm`.

    Args:
        iterable: what is gone through; without it, the caller calls `update`.
        desc: what is done.
        total: units in all.
        unit: name of one.
        initial: units that were done before.
    """
    options = {"desc": desc, "total": total, "initial": initial}
    if sys.stderr.isatty():
        return tqdm(iterable, **options, unit=unit, file=sys.stderr)
    # With miniters, tqdm asks the clock at every update, and no thread of its own looks after the bar.
    # The space of the unit stands between it and its rate.
    return tqdm(iterable, **options, unit=f" {unit}", file=_Lines(), bar_format=_LINE, mininterval=SECONDS, miniters=1)


def say(message: str) -> None:
    """A line of its own, whole beside any bar."""
    if sys.stderr.isatty():
        tqdm.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)


class _Lines:
    """A file for tqdm, which draws a bar over itself and pads its numbers: what it draws becomes a line on stderr."""

    def write(self, drawn: str) -> None:
        if line := " ".join(drawn.split()):
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()
