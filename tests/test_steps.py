"""The training step: its order of examples, its schedules and its optimiser by hand, its scan bit for bit."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pushpull_jax.losses import pixel_push_pull_loss, pseudo_huber_map, reconstruction_loss
from pushpull_jax.models.reconstructor import Reconstructor
from pushpull_jax.steps import (
    Pool,
    State,
    batch_indices,
    init_state,
    make_chunk,
    make_optimizer,
    make_step,
    mixed_batch_indices,
    training_apply,
)

SHAPE = (2, 2, 6)  # h, w, C
COUNT, BATCH = 7, 4
SETTINGS = {"learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0, "steps": 100, "weight_decay": 0.1}


# Of JAX's generators the one that compiles in half the time.
random_key = functools.partial(jax.random.key, impl="unsafe_rbg")


class Linear(nn.Module):
    """The smallest reconstructor: one matrix, and dropout if wanted."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, features, *, train=False):
        kernel = self.param("kernel", nn.initializers.normal(0.3), (features.shape[-1],) * 2)
        return nn.Dropout(self.dropout, deterministic=not train)(jnp.einsum("bhwc,cd->bhwd", features, kernel))


def squared(batch, reconstruction):
    return jnp.mean((batch["features"] - reconstruction) ** 2, axis=(1, 2, 3))


def optimizer(clip_norm=1.0, **changes):
    return make_optimizer(**(SETTINGS | changes), clip_norm=clip_norm)[0]


def examples(seed=0):
    rng = np.random.default_rng(seed)
    mask = (rng.random((COUNT, *SHAPE[:2])) < 0.3).astype(np.float32)
    return {"features": jnp.asarray(rng.normal(size=(COUNT, *SHAPE)), jnp.float32), "mask": jnp.asarray(mask)}


def rows(start, stop, *, padded_to=0):
    """Indices of steps start..stop, and rows of -1 behind them."""
    chosen = [batch_indices(3, step, batch_size=BATCH, count=COUNT) for step in range(start, stop)]
    return np.stack([*chosen, *[np.full(BATCH, -1, np.int32)] * (padded_to - len(chosen))])


def fresh_state(tx, kernel=None):
    """What `init_state` gives, without compiling it: a random kernel, or a given one."""
    kernel = np.random.default_rng(1).normal(0, 0.3, (SHAPE[-1],) * 2) if kernel is None else kernel
    parameters = {"kernel": jnp.asarray(kernel, jnp.float32)}
    return State(jnp.zeros((), jnp.int32), parameters, tx.init(parameters))


def copied(tree):
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


# A step with everything random in it.
NOISY, COSINE = Linear(dropout=0.3), {"schedule": "cosine", "warmup_steps": 3, "steps": 13}


class Noisy(NamedTuple):
    step: Callable
    chunk: Callable
    fresh: Callable


@pytest.fixture(scope="module")
def noisy():
    """That step and its chunk, compiled once for the module."""
    tx = optimizer(**COSINE)
    step = make_step(squared, training_apply(NOISY, jitter=0.5), tx)
    return Noisy(jax.jit(step), make_chunk(step), lambda: fresh_state(tx))


# Which examples.


def test_batch_indices_are_a_function_of_seed_and_step():
    one = batch_indices(3, 11, batch_size=BATCH, count=COUNT)
    np.testing.assert_array_equal(batch_indices(3, 11, batch_size=BATCH, count=COUNT), one)
    assert one.dtype == np.int32 and one.shape == (BATCH,)
    assert (batch_indices(4, 0, batch_size=8, count=50) != batch_indices(3, 0, batch_size=8, count=50)).any()


@pytest.mark.parametrize(("batch_size", "count"), [(4, 7), (7, 7), (1, 5), (5, 3), (16, 3), (6, 12), (3, 1)])
def test_each_epoch_visits_each_example_once(batch_size, count):
    # A batch may end in another epoch, or span several: the row of batches is a row of permutations.
    steps = -(-4 * count // batch_size)
    row = np.concatenate([batch_indices(5, step, batch_size=batch_size, count=count) for step in range(steps)])
    epochs = row[: 4 * count].reshape(4, count)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(count), (4, 1)))
    if count > 4:
        assert (epochs[0] != epochs[1]).any()


def test_the_order_does_not_depend_on_the_batch_size():
    small = [batch_indices(5, step, batch_size=2, count=9) for step in range(15)]
    large = [batch_indices(5, step, batch_size=10, count=9) for step in range(3)]
    np.testing.assert_array_equal(np.concatenate(small), np.concatenate(large))


# The state.


def test_a_batch_of_pools_has_its_places():
    pools = (Pool(np.arange(5), 3), Pool(np.arange(5, 12), 2), Pool(np.array([40]), 1))
    rows = np.stack([mixed_batch_indices(3, step, pools) for step in range(35)])
    assert rows.shape == (35, 6) and rows.dtype == np.int32
    # 35 steps are 21 epochs of the first pool and 10 of the second.
    for pool, drawn, visits in zip(pools, np.split(rows, [3, 5], axis=1), (21, 10, 35), strict=True):
        examples, counts = np.unique(drawn, return_counts=True)
        np.testing.assert_array_equal(examples, pool.examples)
        assert set(counts) == {visits}


def test_the_first_pool_alone_is_in_the_order_of_a_run_without_anomalies():
    for step in range(5):
        alone = batch_indices(3, step, batch_size=BATCH, count=COUNT)
        np.testing.assert_array_equal(mixed_batch_indices(3, step, [Pool(np.arange(COUNT), BATCH)]), alone)


def test_pools_of_one_size_have_orders_of_their_own():
    pools = [Pool(np.arange(50), 50), Pool(np.arange(50), 50)]
    first, second = np.split(mixed_batch_indices(3, 0, pools), 2)
    assert (first != second).any()


def test_init_state():
    one, again, other = (init_state(jax.random.key(seed), Linear(), optimizer(), SHAPE) for seed in (0, 0, 1))
    assert one.step.shape == () and one.step.dtype == jnp.int32 and one.step == 0
    assert jax.tree.map(jnp.shape, one.parameters) == {"kernel": (6, 6)}
    assert_same(one.optimizer, optimizer().init(one.parameters))
    assert_same(again, one)
    assert (other.parameters["kernel"] != one.parameters["kernel"]).any()
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), Linear(), optimizer(), SHAPE))
    kinds = lambda tree: jax.tree.map(lambda leaf: f"{leaf.shape} {leaf.dtype}", tree)  # noqa: E731
    assert kinds(shapes) == kinds(one)


# Schedules and optimiser.


def rates(**changes):
    rate = make_optimizer(**(SETTINGS | {"learning_rate": 1.0, "steps": 10} | changes), clip_norm=1.0)[1]
    return [float(rate(step)) for step in range(11)]


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("constant", 0, [1] * 11),
        ("constant", 4, [0.25, 0.5, 0.75] + [1] * 8),
        ("constant", 1, [1] * 11),
        # Eight of ten steps, then a tenth.
        ("step", 0, [1] * 8 + [0.1] * 3),
        ("step", 2, [0.5] + [1] * 7 + [0.1] * 3),
        # (1 + cos(pi t / n)) / 2 with n the steps after the warm-up; 0 after the last.
        ("cosine", 0, [(1 + np.cos(np.pi * t / 10)) / 2 for t in range(11)]),
        ("cosine", 2, [0.5, 1, *((1 + np.cos(np.pi * t / 8)) / 2 for t in range(9))]),
        # A warm-up longer than the training never ends.
        ("cosine", 20, [(t + 1) / 20 for t in range(11)]),
    ],
)
def test_schedules_by_hand(schedule, warmup_steps, expected):
    np.testing.assert_allclose(rates(schedule=schedule, warmup_steps=warmup_steps), expected, atol=1e-6)


def test_adtr_drops_at_epoch_400_of_500():
    rate = make_optimizer(**(SETTINGS | {"learning_rate": 1e-4, "schedule": "step", "steps": 500}), clip_norm=1.0)[1]
    np.testing.assert_allclose([rate(0), rate(399), rate(400), rate(499)], [1e-4, 1e-4, 1e-5, 1e-5], rtol=1e-5)


def oracle_adamw(kernel, batches, *, learning_rate, weight_decay, clip_norm):
    """Steps of AdamW on the clipped gradient of the mean squared error, in numpy and float64.

    Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, with its 0.9, 0.999 and 1e-8.
    """
    kernel, first, second, seen = kernel.astype(np.float64), 0.0, 0.0, []
    for t, features in enumerate(batches, start=1):
        x = features.astype(np.float64).reshape(-1, features.shape[-1])
        difference = x @ kernel - x
        gradient = 2 * x.T @ difference / difference.size
        norm = np.sqrt((gradient**2).sum())
        seen.append(((difference**2).mean(), norm))
        gradient *= min(1, clip_norm / norm)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        kernel = kernel - learning_rate * (update + weight_decay * kernel)
    return kernel, *np.transpose(seen)


@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
def test_steps_against_float64(clip_norm):
    data, tx = examples(), optimizer(clip_norm)
    chunk = make_chunk(make_step(squared, training_apply(Linear()), tx))
    state = fresh_state(tx)
    start = np.asarray(state.parameters["kernel"])
    indices = rows(0, 6)
    batches = [np.asarray(data["features"])[row] for row in indices]
    state, metrics = chunk(state, data, indices, random_key(1))
    kernel, losses, norms = oracle_adamw(start, batches, learning_rate=0.01, weight_decay=0.1, clip_norm=clip_norm)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], norms, rtol=1e-5)  # before it is clipped
    np.testing.assert_allclose(state.parameters["kernel"], kernel, rtol=1e-4, atol=1e-6)
    assert int(state.step) == 6


def test_the_clipped_gradient_is_what_the_optimiser_sees():
    data, tx = examples(), optimizer(clip_norm=0.01)
    state = fresh_state(tx)
    state, metrics = jax.jit(make_step(squared, training_apply(Linear()), tx))(state, data, random_key(0))
    # The first moment after one step is a tenth of the gradient, whose norm is now 0.01.
    assert metrics["gradient_norm"] > 0.01
    assert float(optax.tree.norm(state.optimizer[1][0].mu)) == pytest.approx(0.001, rel=1e-5)


def test_a_step_is_a_plain_optax_step(noisy):
    apply, tx = training_apply(NOISY, jitter=0.5), optimizer(**COSINE)
    state, key = noisy.fresh(), random_key(4)
    batch = {name: leaf[:BATCH] for name, leaf in examples().items()}

    @jax.jit
    def by_hand(parameters, optimizer_state):
        loss = lambda p: squared(batch, apply(p, batch["features"], key)).sum() / BATCH  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, optimizer_state = tx.update(gradients, optimizer_state, parameters)
        return value, optax.apply_updates(parameters, updates), optimizer_state

    value, parameters, optimizer_state = by_hand(state.parameters, state.optimizer)
    new, metrics = noisy.step(state, batch, key)
    assert_close(new, State(1, parameters, optimizer_state), rtol=1e-5, atol=1e-7)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)


# The scan.


def run_in_chunks(chunk, state, data, size, total=13):
    metrics = []
    for start in range(0, total, size):
        stop = min(start + size, total)
        state, values = chunk(state, data, rows(start, stop, padded_to=size), random_key(2))
        metrics.append(jax.tree.map(lambda leaf: np.asarray(leaf)[: stop - start], values))  # noqa: B023
    return copied(state), jax.tree.map(lambda *parts: np.concatenate(parts), *metrics)


def test_chunks_of_any_size_give_the_same_bits(noisy):
    _, chunk, fresh = noisy
    expected = run_in_chunks(chunk, fresh(), examples(), 1)
    assert int(expected[0].step) == 13 and np.ptp(expected[1]["loss"]) > 0
    for size in (3, 5):  # the last of each has rows that are not run
        assert_same(run_in_chunks(chunk, fresh(), examples(), size), expected)


def test_a_chunk_is_its_steps_one_by_one(noisy):
    data, state, losses = examples(), noisy.fresh(), []
    for row in rows(0, 5):
        # The key of a step is folded with its number.
        key = jax.random.fold_in(random_key(2), state.step)
        state, metrics = noisy.step(state, {name: leaf[row] for name, leaf in data.items()}, key)
        losses.append(metrics["loss"])
    new, metrics = noisy.chunk(noisy.fresh(), data, rows(0, 5), random_key(2))
    assert_same(metrics["loss"], np.stack(losses))
    assert_same(new, state)


@pytest.mark.slow
def test_a_transformer_in_chunks_gives_the_same_bits():
    model = Reconstructor(width=8, encoder_layers=1, decoder_layers=1, heads=2, hidden=8, dropout=0.1)
    tx = optimizer()
    chunk = make_chunk(make_step(squared, training_apply(model, jitter=0.1), tx))
    fresh = [init_state(jax.random.key(0), model, tx, SHAPE) for _ in range(2)]
    one, other = (run_in_chunks(chunk, state, examples(), size, 4) for state, size in zip(fresh, (1, 3), strict=True))
    assert_same(one, other)


def test_masked_rows_do_nothing(noisy):
    _, chunk, fresh = noisy
    state, _ = chunk(fresh(), examples(), rows(0, 3), random_key(2))
    before = copied(state)
    after, _ = chunk(state, examples(), np.full((3, BATCH), -1, np.int32), random_key(2))
    assert int(before.step) == 3
    assert_same(after, before)


def test_the_loss_is_traced_once():
    traces = []

    def loss(batch, reconstruction):
        traces.append(batch["features"].shape)
        return squared(batch, reconstruction)

    tx = optimizer()
    chunk = make_chunk(make_step(loss, training_apply(Linear()), tx))
    state, data, key = fresh_state(tx), examples(), random_key(0)
    state, _ = chunk(state, data, rows(0, 3), key)
    traced = len(traces)
    assert set(traces) == {(BATCH, *SHAPE)}
    for start in (3, 6, 9):
        state, _ = chunk(state, data, rows(start, start + 2, padded_to=3), key)
    assert len(traces) == traced and chunk._cache_size() == 1
    # A state that comes back from a checkpoint is a tree of numpy arrays on their way to the device.
    chunk(jax.device_put(copied(state)), data, rows(12, 15), key)
    assert len(traces) == traced


def test_the_state_is_donated_and_the_examples_are_not(noisy):
    _, chunk, fresh = noisy
    state, data = fresh(), examples()
    new, _ = chunk(state, data, rows(0, 3), random_key(2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, data)))


# Losses.


def test_a_loss_of_ones_own_sees_the_whole_batch():
    def loss(batch, reconstruction):
        return pixel_push_pull_loss(pseudo_huber_map(batch["features"], reconstruction), batch["mask"], alpha=0.5)

    tx, data = optimizer(), examples()
    chunk = make_chunk(make_step(loss, training_apply(Linear()), tx))
    kernel = np.asarray(fresh_state(tx).parameters["kernel"])
    state, metrics = chunk(fresh_state(tx), data, rows(0, 3), random_key(0))
    # Eq. 6 and 7 of the batch that the row names, in float64.
    features, mask = (np.asarray(data[name], np.float64)[rows(0, 1)[0]] for name in ("features", "mask"))
    phi = np.sqrt(np.abs(features - features @ kernel).mean(-1) ** 2 + 1) - 1
    pull = ((1 - mask) * phi).mean((1, 2))
    push = [-0.5 * np.log(-np.expm1(-(m * p).mean())) if m.any() else 0 for m, p in zip(mask, phi, strict=True)]
    assert float(metrics["loss"][0]) == pytest.approx(np.mean(pull + push), rel=1e-5)
    normal = data | {"mask": jnp.zeros_like(data["mask"])}
    pulled, _ = chunk(fresh_state(tx), normal, rows(0, 3), random_key(0))
    assert (state.parameters["kernel"] != pulled.parameters["kernel"]).any()


@pytest.mark.parametrize(
    "loss",
    [
        squared,
        lambda batch, r: reconstruction_loss(batch["features"], r),
        lambda batch, r: jnp.mean(pseudo_huber_map(batch["features"], r), axis=(-2, -1)),
        lambda batch, r: pixel_push_pull_loss(pseudo_huber_map(batch["features"], r), batch["mask"]),
    ],
)
def test_perfect_reconstruction_leaves_everything_finite(loss):
    tx, data = optimizer(), examples()
    state = fresh_state(tx, np.eye(SHAPE[-1]))
    new, metrics = jax.jit(make_step(loss, training_apply(Linear()), tx))(state, data, random_key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((new, metrics)))
    assert float(metrics["gradient_norm"]) == 0


# Noise on the input.


class Identity(nn.Module):
    @nn.compact
    def __call__(self, features, *, train=False):
        assert train
        return features


def test_jitter_fits_the_size_of_each_cell():
    # Cells of very different norm; of 4,096 channels the norm of the noise is 0.2 of it to about 1 %.
    sizes = np.float32([[1e-3, 1.0], [50.0, 0.0]])
    features = np.random.default_rng(0).normal(size=(3, 2, 2, 4096)).astype(np.float32) * sizes[None, :, :, None]
    apply = jax.jit(training_apply(Identity(), jitter=0.2))
    noise = np.asarray(apply({}, features, random_key(0))) - features
    ratio = np.linalg.norm(noise, axis=-1) / np.maximum(np.linalg.norm(features, axis=-1), 1e-9)
    np.testing.assert_allclose(ratio, np.broadcast_to([[0.2, 0.2], [0.2, 0.0]], ratio.shape), rtol=0.05)
    assert abs(noise[:, 1, 0].mean() / noise[:, 1, 0].std()) < 0.03
    np.testing.assert_array_equal(apply({}, features, random_key(0)) - features, noise)
    assert (np.asarray(apply({}, features, random_key(1))) - features != noise).any()
    # Examples of one batch do not share their noise.
    assert (noise[0] != noise[1]).any()


def test_no_jitter_is_exact():
    features = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    for apply in (training_apply(Identity()), training_apply(Identity(), jitter=0.0)):
        np.testing.assert_array_equal(jax.jit(apply)({}, features, random_key(0)), features)


def test_the_target_has_no_jitter():
    # With the identity for a reconstructor the loss is that of the noise alone: 0.2^2 times the mean square.
    data, tx = {"features": jnp.full((4, 8, 8, 64), 3.0)}, optimizer()
    state = fresh_state(tx, np.eye(64))
    step = jax.jit(make_step(squared, training_apply(Linear(), jitter=0.2), tx))
    _, metrics = step(state, data, random_key(0))
    assert float(metrics["loss"]) == pytest.approx(0.2**2 * 9, rel=0.05)


def test_dropout_is_on_and_follows_the_key():
    features = jnp.ones((2, *SHAPE))
    apply = jax.jit(training_apply(Linear(dropout=0.5)))
    outputs = [np.asarray(apply({"kernel": jnp.eye(6)}, features, random_key(seed))) for seed in (0, 0, 1)]
    assert set(np.unique(outputs[0])) == {0, 2}  # kept values are divided by the rate of keeping
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert (outputs[0] != outputs[2]).any()
