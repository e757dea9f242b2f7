"""Rows of scripts/benchmark.py on what is around the models: metrics, a folder of images, and whole processes.

Peers: scikit-learn and a plain exact AU-PRO; a PyTorch DataLoader with Pillow; a PyTorch process with torch.compile.
"""

import functools
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from benchmark_harness import Contest, Row, Settings, assert_equal, cost
from benchmark_maps import drawn_maps
from benchmark_models import (
    backbone_with_weights,
    optimiser_of,
    random_features,
    reconstructor_of,
    torch_for,
    without_loops,
)
from PIL import Image

from pushpull_jax import metrics
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.pipeline import image_batches
from pushpull_jax.features import FeatureSpec, extract, extract_all
from pushpull_jax.objectives import squared
from pushpull_jax.steps import init_state, make_step, training_apply

SCRIPTS = Path(__file__).resolve().parent
MEBIBYTE = 2**20


def pixel_metrics(settings: Settings) -> Contest:
    """Exact pixel AUROC and AU-PRO of one category; ours are two more metrics from the same sort."""
    count, side = (4, 32) if settings.quick else (83, 256)
    masks, maps = map(np.stack, zip(*drawn_maps(count, side), strict=True))
    peers, note = {}, ""
    try:
        from peer_metrics import plain_pixel_metrics
    except ImportError:
        note = "scikit-learn is not installed"
    else:
        ours, theirs = metrics.pixel_metrics(masks, maps), plain_pixel_metrics(masks, maps)
        for name, value in theirs.items():
            assert_equal(name, ours[name], value, tolerance=1e-6)
        peers = {"scikit-learn, NumPy": lambda: plain_pixel_metrics(masks, maps)}
    moved = masks.nbytes + maps.nbytes
    return Contest(lambda: metrics.pixel_metrics(masks, maps), peers, "s", bytes=moved, note=note)


def streaming_metrics(settings: Settings) -> Contest:
    """Pixel metrics in bounded memory, in a process of its own; the drawing of the maps does not count."""
    count, side = (4, 64) if settings.quick else (160, 1024)
    words = [sys.executable, str(SCRIPTS / "benchmark_process.py"), "streaming", str(count), str(side)]
    facts: dict[str, Any] = {}

    def ours() -> float:
        said = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
        facts["peak_mebibytes_above_imports"] = said["memory"] / MEBIBYTE
        return said["seconds"]

    note = f"no peer: it would hold all {count * side**2:,} pixels, several times over in float64"
    once = {"repeats": 1, "warm": False, "self_timed": True}
    return Contest(ours, {}, "s", bytes=5 * count * side**2, note=note, facts=facts, **once)


def write_photographs(folder: Path, count: int, side: int) -> list[Path]:
    """PNGs of smooth colours under a little noise, which compress as photographs do."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(40, 216, (8, 8, 3), np.uint8)).resize((side, side), Image.BICUBIC)
        noisy = np.asarray(coarse, np.float32) + rng.normal(0, 3, (side, side, 3))
        paths.append(folder / f"{i:03d}.png")
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(paths[-1])
    return paths


class Photographs:
    """A data set as PyTorch wants it: the photographs at the size of a run, [3,S,S] float32 in 0..255."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        import torch

        with Image.open(self.paths[i]) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
        size = (self.size, self.size)
        return torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0]


def folder_features(settings: Settings) -> Contest:
    """From a folder of PNGs to features on the grid: decoding, resizing and EfficientNet-Lite0."""
    count, side, size, batch, grid = (3, 80, 64, 2, 4) if settings.quick else (64, 900, 256, 8, 16)
    folder = settings.folder / "photographs"
    folder.mkdir()
    paths = write_photographs(folder, count, side)
    records = [Record(path.name, str(path), None, 0, "good", "train") for path in paths]
    backbone, parameters = backbone_with_weights("efficientnet_lite0")
    spec, on_device = FeatureSpec(backbone, (1, 2, 3, 4, 5), grid, "bilinear"), jax.device_put(parameters)

    def ours() -> np.ndarray:
        batches = image_batches(records, image_size=size, batch_size=batch)
        return extract_all(spec, on_device, batches, batch_size=batch)

    plain = functools.partial(extract, spec._replace(backbone=without_loops(backbone)))
    flops, _ = cost(plain, parameters, np.zeros((1, size, size, 3), np.float32))
    peers = {}
    torch, device, lacking = torch_for(settings)
    if torch:
        peers = torch_folder(torch, device, spec, parameters, Photographs(paths, size), batch)
        theirs = next(iter(peers.values()))()
        # On a GPU the products of this row are in TF32 on both sides.
        tolerance = 1e-4 if jax.default_backend() == "cpu" else 1e-2
        assert_equal("features of a folder", ours(), theirs, tolerance=tolerance)
    return Contest(ours, peers, "images/s", count, flops * count, note=lacking)


def torch_folder(
    torch: Any, device: Any, spec: FeatureSpec, parameters: Any, photographs: Photographs, batch: int
) -> dict[str, Callable]:
    """The same by a DataLoader with two workers, which are started before anything is timed."""
    from peer_trunk import torch_trunk
    from torch.nn import functional as F

    # Forked workers would inherit the threads of jax, which can stop them for ever.
    loader = torch.utils.data.DataLoader(
        photographs, batch, num_workers=2, persistent_workers=True, multiprocessing_context="spawn"
    )
    mean, deviation = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (spec.backbone.mean, spec.backbone.deviation))
    eager = torch_trunk(spec.backbone.network, parameters).to(device)

    def run(model: Any) -> Callable:
        def call() -> np.ndarray:
            features = []
            with torch.inference_mode():
                for images in loader:
                    # channels_last, and the last batch filled up, so that it is compiled once.
                    filled = torch.zeros((batch, *images.shape[1:])).to(memory_format=torch.channels_last)
                    filled[: len(images)] = (images - mean) / deviation
                    ends = model(filled.to(device))
                    grid = (spec.grid, spec.grid)
                    ends = [F.interpolate(end, grid, mode="bilinear", align_corners=True) for end in ends]
                    features.append(torch.cat(ends, 1)[: len(images)].permute(0, 2, 3, 1).cpu().numpy())
            return np.concatenate(features)

        return call

    return {"torch eager": run(eager), "torch.compile": run(torch.compile(eager))}


def first_step(settings: Settings) -> Contest:
    """From the start of a process to the end of its first training step, with whatever either side keeps on disk."""
    module, shape = reconstructor_of(settings, dropout=0.1)
    state = init_state(jax.random.key(0), module, optimiser_of(), shape[1:])
    features = random_features(shape, shape[0])
    np.save(settings.folder / "features.npy", features)
    (settings.folder / "module.pickle").write_bytes(pickle.dumps(module))
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(settings.folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(settings.folder / "inductor"),
    }

    def process(side: str) -> Callable[[], float]:
        words = [sys.executable, str(SCRIPTS / "benchmark_process.py"), side, str(settings.folder)]

        def call() -> float:
            began = time.perf_counter()
            with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as child:
                line = child.stdout.readline()
                took = time.perf_counter() - began
            if child.returncode or line != "stepped\n":
                raise RuntimeError(f"{' '.join(words)} ended with {child.returncode}")
            return took

        return call

    peers = {}
    torch, _, lacking = torch_for(settings)
    if torch:
        from peer_reconstructor import torch_reconstructor

        torch.save(torch_reconstructor(module, jax.device_get(state.parameters)), settings.folder / "model.pt")
        peers = {"torch.compile": process("compiled")}
    step = make_step(squared, training_apply(module), optimiser_of())
    spent = cost(step, state, {"features": features}, jax.random.key(0))
    repeats = 1 if settings.quick else 5
    return Contest(process("ours"), peers, "s", 1.0, *spent, lacking, repeats=repeats, self_timed=True)


ROWS = (
    Row("metrics", "pixel AUROC and AU-PRO of 83 maps of 256x256", pixel_metrics),
    Row("metrics-stream", "pixel metrics of 160 maps of 1024x1024 in a stream", streaming_metrics),
    Row("folder", "64 PNGs of 900 px to features, efficientnet_lite0", folder_features),
    Row("first-step", "start of a process to its first training step, caches warm", first_step),
)
