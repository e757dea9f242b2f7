"""Checkpoints of the training state by orbax: written asynchronously and atomically, the newest few kept."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from pushpull_jax.errors import InputError
from pushpull_jax.steps import State


class Checkpoints:
    """The checkpoints of one run, by step. A context manager: leaving it waits for what is being written."""

    def __init__(self, folder: Path, *, keep: int | None = None, create: bool = True):
        # orbax refuses relative paths, and leaves debris when it does.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)
        self._folder = folder

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: State) -> None:
        """Start writing a state, or those of several runs at one step; copied, for the next step takes their memory."""
        copied = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
        self._manager.save(int(copied.step.flat[0]), args=ocp.args.StandardSave(copied._asdict()))

    def restore(self, like: State) -> State:
        """The newest state.

        Args:
            like: the tree with a shape and dtype at every leaf.

        Raises:
            InputError: there is no checkpoint, or the newest cannot be restored into this tree.
        """
        if self.latest is None:
            raise InputError(f"{self._folder}: there is no checkpoint")
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
        try:
            restored = self._manager.restore(self.latest, args=ocp.args.StandardRestore(abstract._asdict()))
        except (ValueError, KeyError, OSError) as error:
            raise InputError(f"{self._folder / str(self.latest)}: cannot be restored: {error}") from error
        self._check_shapes(restored, abstract._asdict())
        return State(**restored)

    def _check_shapes(self, restored: dict[str, Any], like: dict[str, Any]) -> None:
        """orbax compares names only, and returns the arrays as they were saved."""
        others = []
        for (path, leaf), to in zip(jax.tree.leaves_with_path(restored), jax.tree.leaves(like), strict=True):
            if leaf.shape != to.shape:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                others.append(f"{name} (expected {list(to.shape)}, got {list(leaf.shape)})")
        if others:
            raise InputError(f"{self._folder / str(self.latest)}: arrays of another shape: {', '.join(sorted(others))}")
