"""Feature-reconstruction anomaly detection in JAX that learns from whatever labels exist (ADTR, arXiv 2209.01816).

Shape letters, used everywhere: B batch; H W image in pixels; S side of the square image of a run; h w feature grid; C
backbone channels; D model width; T tokens. `*B` is any leading axes, none included. Layout NHWC. Labels and masks: 1
anomalous, 0 normal. Names below are imported when they are used, so that `import pushpull_jax` stays quick; none is
the name of a module too, since that would take its place.
"""

import importlib
from typing import Any

_HOME = {
    "pseudo_huber_map": "losses",
    "pixel_push_pull_loss": "losses",
    "top_k_score": "losses",
    "image_push_pull_loss": "losses",
    "push_pull_loss": "losses",
    "reconstruction_loss": "losses",
    "confetti": "confetti_noise",
    "score_map": "scoring",
    "upsample": "scoring",
    "smooth": "scoring",
    "image_score": "scoring",
    "Reconstructor": "models.reconstructor",
    "load_backbone": "weights",
    "image_auroc": "metrics",
    "pixel_auroc": "metrics",
    "average_precision": "metrics",
    "f1_max": "metrics",
    "aupro": "metrics",
    "Config": "config",
    "load_config": "config",
    "train": "training",
    "init_state": "steps",
    "make_step": "steps",
    "make_chunk": "steps",
    "inspect": "inspection",
    "evaluate": "evaluation",
    "predict": "prediction",
    "calibrate": "recalibration",
    "Detector": "detector",
    "load": "detector",
    "InputError": "errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
