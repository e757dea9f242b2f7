"""One process of scripts/benchmark.py: makes a training step and says so, or measures many maps in a stream.

    python scripts/benchmark_process.py ours|compiled FOLDER
    python scripts/benchmark_process.py streaming COUNT SIDE

FOLDER holds features.npy [B,h,w,C], module.pickle (our Reconstructor), and model.pt (its twin in PyTorch). The stream
prints an object: seconds of what is ours, and bytes of memory above what the imports took.
"""

import json
import pickle
import resource
import sys
import time
import types
from pathlib import Path

import numpy as np

OPTIMISER = {"learning_rate": 1e-4, "weight_decay": 1e-4, "clip_norm": 0.1}


def ours(folder: Path) -> float:
    """The loss of the first step of ours."""
    import jax
    import jax.numpy as jnp

    from pushpull_jax.objectives import squared
    from pushpull_jax.steps import init_state, make_chunk, make_optimizer, make_step, training_apply

    module, features = pickle.loads((folder / "module.pickle").read_bytes()), np.load(folder / "features.npy")
    optimiser, _ = make_optimizer(schedule="constant", warmup_steps=0, steps=1000, **OPTIMISER)
    state = init_state(jax.random.key(0), module, optimiser, features.shape[1:])
    chunk = make_chunk(make_step(squared, training_apply(module), optimiser))
    indices = jnp.arange(len(features), dtype=jnp.int32)[None]
    return float(chunk(state, {"features": jnp.asarray(features)}, indices, jax.random.key(0))[1]["loss"][0])


def compiled(folder: Path) -> float:
    """The loss of the first step of the peer, compiled."""
    # The peer's module names the type of ours; the real one would make its process import jax.
    sys.modules["pushpull_jax.models.reconstructor"] = types.SimpleNamespace(Reconstructor=object)
    import torch
    from peer_reconstructor import torch_train_step

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")
    model = torch.load(folder / "model.pt", weights_only=False).to(device)
    step = torch_train_step(torch.compile(model), **OPTIMISER)
    return float(step(torch.from_numpy(np.load(folder / "features.npy")).to(device)))


def first_step(side: str, folder: str) -> None:
    """Make a step, and say so while the process still runs."""
    loss = {"ours": ours, "compiled": compiled}[side](Path(folder))
    if not np.isfinite(loss):
        sys.exit(f"the loss is {loss}")
    print("stepped", flush=True)


def _peak_bytes() -> int:
    """Most memory that this process has had; getrusage would count what its parent had when it was forked."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def streaming(count: int, side: int) -> None:
    """Pixel metrics of maps that are drawn one after another, and never held together."""
    from benchmark_maps import drawn_maps

    from pushpull_jax.streaming_metrics import PixelHistogram

    # Imports what is imported at first use.
    PixelHistogram().update(np.eye(8, dtype=bool)[None], np.zeros((1, 8, 8), np.float32)).metrics()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    before, seconds, state = pages * resource.getpagesize(), 0.0, PixelHistogram()
    for mask, score_map in drawn_maps(count, side):
        began = time.perf_counter()
        state = state.update(mask[None], score_map[None])
        seconds += time.perf_counter() - began
    began = time.perf_counter()
    measured = state.metrics()
    seconds += time.perf_counter() - began
    peak = _peak_bytes()
    print(json.dumps({"seconds": seconds, "memory": peak - before, **measured}))


if __name__ == "__main__":
    if sys.argv[1] == "streaming":
        streaming(int(sys.argv[2]), int(sys.argv[3]))
    else:
        first_step(*sys.argv[1:])
