"""What training minimises: the losses of the paper on a batch and its reconstruction, one value an example.

Any function of that signature can take their place: see `training.train`. The mean over the batch is the step's.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pushpull_jax import losses
from pushpull_jax.batching import BATCH_SIZE, padded
from pushpull_jax.config import Config
from pushpull_jax.detector import Network, initial_state
from pushpull_jax.feature_bank import FeatureRows
from pushpull_jax.shapes import split_channels
from pushpull_jax.shares import gathered, share
from pushpull_jax.steps import Batch, LossFunction


def squared(batch: Batch, reconstruction: jax.Array) -> jax.Array:
    """Eq. 1, divided by C so that clipping and learning rate do not depend on the backbone."""
    channels = reconstruction.shape[-1]
    return losses.reconstruction_loss(batch["features"], reconstruction) / channels


def push_pull(
    batch: Batch, reconstruction: jax.Array, *, k: int, alpha: float, units: Sequence[tuple[int, float]] = ()
) -> jax.Array:
    """Eq. 6 to 9, for each example by its kind of label.

    Args:
        batch: see `train`.
        reconstruction: [B,h,w,C].
        k: see `losses.push_pull_loss`.
        alpha: likewise.
        units: channels of each stage, in order, and the unit of its residuals: eq. 6 is then computed for each stage
            by itself, and the losses are averaged; by default once, over all channels.

    Returns:
        [B] float32.
    """
    widths, scales = zip(*units or [(reconstruction.shape[-1], 1.0)], strict=True)
    features, reconstructed = (split_channels(array, widths) for array in (batch["features"], reconstruction))
    triples = zip(features, reconstructed, scales, strict=True)
    phis = jnp.stack([losses.pseudo_huber_map(a / scale, b / scale) for a, b, scale in triples])
    # All stages in one call: a sort for a traced k is dear to compile.
    labels = (jnp.broadcast_to(leaf, (len(phis), *leaf.shape)) for leaf in map(batch.get, ("kind", "label", "mask")))
    return jnp.mean(losses.push_pull_loss(phis, *labels, k=k, alpha=alpha), axis=0)


def configured_loss(config: Config, network: Network, start: Any, normal: FeatureRows) -> LossFunction:
    """The loss that a config names.

    Args:
        config: the run.
        network: of the run.
        start: parameters of the reconstructor that training starts from; None: fresh ones.
        normal: features of the normal images; read where the loss is in units of them.
    """
    if config.training.loss == "squared":
        return squared
    units = ()
    if config.supervision.by_stage:
        parameters = initial_state(config, network).parameters if start is None else start
        levels = stage_levels(network, parameters, normal).tolist()
        units = tuple(zip(network.features.widths, levels, strict=True))
    return functools.partial(push_pull, k=config.supervision.k, alpha=config.supervision.alpha, units=units)


def stage_levels(network: Network, parameters: Any, normal: FeatureRows) -> np.ndarray:
    """Mean |residual| of each stage of normal features, for parameters of the reconstructor; at least 1e-6."""
    program = functools.partial(_compiled_levels(network), parameters)
    none = np.zeros((0, len(network.features.widths)), np.float32)
    levels = np.concatenate([none, *(padded(program, batch, size=BATCH_SIZE) for batch in share(normal))])
    return np.maximum(gathered(levels).mean(0, dtype=np.float64), 1e-6)


@functools.cache
def _compiled_levels(network: Network):
    """(parameters of the reconstructor, features [B,h,w,C]) -> mean |residual| of each image and stage, [B, stages]."""

    @jax.jit
    def levels(parameters: Any, batch: jax.Array) -> jax.Array:
        residuals = jnp.abs(batch - network.reconstruct(parameters, batch))
        parts = split_channels(residuals, network.features.widths)
        return jnp.stack([part.mean((1, 2, 3)) for part in parts], axis=-1)

    return levels
