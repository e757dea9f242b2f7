"""The demo: drawn parts with five kinds of defects, by the recipe of configs/quick.py made small, in half a minute.

    pushpull demo

Data: drawn by the program. Verified here: seeds 0 and 1, whole (docs/experiments.md, section 15).

Of 120 good parts 19 are held out, the fewest that can promise a false-positive rate of 5 %. A grid of half the side and
a quarter of the images in all are enough for these parts; `quick` itself takes four times as long.
"""

from dataclasses import replace

from pushpull_jax.config import load_config

quick = load_config("quick")
config = replace(
    quick,
    features=replace(quick.features, grid=16),
    reconstructor=replace(quick.reconstructor, fold=2),
    training=replace(quick.training, steps=50, batch_size=8, learning_rate=2e-3, warmup_steps=5),
    scoring=replace(quick.scoring, held_out=0.16),
)
