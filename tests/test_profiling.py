"""The profiler's trace has whole chunks of steps, those after the first; test_tensorboard.py has one of a training."""

import gzip
import json
from pathlib import Path

import jax
import pytest

from pushpull_jax.profiling import Profile


@jax.jit
def chunk(x):
    return x + 1


def traced(folder: Path) -> int:
    """Calls of a compiled function `chunk` in the one trace of a folder."""
    (trace,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    assert all(path.stat().st_size for path in trace.parent.iterdir())
    with gzip.open(trace) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    return names.count("PjitFunction(chunk)") // 2  # its way in and its way out


def train(folder: Path, *, steps: int, chunks: int) -> None:
    """A training of some chunks of two steps."""
    with Profile(folder, steps=steps) as profile:
        for number in range(1, chunks + 1):
            chunk(1.0).block_until_ready()
            profile.chunk_done(2, is_last=number == chunks)


# Three steps are in two chunks of two; the second training ends before.
@pytest.mark.parametrize(("steps", "chunks", "expected"), [(3, 5, 2), (9, 2, 1)])
def test_a_profile_has_whole_chunks_after_the_first(tmp_path, capsys, steps, chunks, expected):
    train(tmp_path, steps=steps, chunks=chunks)
    assert traced(tmp_path) == expected
    assert capsys.readouterr().err == f"profile: {tmp_path}\n"


def test_a_training_of_one_chunk_has_none_and_says_so(tmp_path, capsys):
    train(tmp_path, steps=3, chunks=1)
    assert not list(tmp_path.iterdir())
    assert "there was no chunk of steps after the first" in capsys.readouterr().err


def test_nothing_is_traced_unless_it_is_asked_for(tmp_path, capsys):
    train(tmp_path, steps=0, chunks=3)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().err


def test_a_training_that_fails_leaves_its_trace(tmp_path):
    with pytest.raises(ZeroDivisionError), Profile(tmp_path, steps=8) as profile:
        profile.chunk_done(2, is_last=False)
        chunk(1.0).block_until_ready()
        raise ZeroDivisionError
    assert traced(tmp_path) == 1
