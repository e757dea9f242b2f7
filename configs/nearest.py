"""The yardstick: nearest neighbour among 6,000 training cells, on the features of configs/quick.py. Nothing is trained.

    pushpull train nearest --data.root ROOT --data.category CATEGORY --workdir runs/CATEGORY_nearest

Data: any. Its score map is the distance to the nearest cell, smoothed as in quick.
Verified here: bottle, toothbrush and juice_bottle, seeds 0 to 2; the figures are in the README.
"""

from dataclasses import replace

from pushpull_jax.config import Reconstructor, Scoring, load_config

quick = load_config("quick")
config = replace(
    quick,
    reconstructor=Reconstructor(kind="nearest", cells=6000),
    training=replace(quick.training, steps=0),
    scoring=Scoring(smoothing=3.0),
)
