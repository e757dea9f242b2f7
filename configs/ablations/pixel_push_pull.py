"""Eq. 7: weight of the push term on ten labelled masks, on three seeds.

    pushpull ablate pixel_push_pull --data.root ROOT --data.category CATEGORY --workdir runs/pixel_push_pull

Data: any with test anomalies that have masks; ten leave the test set of their seed.
Paper: alpha 0.003 on MVTec-AD; it tells of no other values. Verified here: a few steps in the test suite.
"""

from dataclasses import replace

from pushpull_jax.config import Ablation, load_config

quick, masks = load_config("quick"), load_config("quick_masks")
config = replace(quick, training=replace(quick.training, loss="push_pull"), supervision=masks.supervision)
ablation = Ablation(config, {"supervision.alpha": (0.0, 0.003, 0.01, 0.03, 0.1, 0.3), "seed": (0, 1, 2)})
