"""A program for test_processes.py: trains a small reconstructor with its batches spread over all devices there are.

Writes the losses of 50 steps in float64 and float32, and the gradients of the first step, to an npz file. It is started
as one process, or as several by scripts/launch_local.py.
"""

import argparse
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pushpull_jax.config import Hosts
from pushpull_jax.hosts import connected, is_first
from pushpull_jax.mesh import device_mesh, replicate
from pushpull_jax.models.reconstructor import Reconstructor
from pushpull_jax.steps import init_state, make_chunk, make_optimizer, make_step, training_apply

STEPS, BATCH, COUNT = 50, 12, 30  # a batch does not divide by 8: it is filled up


def squared(batch, reconstruction):
    """Eq. 1 in the dtype that comes in; that of the package computes in float32."""
    return jnp.mean((batch["features"] - reconstruction) ** 2, axis=(1, 2, 3))


def trained(tx, dtype, steps):
    """Losses of some steps, and the parameters before and after them."""
    rng = np.random.default_rng(0)
    examples = {"features": rng.standard_normal((COUNT, 4, 4, 12)).astype(dtype)}
    indices = np.stack([rng.permutation(COUNT)[:BATCH] for _ in range(steps)]).astype(np.int32)
    model = Reconstructor(width=16, encoder_layers=1, decoder_layers=1, heads=2, hidden=32, dropout=0.1, dtype=dtype)
    mesh = device_mesh(data=-1)
    chunk = make_chunk(make_step(squared, training_apply(model, jitter=0.3), tx), mesh=mesh)
    state = init_state(jax.random.key(1), model, tx, (4, 4, 12))
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    state = jax.tree.map(lambda leaf: np.asarray(leaf, dtype if floating(leaf) else leaf.dtype), state)
    before = state.parameters
    state, told = chunk(replicate(state, mesh), replicate(examples, mesh), indices, jax.random.key(2))
    return np.asarray(told["loss"]), before, jax.tree.map(np.asarray, state.parameters)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--hosts.coordinator", dest="coordinator", default="")
    parser.add_argument("--hosts.processes", dest="processes", type=int, default=1)
    parser.add_argument("--hosts.process", dest="process", type=int, default=-1)
    chosen = parser.parse_args()
    adamw = make_optimizer(
        learning_rate=1e-3, schedule="constant", warmup_steps=0, steps=STEPS, weight_decay=1e-4, clip_norm=1.0
    )[0]
    with connected(Hosts(chosen.coordinator, chosen.processes, chosen.process)):
        told = {"devices": jax.device_count(), "float32": trained(adamw, np.float32, STEPS)[0]}
        # Of plain gradient descent the parameters after one step are those before it less the gradient.
        _, before, after = trained(optax.sgd(1.0), np.float32, 1)
        gradients = jax.tree.leaves(jax.tree.map(np.subtract, before, after))
        told |= {f"gradient_{i}": leaf for i, leaf in enumerate(gradients)}
        with jax.enable_x64(True):
            told["float64"] = trained(adamw, np.float64, STEPS)[0]
        if is_first():
            np.savez(chosen.output + ".part.npz", **told)
            os.replace(chosen.output + ".part.npz", chosen.output)


if __name__ == "__main__":
    main()
