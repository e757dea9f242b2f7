"""Rows of scripts/benchmark.py on grids: `pushpull ablate` against `pushpull train`, a process for each member.

Both are the command line in processes of their own, on drawn parts, with programs of an earlier process in the cache of
compiled ones; `ablate` alone has none of its grid there, since only the same grid would leave one. What a row leaves
out with "without start-up" is everything but training: the time from the first line of metrics.jsonl to the last, and
as much again for the steps before the first.
"""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmark_harness import Contest, Row, Settings

from pushpull_jax.data.demo import write_demo

PROGRAM = (sys.executable, "-c", "from pushpull_jax.cli import main; main()")
# What `pushpull ablate` and `train` are given: the demo's own config, or a reconstructor of the paper's kind on all
# five stages of EfficientNet-Lite0 (C 512) and a grid of 16x16 (T 256).
DEMO = ("demo",)
PAPER = (
    "adtr", "--features.backbone", "efficientnet_lite0", "--training.steps", "100", "--log.every", "10",
    "--checkpoint.every", "100",
)  # fmt: skip
QUICK = (
    "demo", "--data.image_size", "64", "--features.backbone", "pixels", "--features.stages", "2", "3",
    "--features.stage_weights", "1", "1", "--features.grid", "8", "--scoring.map_weights",
    "--reconstructor.width", "16", "--reconstructor.heads", "2", "--reconstructor.hidden", "16",
    "--reconstructor.encoder_layers", "0",
    "--reconstructor.decoder_layers", "0", "--training.steps", "4", "--training.batch_size", "4", "--log.every", "1",
    "--checkpoint.every", "2",
)  # fmt: skip


def run_watched(words: list[str], workdir: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds of a process, and of the training in it, by the lines of its metrics.jsonl."""
    seen: list[float] = []
    errors = workdir.with_suffix(".log")
    began = time.perf_counter()
    with errors.open("w") as log, subprocess.Popen(words, env=environment, stdout=log, stderr=log) as process:
        while process.poll() is None:
            lines = sum(path.read_bytes().count(b"\n") for path in workdir.glob("**/metrics.jsonl"))
            seen += [time.perf_counter()] * (lines - len(seen))
            time.sleep(0.02)
    took = time.perf_counter() - began
    if process.returncode or len(seen) < 2:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}: {errors.read_text()[-2000:]}")
    return took, (seen[-1] - seen[0]) * len(seen) / (len(seen) - 1)


def grid(settings: Settings, *, members: int, sampled: int, config: tuple[str, ...]) -> Contest:
    """A grid over seeds, and its members one after another, of which some are measured and stand for the others."""
    if settings.quick:
        members, sampled, config = 2, 1, QUICK
    root = (settings.folder / "data").resolve()
    counts = {"train": 20, "good": 2, "per_defect": 1, "size": 64} if settings.quick else {}
    category = write_demo(root, seed=0, **counts).name
    data = ["--data.root", str(root), "--data.category", category]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(settings.folder / "jax")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    facts: dict[str, Any] = {"members": members, "sampled": sampled}

    def command(name: str, workdir: Path, *more: str) -> tuple[float, float]:
        words = [*PROGRAM, name, config[0], "--workdir", str(workdir), *data, *config[1:], *more]
        return run_watched(words, workdir, environment)

    def ours() -> float:
        seeds = ",".join(map(str, range(members)))
        took, facts["training_seconds"] = command("ablate", settings.folder / "grid", "--vary", f"seed={seeds}")
        return took

    def peer() -> float:
        command("train", settings.folder / "warm", "--seed", str(members))
        runs = [command("train", settings.folder / f"run_{i}", "--seed", str(i)) for i in range(sampled)]
        took, training = (mean(of_runs) * members for of_runs in zip(*runs, strict=True))
        facts["peer_training_seconds"] = training
        facts["ratio_without_start_up"] = training / facts["training_seconds"]
        return took

    note = f"peer: {sampled} of {members} processes measured, their mean times {members}"
    once = {"repeats": 1, "warm": False, "self_timed": True}
    return Contest(ours, {"pushpull train": peer}, "s", note=note, facts=facts, **once)


ROWS = (
    Row(
        "grid-8",
        "8 reconstructors, C 512, T 256, 100 steps: ablate against train",
        functools.partial(grid, members=8, sampled=2, config=PAPER),
    ),
    Row(
        "grid-32",
        "32 of the demo: ablate against train",
        functools.partial(grid, members=32, sampled=3, config=DEMO),
    ),
)
