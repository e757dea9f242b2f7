"""The finished run that another one starts from: its weights, and the checks that nothing of it spoils the test.

A start brings the frozen backbone and standardisation with it. It may have learned from no image that the new run is
tested or calibrated on.
"""

import hashlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from pushpull_jax import workdir as files
from pushpull_jax.backbones import Backbone
from pushpull_jax.config import HOW_IT_RUNS, Config, flatten
from pushpull_jax.detector import load_frozen, read_network, restore_parameters
from pushpull_jax.errors import InputError
from pushpull_jax.examples import TrainingData


class Start(NamedTuple):
    """The finished run that another one starts from."""

    backbone: Backbone
    frozen: dict[str, Any]
    parameters: Any
    data: dict[str, Any]  # of its config.json

    @property
    def digest(self) -> str:
        """SHA-256 of the parameters of the reconstructor."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(self.parameters):
            digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
        return digest.hexdigest()


# Fields in which a run may differ from the one it starts from: what it learns from, and how.
_MAY_DIFFER_FROM_START = (*HOW_IT_RUNS, "training.", "supervision.", "scoring.", "seed")


def read_start(config: Config, reconstructor: nn.Module | None) -> Start:
    """The run that a config starts from.

    Args:
        config: the run that starts.
        reconstructor: as given to `train`.

    Raises:
        InputError: it is not a finished run, or one of another network or other data.
    """
    folder = files.run_folder(config.training.start)
    if not files.is_run(folder):
        raise InputError(f"training.start {folder} is not a run: it has no {files.CONFIG}")
    there, network = read_network(folder, reconstructor=reconstructor)
    files.check_finished(folder, called="training.start")
    theirs, ours = flatten(there), flatten(config)
    differing = [name for name in ours if ours[name] != theirs[name] and not name.startswith(_MAY_DIFFER_FROM_START)]
    if differing:
        shown = ", ".join(f"{name} = {theirs[name]!r} there, {ours[name]!r} here" for name in differing)
        raise InputError(
            f"training.start {folder}: a run can start from one of the same network and data only: {shown}"
        )
    trained, data = restore_parameters(folder, there, network), files.read_config(folder)[1]["data"]
    return Start(network.features.backbone, load_frozen(folder, network), trained, data)


def check_start(start: Start, data: TrainingData) -> dict[str, str]:
    """What config.json tells of a start.

    Raises:
        InputError: it was trained on what this run is tested or calibrated on.
    """
    if start.data["held_out"] != data.summary["held_out"]:
        raise InputError(
            "training.start: that run held out other normal images for its threshold, so it was trained on some of "
            "those held out here; give both the same seed, scoring.held_out and data, and scoring.folds 0"
        )
    # Those of the runs that it started from itself, too.
    seen = set(start.data["labelled"]) | set(start.data.get("start", {}).get("labelled", ()))
    if not seen <= set(data.summary["out_of_test"]) | set(data.summary["labelled"]):
        raise InputError(
            "training.start: that run was trained on anomalies that are test images here; give it the same seed, "
            "supervision.shots and supervision.setting"
        )
    return {"sha256": start.digest, "labelled": sorted(seen)}
