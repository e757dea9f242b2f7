"""Bars on a terminal, plain lines elsewhere; what is said stands in a line of its own."""

import io
import re
import sys

import pytest

from pushpull_jax import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stderr: io.StringIO, monkeypatch) -> str:
    """What six steps in three updates, and something said, leave on stderr."""
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.progress_bar(desc="training", total=8, initial=2, unit="step") as bar:
        for _ in range(3):
            bar.set_postfix(loss="0.1", refresh=False)
            bar.update(2)
        progress.say("it is done")
    return stderr.getvalue()


@pytest.mark.parametrize(("interval", "counts"), [(0.0, [2, 4, 6, 8, 8]), (1e6, [2, 8])])
def test_a_log_has_a_line_at_most_every_interval_and_those_of_start_and_end(monkeypatch, interval, counts):
    monkeypatch.setattr(progress, "SECONDS", interval)
    text = shown(io.StringIO(), monkeypatch)
    lines = text.splitlines()
    assert "\r" not in text and lines[-2] == "it is done"
    del lines[-2]
    assert [int(re.match(r"training: step (\d) of 8, ", line)[1]) for line in lines] == counts
    assert re.search(r", 00:0\d gone, 00:00 left, [\d.]+ step/s, loss=0.1$", lines[-1])


def test_a_log_of_what_is_gone_through(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress.progress_bar(iter("abc"), desc="features", total=3, unit="batch")) == ["a", "b", "c"]
    lines = sys.stderr.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["features: batch 0 of 3", "features: batch 3 of 3"]


def test_a_terminal_has_a_bar_and_whole_lines(monkeypatch):
    text = shown(Terminal(), monkeypatch)
    assert "\rtraining:  25%|" in text and "| 2/8 [00:00<?, ?step/s]" in text
    assert "\rit is done\n" in text and "100%" in text.split("it is done\n")[1]
