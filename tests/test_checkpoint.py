"""Checkpoints: what is saved comes back bit for bit, the newest few are kept, and what does not fit is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def restore(folder, like):
    with Checkpoints(folder, create=False) as checkpoints:
        return checkpoints.restore(like)


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


def test_a_damaged_checkpoint(tmp_path):
    save(tmp_path, state_of(3))
    (metadata,) = tmp_path.rglob("_METADATA")
    metadata.write_bytes(metadata.read_bytes()[:100])
    with pytest.raises(InputError, match="3: cannot be restored"):
        restore(tmp_path, state_of(0))
