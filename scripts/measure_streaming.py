"""What a training on features that are extracted with each batch takes: memory over many images, and time it waits.

    python scripts/measure_streaming.py [--images 20000] [--size 64] [--steps 200] [--output streaming.json]

Images are generated, of noise, in a temporary folder. Memory is what is resident of this process, asked for every 4,000
images of one pass. The wait is the share of the wall time between steps in which the next batch is not there yet, with
nothing left to compute meanwhile: the first tenth of the steps is left out.
"""

import argparse
import functools
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from pushpull_jax.config import Config, Data, Features, Log, Reconstructor, Training
from pushpull_jax.data.manifest import Record
from pushpull_jax.detector import build_network, initial_state
from pushpull_jax.extraction import Extractor, Source
from pushpull_jax.feature_stores import Streamed
from pushpull_jax.features import raw
from pushpull_jax.fit import build_program
from pushpull_jax.objectives import squared
from pushpull_jax.steps import Pool
from pushpull_jax.streaming import StreamedExamples
from pushpull_jax.weights import load_backbone

BATCH = 16
EVERY = 4000  # images between readings of the memory


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--size", type=int, default=64, help="side of an image in pixels")
    parser.add_argument("--backbone", default="pixels")
    parser.add_argument("--steps", type=int, default=200, help="of each measurement of the wait; 0: none")
    parser.add_argument("--output", type=Path, help="JSON file; by default it is only printed")
    return parser.parse_args()


def write_images(folder: Path, count: int, size: int) -> tuple[Record, ...]:
    """Images of noise, each another."""
    rng, records = np.random.default_rng(0), []
    for i in range(count):
        path = folder / f"{i:06}.png"
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(path, compress_level=1)
        records.append(Record(path.name, str(path), None, 0, "good", "train"))
    return tuple(records)


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def examples_of(config: Config, records: tuple[Record, ...]) -> StreamedExamples:
    """All records as normal examples."""
    backbone, parameters = load_backbone(config.features.backbone)
    network = build_network(config, backbone=backbone)
    store, count = Streamed(Extractor(network.features, parameters, config.data)), len(records)
    store.add([Source(record) for record in records], {}, lambda done: None)
    grid = config.features.grid
    arrays = {
        "row": np.arange(count, dtype=np.int32),
        "mask": np.zeros((count, grid, grid), np.float32),
        "label": np.zeros(count, np.float32),
        "kind": np.zeros(count, np.int32),
    }
    standardisation = raw(sum(network.features.widths))
    return StreamedExamples(config, build_program(config, network, squared), store, standardisation, arrays)


def memory(examples: StreamedExamples) -> dict[int, int]:
    """Resident bytes after so many images of one pass."""
    config, count = examples.config, len(examples.examples["row"])
    pools, every, resident = (Pool(np.arange(count), BATCH),), EVERY // BATCH, {}
    state = initial_state(config, examples.program.network, mesh=examples.program.mesh)
    with examples.opened(pools, 0) as advance:
        for step in range(0, count // BATCH, config.log.every):
            state, metrics = advance(state, step, step + config.log.every)
            jax.device_get(metrics)
            if (step + config.log.every) % every == 0:
                resident[(step + config.log.every) * BATCH] = resident_bytes()
    return resident


def wait(examples: StreamedExamples, steps: int, prefetch: int) -> dict[str, float]:
    """Share of the wall time that waits for a batch, and seconds a step."""
    config = replace(examples.config, features=replace(examples.config.features, prefetch=prefetch))
    examples = replace(examples, config=config)
    pools = (Pool(np.arange(len(examples.examples["row"])), BATCH),)
    state = initial_state(config, examples.program.network, mesh=examples.program.mesh)
    key, waited, computed = jax.random.key(0), [], []
    batches = examples.batches(pools, 0)
    for _ in range(steps):
        began = time.perf_counter()
        batch = jax.block_until_ready(next(batches))
        there = time.perf_counter()
        state, _ = jax.block_until_ready(examples.program.streamed_step(state, batch, key))
        waited.append(there - began)
        computed.append(time.perf_counter() - there)
    batches.close()
    first = max(steps // 10, 1)
    waiting, computing = sum(waited[first:]), sum(computed[first:])
    return {"share": waiting / (waiting + computing), "seconds_per_step": (waiting + computing) / (steps - first)}


def main() -> None:
    given = parse()
    config = Config(
        data=Data(image_size=given.size),
        features=Features(backbone=given.backbone, stages=(2, 3), grid=8, keep="stream"),
        reconstructor=Reconstructor(width=64, heads=2, hidden=128, encoder_layers=1, decoder_layers=1),
        training=Training(steps=given.images // BATCH, batch_size=BATCH),
        log=Log(every=50),
    )
    told = {"images": given.images, "size": given.size, "backbone": given.backbone, "batch_size": BATCH}
    with tempfile.TemporaryDirectory(prefix="pushpull_streaming_") as folder:
        examples = examples_of(config, write_images(Path(folder), given.images, given.size))
        told["resident_bytes"] = memory(examples)
        measured = functools.partial(wait, examples, given.steps)
        told["wait"] = {prefetch: measured(prefetch) for prefetch in (0, 2) if given.steps}
    text = json.dumps(told, indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
