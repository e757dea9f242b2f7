"""The compiled training step: state, one step, and a scan of steps over features that stay on the device.

A loss is any function of a batch and its reconstruction that gives one value an example; a batch is a dict of arrays
whose leading axis is the example, "features" [B,h,w,C] among them. Order and noise are functions of (seed, step), so
that a resumed run continues exactly.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pushpull_jax.mesh import replicate
from pushpull_jax.precision import MatmulPrecision, matmul_precision

Batch = dict[str, jax.Array]
LossFunction = Callable[[Batch, jax.Array], jax.Array]
ApplyFunction = Callable[[Any, jax.Array, jax.Array], jax.Array]


# Of a batch that was filled up to be spread over devices: 1 for an example, 0 for what only fills it.
WEIGHT = "weight"

# What a step tells of itself, float32 scalars.
METRICS = ("loss", "gradient_norm")


class State(NamedTuple):
    """All that training changes: steps done, parameters of the reconstructor, state of the optimiser."""

    step: jax.Array
    parameters: Any
    optimizer: Any


def make_optimizer(
    *,
    learning_rate: float,
    schedule: Literal["constant", "cosine", "step"],
    warmup_steps: int,
    steps: int,
    weight_decay: float,
    clip_norm: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW on a clipped gradient, and its schedule: linear warm-up, then constant, cosine to 0, or one drop.

    "step" multiplies by 0.1 at four fifths of the steps (ADTR: at epoch 400 of 500).
    """
    after = max(steps - warmup_steps, 1)
    main = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, after),
        "step": optax.piecewise_constant_schedule(learning_rate, {max(steps * 4 // 5 - warmup_steps, 1): 0.1}),
    }[schedule]
    warmup = optax.linear_schedule(learning_rate / max(warmup_steps, 1), learning_rate, max(warmup_steps - 1, 1))
    rate = optax.join_schedules([warmup, main], [warmup_steps]) if warmup_steps else main
    return clipped_adamw(rate, weight_decay=weight_decay, clip_norm=clip_norm), rate


def learning_rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """The learning rate of each step, [steps] float32."""
    return np.broadcast_to(np.asarray(schedule(np.arange(steps)), np.float32), (steps,))


def clipped_adamw(
    rate: optax.Schedule, *, weight_decay: jax.Array | float, clip_norm: jax.Array | float
) -> optax.GradientTransformation:
    """AdamW on a gradient whose global norm is at most `clip_norm`; all three may be traced."""
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(rate, weight_decay=weight_decay))


def init_state(
    key: jax.Array,
    reconstructor: nn.Module,
    optimizer: optax.GradientTransformation,
    features_shape: tuple[int, ...],
    *,
    mesh: Mesh | None = None,
) -> State:
    """A fresh state for features of a shape [h,w,C], born on every device of a mesh, or on the one of the key."""

    def init(key: jax.Array) -> State:
        parameters = reconstructor.init(key, jnp.zeros((1, *features_shape)))["params"]
        return State(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))

    if mesh is None:
        return jax.jit(init)(key)
    return jax.jit(init, out_shardings=NamedSharding(mesh, P()))(replicate(key, mesh))


def training_apply(
    reconstructor: nn.Module, *, jitter: jax.Array | float = 0.0, precision: MatmulPrecision | None = None
) -> ApplyFunction:
    """How training applies a reconstructor: dropout on, Gaussian noise on the input features.

    The noise has a norm of `jitter` times the norm of the features of that cell, so that it fits any scale (UniAD). A
    jitter that is traced may be 0 too; one that is just 0.0 draws nothing. Products have a precision, or the caller's.
    """
    is_jittered = isinstance(jitter, jax.Array) or jitter > 0

    def apply(parameters: Any, features: jax.Array, key: jax.Array) -> jax.Array:
        noise_key, dropout_key = jax.random.split(key)
        if is_jittered:
            size = jnp.sqrt(jnp.mean(features**2, axis=-1, keepdims=True))
            features = features + jitter * size * jax.random.normal(noise_key, features.shape)
        with matmul_precision(precision):
            return reconstructor.apply({"params": parameters}, features, train=True, rngs={"dropout": dropout_key})

    return apply


def make_step(
    loss_fn: LossFunction, apply_fn: ApplyFunction, optimizer: optax.GradientTransformation
) -> Callable[[State, Batch, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """One optimisation step as a pure function (state, batch, key) -> (state, a dict of METRICS).

    A step whose loss or gradient is not finite is not applied: the state stays as it was, its count of steps too.

    Args:
        loss_fn: (batch, reconstruction [B,h,w,C]) -> [B]; the mean over the batch is taken here, over the examples
            whose WEIGHT is 1, where a batch has one.
        apply_fn: (parameters, features [B,h,w,C], key) -> reconstruction [B,h,w,C].
        optimizer: of optax.
    """

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        def mean_loss(parameters: Any) -> jax.Array:
            losses = loss_fn(batch, apply_fn(parameters, batch["features"], key))
            if losses.shape != batch["features"].shape[:1]:
                examples = batch["features"].shape[0]
                raise ValueError(f"expected a loss of one value an example, [{examples}], got {list(losses.shape)}")
            weight = batch.get(WEIGHT)
            return jnp.mean(losses) if weight is None else jnp.sum(losses * weight) / jnp.sum(weight)

        loss, gradients = jax.value_and_grad(mean_loss)(state.parameters)
        norm = optax.tree.norm(gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        new = State(state.step + 1, optax.apply_updates(state.parameters, updates), optimizer_state)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = jax.tree.map(lambda after, before: jnp.where(is_finite, after, before), new, state)
        return new, {"loss": loss, "gradient_norm": norm}

    return step


def make_chunk(
    step: Callable, *, mesh: Mesh | None = None
) -> Callable[[State, Batch, np.ndarray, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """A compiled scan of steps over examples that stay on the device.

    Args:
        step: of `make_step`.
        mesh: devices over whose axis "data" each batch is spread; a batch that does not divide is filled up. State and
            examples are to be replicated on them. By default the one device of the arguments.

    Returns:
        (state, examples, indices [N,B], key) -> (state, metrics [N]). The state is donated. `examples` is a dict of
        arrays with all examples leading; row t of `indices` chooses the batch of one step. A row of -1 is not run, so
        that a last, shorter chunk runs in the same program; its metrics mean nothing. The key of a step is `key` folded
        with the number of the step.
    """

    replicated = None if mesh is None else NamedSharding(mesh, P())

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated)
    def chunk(state: State, examples: Batch, indices: jax.Array, key: jax.Array):
        def choose(chosen: jax.Array) -> Batch:
            batch = jax.tree.map(lambda leaf: leaf[_filled(chosen, mesh)], examples)
            return batch if mesh is None else _spread(batch, len(chosen), mesh)

        return scan_steps(step, choose, state, indices, key)

    return chunk


def make_streamed_step(step: Callable, *, mesh: Mesh) -> Callable[[State, Batch, jax.Array], tuple[State, dict]]:
    """One compiled step on a batch that is spread over a mesh already, where `make_chunk` chooses it on the devices.

    Args:
        step: of `make_step`.
        mesh: over whose axis "data" batches come spread.

    Returns:
        (state, batch, key) -> (state, metrics). The state is donated, and comes back replicated. The key of the step
        is `key` folded with its number, as that of `make_chunk`.
    """

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=NamedSharding(mesh, P()))
    def streamed(state: State, batch: Batch, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        return step(state, batch, jax.random.fold_in(key, state.step))

    return streamed


def _filled(chosen: jax.Array, mesh: Mesh | None) -> jax.Array:
    """A row of indices, filled up with 0 to a multiple of the devices that a batch is spread over."""
    return chosen if mesh is None else jnp.pad(chosen, (0, -len(chosen) % mesh.shape["data"]))


def _spread(batch: Batch, count: int, mesh: Mesh) -> Batch:
    """A batch over the devices; with WEIGHT, where it is more than `count` examples."""
    size = len(batch["features"])
    if size > count:
        batch = batch | {WEIGHT: (jnp.arange(size) < count).astype(jnp.float32)}
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, P("data")))


def scan_steps(
    step: Callable, choose: Callable[[jax.Array], Batch], state: State, indices: jax.Array, key: jax.Array
) -> tuple[State, dict[str, jax.Array]]:
    """The scan of `make_chunk`, not compiled by itself.

    Args:
        step: of `make_step`.
        choose: row of indices [B] -> batch.
        state: to start from.
        indices: [N,B].
        key: folded with the number of each step.
    """

    def run(state: State, chosen: jax.Array):
        return step(state, choose(chosen), jax.random.fold_in(key, state.step))

    def skip(state: State, chosen: jax.Array):
        return state, {name: jnp.zeros(()) for name in METRICS}

    return jax.lax.scan(lambda state, chosen: jax.lax.cond(chosen[0] >= 0, run, skip, state, chosen), state, indices)


def batch_indices(seed: int, step: int, *, batch_size: int, count: int, stream: int = 0) -> np.ndarray:
    """Examples of one batch, [batch_size] int32: a pure function of (seed, step), and of the stream.

    The examples come in an endless row of epochs, each a permutation of its own; a batch may span several. Streams of
    one seed are independent rows.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng((seed, epoch, stream)).permutation(count) for epoch in set(positions // count)
    }
    return np.asarray([orders[position // count][position % count] for position in positions], np.int32)


class Pool(NamedTuple):
    """Examples that a fixed number of places in every batch is drawn from."""

    examples: np.ndarray  # [n] int, positions among all examples
    places: int


def mixed_batch_indices(seed: int, step: int, pools: Sequence[Pool]) -> np.ndarray:
    """Examples of one batch, int32: the places of each pool, one pool after another, each a stream of its own."""
    rows = [
        pool.examples[batch_indices(seed, step, batch_size=pool.places, count=len(pool.examples), stream=stream)]
        for stream, pool in enumerate(pools)
    ]
    return np.concatenate(rows).astype(np.int32)
