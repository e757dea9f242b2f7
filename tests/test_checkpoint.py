"""Checkpoints: what is saved comes back bit for bit, the newest few are kept, and what does not fit is refused.

What is damaged is passed over and named, and what cannot be written is said.
"""

import contextlib
import logging
import resource
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.errors import InputError
from pushpull_jax.steps import State, make_optimizer

OPTIMIZER, _ = make_optimizer(
    learning_rate=0.1, schedule="cosine", warmup_steps=2, steps=9, weight_decay=1e-4, clip_norm=1.0
)


def state_of(step, *, shapes=(("a", (3, 4)), ("b", (5,))), tx=OPTIMIZER):
    """A state after a step of the optimiser, so that every leaf of it is a number of its own."""
    rng = np.random.default_rng(step)
    parameters, gradients = ({name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes} for _ in "pg")
    _, optimizer_state = tx.update(gradients, tx.init(parameters), parameters)
    return State(jnp.asarray(step, jnp.int32), {"layer": parameters}, optimizer_state)


def save(folder, *states, keep=None):
    with Checkpoints(folder, keep=keep) as checkpoints:
        for state in states:
            checkpoints.save(state)


def restore(folder, like, **which):
    with Checkpoints(folder, create=False) as checkpoints:
        return checkpoints.restore(like, **which)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def kept(folder):
    return sorted(int(entry.name) for entry in folder.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with states 2 and 10."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, state_of(2), state_of(10))
    return folder


def test_the_newest_state_comes_back_bit_for_bit(saved):
    # 10 is newer than 2, though it sorts before it as text.
    restored = restore(saved, state_of(0))
    assert_same(restored, state_of(10))
    assert isinstance(restored, State) and int(restored.step) == 10


def test_the_state_of_a_step(saved):
    assert_same(restore(saved, state_of(0), step=2), state_of(2))
    with pytest.raises(InputError, match="there is no checkpoint of step 3$"):
        restore(saved, state_of(0), step=3)


def test_an_abstract_state_is_enough(saved):
    assert_same(restore(saved, jax.eval_shape(lambda: state_of(0))), state_of(10))


def test_latest(tmp_path, saved):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(state_of(4))
        assert checkpoints.latest == 4
    with Checkpoints(saved, create=False) as checkpoints:
        assert checkpoints.latest == 10


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path / "two", *(state_of(step) for step in (1, 2, 3, 11)), keep=2)
    assert kept(tmp_path / "two") == [3, 11]
    save(tmp_path / "two", state_of(12), keep=2)
    assert kept(tmp_path / "two") == [11, 12]


def test_without_a_limit_all_are_kept(saved):
    assert kept(saved) == [2, 10]


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("runs/one/checkpoints"), state_of(7))
    assert kept(tmp_path / "runs/one/checkpoints") == [7]
    assert_same(restore(Path("runs/one/checkpoints"), state_of(0)), state_of(7))


def test_a_folder_that_was_moved(tmp_path):
    save(tmp_path / "here", state_of(7))
    (tmp_path / "here").rename(tmp_path / "there")
    assert_same(restore(tmp_path / "there", state_of(0)), state_of(7))


def test_the_next_step_may_take_the_memory_of_a_saved_state(tmp_path):
    state = state_of(5)
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2 + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for _ in range(3):
            state = advance(state)
    assert_same(restore(tmp_path, state_of(0)), state_of(5))


def test_a_saved_numpy_state_may_be_changed(tmp_path):
    state = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state_of(5))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for leaf in jax.tree.leaves(state):
            leaf[...] = 0
    assert_same(restore(tmp_path, state_of(0)), state_of(5))


def test_what_was_being_written_is_finished_when_training_stops(tmp_path):
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(5))
        raise KeyboardInterrupt
    assert_same(restore(tmp_path, state_of(0)), state_of(5))


# What does not fit.


def test_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        with pytest.raises(InputError, match=f"{name}: there is no checkpoint"):
            restore(tmp_path / name, state_of(0))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (state_of(0, shapes=(("a", (3, 4)),)), "cannot be restored"),
        (state_of(0, shapes=(("a", (3, 4)), ("b", (5,)), ("c", (1,)))), "cannot be restored"),
        (state_of(0, shapes=(("a", (3, 4)), ("x", (5,)))), "cannot be restored"),
        (state_of(0, tx=optax.sgd(0.1)), "cannot be restored"),
        (
            state_of(0, shapes=(("a", (4, 3)), ("b", (5,)))),
            r"of another shape: optimizer/1/0/mu/a \(expected \[4, 3\], got \[3, 4\]\), .*parameters/layer/a \(exp",
        ),
        (state_of(0, shapes=(("a", (3, 4)), ("b", (1,)))), r"parameters/layer/b \(expected \[1\], got \[5\]\)$"),
    ],
)
def test_another_tree(saved, like, message):
    with pytest.raises(InputError, match=message) as raised:
        restore(saved, like)
    assert str(saved / "10") in str(raised.value)


# Damage.


LARGE = (("a", (300, 400)), ("b", (5,)))  # an array that is nearly all of a file


@pytest.fixture
def two(tmp_path):
    """A folder with states 2 and 10, both with a large array."""
    save(tmp_path / "two", *(state_of(step, shapes=LARGE) for step in (2, 10)))
    return tmp_path / "two"


def files_of(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def largest_file(checkpoint):
    return max(files_of(checkpoint / "default" / "ocdbt.process_0"), key=lambda path: path.stat().st_size)


def flip(path, place):
    """Another bit at a share of a file's length."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0b100
    path.write_bytes(content)


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


DAMAGES = {
    "removed": Path.unlink,
    "emptied": lambda path: cut(path, 0),
    "truncated": lambda path: cut(path, 0.6),
    "first byte": lambda path: flip(path, 0),
    "a quarter": lambda path: flip(path, 0.25),
    "middle": lambda path: flip(path, 0.5),
    "last byte": lambda path: flip(path, 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_the_one_before_takes_the_place_of_a_damaged_one(two, tmp_path, capsys, damage):
    """Of every file: where anything of the state has gone the one before is used; else the state is what it was."""
    passed_over = set()
    for path in files_of(two / "10"):
        place, name = tmp_path / "copy", path.relative_to(two)
        shutil.copytree(two, place)
        damage(place / name)
        capsys.readouterr()
        restored, told = restore(place, state_of(0, shapes=LARGE)), capsys.readouterr().err
        assert_same(restored, state_of(int(restored.step), shapes=LARGE))
        if int(restored.step) == 2:
            passed_over.add(path.name)
            assert told.startswith(f"{place / '10'}: ") and told.endswith("; that of step 2 is used instead\n"), name
            assert told.count("\n") == 1, name
        else:
            assert (int(restored.step), told) == (10, ""), name
        shutil.rmtree(place)
    # What names the arrays, what says where they are, what holds the numbers; the very last of them may be of nothing.
    assert {"_METADATA", "manifest.ocdbt"} <= passed_over
    assert largest_file(two / "10").name in passed_over or damage is DAMAGES["last byte"]


def test_a_flipped_bit_that_orbax_restores(two, capsys):
    for place in (0.3, 0.5, 0.7):
        flip(largest_file(two / "10"), place)
    with ocp.CheckpointManager(two) as manager:  # as it is without us: other numbers, and no word of it
        like = state_of(0, shapes=LARGE)._asdict() | {"digest": np.zeros(32, np.uint8)}
        tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
        tree = manager.restore(10, args=ocp.args.StandardRestore(tree))
    tree.pop("digest")
    with pytest.raises(AssertionError, match="Arrays are not equal"):  # a bit of an exponent gives nan
        assert_same(State(**tree), state_of(10, shapes=LARGE))
    assert_same(restore(two, state_of(0, shapes=LARGE)), state_of(2, shapes=LARGE))
    assert "10: is damaged: its arrays are not those that were saved; that of step 2 is used" in capsys.readouterr().err


def test_all_are_damaged(two, capsys):
    for step in ("2", "10"):
        cut(two / step / "default" / "_METADATA", 0.5)
    with pytest.raises(InputError, match="two/10: cannot be restored"):
        restore(two, state_of(0, shapes=LARGE))
    assert capsys.readouterr().err == ""


def test_the_only_one_that_will_do_is_damaged(two):
    flip(largest_file(two / "10"), 0.5)
    with pytest.raises(InputError, match="two/10: is damaged: its arrays are not those that were saved$"):
        restore(two, state_of(0, shapes=LARGE), step=10)


def test_a_damaged_one_makes_place_for_another(two):
    flip(largest_file(two / "10"), 0.5)
    again = state_of(10, shapes=LARGE)._replace(parameters=state_of(11, shapes=LARGE).parameters)
    with Checkpoints(two) as checkpoints:
        step = int(checkpoints.restore(state_of(0, shapes=LARGE)).step)
        checkpoints.discard_after(step)
        assert (step, checkpoints.latest, kept(two)) == (2, 2, [2])
        checkpoints.save(again)
    assert kept(two) == [2, 10]
    assert_same(restore(two, state_of(0, shapes=LARGE)), again)


def test_what_a_killed_process_was_writing_is_no_checkpoint(two):
    debris = two / "12.orbax-checkpoint-tmp"
    shutil.copytree(two / "10" / "default", debris / "default.orbax-checkpoint-tmp")
    assert_same(restore(two, state_of(0, shapes=LARGE)), state_of(10, shapes=LARGE))
    assert debris.exists()  # whoever only reads leaves it: it may be in the making
    with Checkpoints(two) as checkpoints:
        assert checkpoints.latest == 10
        checkpoints.save(state_of(12, shapes=LARGE))
    assert kept(two) == [2, 10, 12]
    assert_same(restore(two, state_of(0, shapes=LARGE)), state_of(12, shapes=LARGE))


# What cannot be written.


@contextlib.contextmanager
def largest_file_allowed(size):
    """Writing beyond it fails as on a full disk (Python ignores the signal that would end the process)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_for_error(checkpoints):
    for _ in range(1000):
        checkpoints.check()
        time.sleep(0.01)


def save_another(checkpoints):
    checkpoints.save(state_of(5))


@pytest.mark.parametrize("meet", [wait_for_error, save_another, Checkpoints.close])
def test_a_write_that_fails_is_said_by_whatever_comes_next(tmp_path, capsys, monkeypatch, meet):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # both are put back
    monkeypatch.setattr(logging.getLogger("absl"), "filters", [])
    save(tmp_path, state_of(3))
    with pytest.raises(OSError, match=f"{tmp_path}: checkpoints cannot be written: .*File too large$"):
        with largest_file_allowed(200), Checkpoints(tmp_path) as checkpoints:
            checkpoints.check()
            checkpoints.save(state_of(4))
            meet(checkpoints)
    assert capsys.readouterr().err == ""
    assert_same(restore(tmp_path, state_of(0)), state_of(3))


def test_writes_that_succeed_are_not_complained_of(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state_of(step))
            checkpoints.check()
    hook, filters = sys.unraisablehook, list(logging.getLogger("absl").filters)
    save(tmp_path, state_of(3))
    assert (sys.unraisablehook, logging.getLogger("absl").filters) == (hook, filters)


def test_a_checkpoint_is_due_when_its_minutes_have_passed_since_the_last(tmp_path, monkeypatch):
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("pushpull_jax.checkpoint.time", SimpleNamespace(monotonic=lambda: clock.seconds))
    with Checkpoints(tmp_path, minutes=2.0) as checkpoints:
        clock.seconds += 119.0
        assert not checkpoints.is_due()
        clock.seconds += 1.0
        assert checkpoints.is_due()
        checkpoints.save(state_of(1))
        assert not checkpoints.is_due()
        clock.seconds += 120.0
        assert checkpoints.is_due()


def test_without_minutes_none_is_due(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.is_due()
