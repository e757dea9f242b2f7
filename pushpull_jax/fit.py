"""The training loop: chunks of compiled steps, logged, checkpointed, resumed; and what is learned of a trained network.

Features are standardised, [N,h,w,C]. Batches are drawn from pools of examples, of which the first holds the normal
images.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from pushpull_jax import workdir as files
from pushpull_jax.batching import BATCH_SIZE, padded
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import Config
from pushpull_jax.detector import Network, build_optimizer, detect_features, initial_state, peaks
from pushpull_jax.errors import InputError
from pushpull_jax.feature_bank import FeatureRows
from pushpull_jax.hosts import agreed, is_first
from pushpull_jax.mesh import device_mesh, on_one_device, replicate
from pushpull_jax.models.nearest import NearestNeighbour, sample_cells
from pushpull_jax.preemption import Preempted, sigterm_noted
from pushpull_jax.profiling import Profile
from pushpull_jax.progress import progress_bar
from pushpull_jax.resources import saying_memory
from pushpull_jax.shares import gathered, share, summed
from pushpull_jax.steps import (
    METRICS,
    Batch,
    LossFunction,
    Pool,
    State,
    learning_rates,
    make_chunk,
    make_step,
    make_streamed_step,
    mixed_batch_indices,
    training_apply,
)
from pushpull_jax.tensorboard import training_scalars
from pushpull_jax.whitening import Moments, fit_whitening, moments


class Program(NamedTuple):
    """What is compiled once a run: the scan of steps, the scores of features, and the schedule it follows."""

    network: Network
    mesh: Mesh  # that batches are spread over
    chunk: Callable
    streamed_step: Callable  # the same step, on a batch that comes from elsewhere
    residuals: Callable  # (parameters, features [B,h,w,C]) -> moments of each image's residuals, by what asks for them
    scores: Callable  # (parameters, features) -> scores [B] and peaks of the maps [B]
    learning_rate: optax.Schedule


def build_program(config: Config, network: Network, loss_fn: LossFunction) -> Program:
    """The compiled parts of a training run."""
    optimizer, rate = build_optimizer(config)
    apply_fn = training_apply(network.reconstructor, jitter=config.training.jitter, precision=network.matmul_precision)
    mesh = device_mesh(data=config.mesh.data)
    step = make_step(loss_fn, apply_fn, optimizer)
    chunk = saying_memory(make_chunk(step, mesh=mesh), what="a chunk of steps")
    streamed_step = saying_memory(make_streamed_step(step, mesh=mesh), what="a step")

    @jax.jit
    def residuals(parameters: dict[str, Any], features: jax.Array):
        rest = features - network.reconstruct(parameters["reconstructor"], features)
        return {name: moments(part) for name, part in network.measured(rest).items()}

    @jax.jit
    def scores(parameters: dict[str, Any], features: jax.Array):
        scored, maps = detect_features(network, parameters, features)
        return scored, peaks(network, maps)

    return Program(network, mesh, chunk, streamed_step, residuals, scores, rate)


# (state, steps done, steps to do) -> state and metrics, each of the steps between; they are still on the device.
Advance = Callable[[State, int, int], tuple[State, dict[str, Any]]]


class Examples(Protocol):
    """Where the batches of the steps come from."""

    def opened(self, pools: Sequence[Pool], first: int) -> contextlib.AbstractContextManager[Advance]:
        """How to do steps from `first` on, in chunks of at most log.every, on batches that are drawn from pools."""


@dataclass(frozen=True)
class ResidentExamples:
    """All examples on the devices, of which a compiled scan of a chunk of steps chooses its batches."""

    config: Config
    program: Program
    examples: Batch

    def opened(self, pools: Sequence[Pool], first: int) -> contextlib.AbstractContextManager[Advance]:
        mesh = self.program.mesh
        key = replicate(jax.random.key(self.config.seed), mesh)

        def advance(state: State, first: int, last: int) -> tuple[State, dict[str, Any]]:
            indices = replicate(chunk_indices(self.config, pools, first, last), mesh)
            return self.program.chunk(state, self.examples, indices, key)

        return contextlib.nullcontext(advance)


def fit(
    config: Config,
    program: Program,
    examples: Examples,
    pools: Sequence[Pool],
    folder: Path,
    *,
    normal: FeatureRows,
    start: Any = None,
) -> State:
    """Train to the last step, from the newest checkpoint of a run's folder on; writes metrics.jsonl and checkpoints.

    Args:
        config: the run.
        program: of `build_program`.
        examples: what is trained on.
        pools: what batches are drawn from, the normal images first.
        folder: of the run.
        normal: features of the normal images.
        start: parameters of the reconstructor to start from; by default fresh ones.

    Raises:
        InputError: a loss or gradient is not finite; the checkpoints before it are kept.
        Preempted: SIGTERM came; the state is saved.
        OSError: a checkpoint could not be written; the last good one is kept.
    """
    steps, size = config.training.steps, config.log.every
    saved = Checkpoints(folder / files.CHECKPOINTS, keep=config.checkpoint.keep, minutes=config.checkpoint.minutes)
    profile = Profile(folder / files.PROFILE, steps=config.log.profile)
    with sigterm_noted() as notice, saved as checkpoints, profile:
        if checkpoints.latest is not None:
            state = checkpoints.restore(jax.eval_shape(lambda: initial_state(config, program.network)))
            checkpoints.discard_after(int(state.step))  # damaged ones
            state = replicate(state, program.mesh)  # from the host, where its digest was taken
        else:
            state = first_state(config, program.network, normal, start, program.mesh)
            if not steps:
                checkpoints.save(state)
        step, log = int(state.step.addressable_data(0)), folder / files.LOG
        rows = [row for row in files.read_lines(log) if row["step"] <= step]
        with agreed():
            if is_first():
                files.write_lines(log, rows)
        written = files.Log(log, rows, is_wanted=is_first())
        is_shown = config.log.tensorboard and is_first()
        scalars = training_scalars(folder / files.TENSORBOARD / "train", rows, is_wanted=is_shown)
        rates = learning_rates(program.learning_rate, steps)
        bar = progress_bar(desc="training", total=steps, initial=step, unit="step")
        with bar, scalars as show, written, examples.opened(pools, step) as advance:
            while step < steps:
                # To the next multiple of `size`, which a resumed run may have changed.
                began, last = time.perf_counter(), min((step // size + 1) * size, steps)
                state, metrics = advance(state, step, last)
                row = {"step": last, **_means(metrics, step, last, config)}
                row["learning_rate"] = float(rates[last - 1])
                row["seconds_per_step"] = (time.perf_counter() - began) / (last - step)
                written.add(row)
                show(row)
                checkpoints.check()
                is_told = notice.is_due()  # asked once, since it may come at any moment
                if last % config.checkpoint.every == 0 or last == steps or is_told or checkpoints.is_due():
                    written.flush()
                    checkpoints.save(state)
                bar.set_postfix(loss=f"{row['loss']:.4f}", rate=f"{row['learning_rate']:.1e}", refresh=False)
                bar.update(last - step)
                profile.chunk_done(last - step, is_last=last == steps)
                step = last
                if is_told:
                    break
    if notice.came:  # said when the state is written
        raise Preempted(f"{folder}: told to stop; the state of step {step} is saved")
    return on_one_device(state)


def first_state(config: Config, network: Network, normal: FeatureRows, start: Any, mesh: Mesh) -> State:
    """The state before the first step, on every device of a mesh.

    A nearest neighbour has all that it needs from the normal images at once.
    """
    state = initial_state(config, network, mesh=mesh)
    if isinstance(network.reconstructor, NearestNeighbour):
        start = {"cells": sample_cells(normal, images=len(normal), size=network.reconstructor.size, seed=config.seed)}
    return state if start is None else state._replace(parameters=replicate(start, mesh))


def cross_fit(
    config: Config,
    program: Program,
    frozen: dict[str, Any],
    examples: Examples,
    pools: Sequence[Pool],
    *,
    normal: FeatureRows,
) -> tuple[np.ndarray, np.ndarray]:
    """`score_features` of the normal training images, each by a detector that was trained without its fold of them.

    Costs `scoring.folds` more trainings, in the program that is compiled already. The standardisation is that of all
    images; anomalies are trained on in every fold.
    """
    count, steps, size = config.scoring.folds, config.training.steps, config.log.every
    order = np.random.default_rng(config.seed).permutation(len(normal))
    results = tuple(np.empty(len(normal), np.float32) for _ in ("scores", "peaks"))
    with progress_bar(desc="cross-fitting", total=count * steps, unit="step") as bar:
        for fold in range(count):
            held = order[fold::count]
            kept = np.setdiff1d(order, held)
            state = first_state(config, program.network, normal[kept], None, program.mesh)
            some = (pools[0]._replace(examples=pools[0].examples[kept]), *pools[1:])
            with examples.opened(some, 0) as advance:
                for step in range(0, steps, size):
                    last = min(step + size, steps)
                    state, metrics = advance(state, step, last)
                    _means(metrics, step, last, config)
                    bar.update(last - step)
            trained = frozen | {"reconstructor": on_one_device(state.parameters)}
            parameters = with_residuals(trained, residual_sums(program, trained, normal[kept]))
            for whole, part in zip(results, score_features(program, parameters, normal[held]), strict=True):
                whole[held] = part
    return results


def residual_sums(program: Program, parameters: dict[str, Any], normal: FeatureRows) -> dict[str, Moments]:
    """Moments of the residuals of normal features, of whatever the score is in units of; float64."""
    if not _is_relative(program):
        return {}
    one = jax.ShapeDtypeStruct((1, *normal.bank.extractor.shape), np.float32)
    shapes = jax.eval_shape(program.residuals, parameters, one)
    sums = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], np.float64), shapes)
    for batch in share(normal):
        of_images = _image_moments(program, parameters, batch)
        sums = jax.tree.map(lambda so_far, leaf: so_far + leaf.sum(0, dtype=np.float64), sums, of_images)
    return summed(sums)


def _is_relative(program: Program) -> bool:
    """Whether the score is in units of what is usual of the residuals."""
    return bool(program.network.map_names or program.network.block_names)


def _image_moments(program: Program, parameters: dict[str, Any], batch: np.ndarray) -> dict[str, Moments]:
    """Moments of the residuals of each image, of at most BATCH_SIZE."""
    return padded(functools.partial(program.residuals, parameters), batch, size=BATCH_SIZE)


def with_residuals(parameters: dict[str, Any], sums: dict[str, Moments]) -> dict[str, Any]:
    """The parameters with "residuals": what is usual of them, by their moments."""
    return parameters | {"residuals": {name: fit_whitening(of)._asdict() for name, of in sums.items()}}


def score_held_out(
    program: Program, parameters: dict[str, Any], sums: dict[str, Moments], held: FeatureRows
) -> tuple[np.ndarray, np.ndarray]:
    """`score_features` of held-out images, each in units of what is usual of all images but itself.

    Images are few, and what is usual of them is known the better the more there are: so the held-out ones count too,
    as long as none of them is measured by itself.

    Args:
        program: of `build_program`.
        parameters: of the run, without "residuals".
        sums: of all normal images, those held out among them.
        held: features of the held-out images.
    """
    if not sums:
        return score_features(program, parameters | {"residuals": {}}, held)
    results = [(np.zeros(0, np.float32),) * 2]
    with progress_bar(desc="threshold", total=len(held), unit="image") as bar:
        for batch in share(held):
            own = _image_moments(program, parameters, batch)
            # One at a time, since each has parameters of its own.
            for i, image in enumerate(batch):
                others = {name: _without(sums[name], own[name], i) for name in sums}
                results.append(jax.device_get(program.scores(with_residuals(parameters, others), image[None])))
                bar.update()
    return tuple(gathered(np.concatenate(parts)) for parts in zip(*results, strict=True))


def _without(sums: Moments, of_images: Moments, i: int) -> Moments:
    """Moments of all images without those of one."""
    return Moments(*(leaf - own[i] for leaf, own in zip(sums, of_images, strict=True)))


def score_features(
    program: Program, parameters: dict[str, Any], features: FeatureRows
) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N] and peaks of the maps [N], float32, of features."""
    scores = functools.partial(program.scores, parameters)
    parts = [(np.zeros(0, np.float32),) * 2, *(padded(scores, batch, size=BATCH_SIZE) for batch in share(features))]
    return tuple(gathered(np.concatenate(part)) for part in zip(*parts, strict=True))


def chunk_indices(config: Config, pools: Sequence[Pool], first: int, last: int) -> np.ndarray:
    """Batches of steps `first` to `last`, [log.every, batch_size], filled up with rows of -1."""
    indices = np.full((config.log.every, config.training.batch_size), -1, np.int32)
    for row, step in enumerate(range(first, last)):
        indices[row] = mixed_batch_indices(config.seed, step, pools)
    return indices


def _means(metrics: dict[str, jax.Array], first: int, last: int, config: Config) -> dict[str, float]:
    """Means of what the steps from `first` to `last` of a chunk tell, read from the device once.

    Raises:
        InputError: a loss or gradient is not finite; that step was not applied, and nothing of it is saved.
    """
    told = {name: np.asarray(values[: last - first]) for name, values in jax.device_get(metrics).items()}
    for name in METRICS:
        if not np.isfinite(told[name]).all():
            at = int(np.flatnonzero(~np.isfinite(told[name]))[0])
            raise InputError(
                f"the {name} of step {first + at + 1} is {told[name][at]}; training.learning_rate is "
                f"{config.training.learning_rate}, and a lower one may help"
            )
    return {name: float(np.mean(values)) for name, values in told.items()}
