"""The demo program: draw parts with defects, train on them, print our figures beside those of a trivial detector."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from pushpull_jax import metrics, scoring
from pushpull_jax import workdir as files
from pushpull_jax.config import load_config
from pushpull_jax.data.demo import mean_difference_maps, write_demo
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.mvtec_ad import read_mvtec_ad
from pushpull_jax.data.pipeline import image_batches
from pushpull_jax.progress import say
from pushpull_jax.training import train


def run_demo(workdir: Path) -> dict:
    """The whole main job on drawn images: the contents of metrics.json, beside the trivial detector's on the terminal.

    The images are written to the folder demo_data beside `workdir`, and kept for the next time.
    """
    workdir, config = files.local_folder(workdir, name="workdir"), load_config("demo")
    root = (workdir.parent / "demo_data").resolve()
    say(f"drawing parts with defects: {root}")
    folder = write_demo(root, seed=config.seed)
    config = replace(config, data=replace(config.data, root=str(root), category=folder.name))
    result = train(config, workdir, command=["pushpull", "demo", "--workdir", str(workdir)])
    print_beside(result, trivial_metrics(read_mvtec_ad(root, folder.name), config.data.image_size))
    print(f"report: {workdir / 'report.html'}")
    return result


def trivial_metrics(records: tuple[Record, ...], size: int) -> dict[str, float]:
    """Image and pixel AUROC of |image - mean training image|, scored and pooled as our maps are."""
    normal, test = ([r for r in records if r.split == split] for split in ("train", "test"))
    train_images, _ = _read(normal, size)
    images, masks = _read(test, size)
    maps = mean_difference_maps(train_images, images)
    scores = np.asarray(scoring.image_score(maps, window=max(1, round(scoring.WINDOW * size / 256))))
    labels = [record.label for record in test]
    return {"image_auroc": metrics.image_auroc(labels, scores), "pixel_auroc": metrics.pixel_auroc(masks, maps)}


def _read(records: list[Record], size: int) -> tuple[np.ndarray, np.ndarray]:
    batches = list(image_batches(records, image_size=size, batch_size=16, with_masks=True))
    return tuple(np.concatenate([batch[name] for batch in batches]) for name in ("image", "mask"))


def print_beside(ours: dict, trivial: dict[str, float]) -> None:
    """A small table of AUROC in percent."""
    print(f"{'AUROC':<34}{'image':>8}{'pixel':>8}")
    for name, row in (("pushpull_jax", ours), ("|image - mean training image|", trivial)):
        print(f"{name:<34}{100 * row['image_auroc']:>8.1f}{100 * row['pixel_auroc']:>8.1f}")
