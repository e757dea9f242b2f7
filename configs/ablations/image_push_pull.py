"""Eq. 9: weight of the push term against the number of cells in the score of an image, on three seeds.

    pushpull ablate image_push_pull --data.root ROOT --data.category CATEGORY --workdir runs/image_push_pull

Data: any with test anomalies; ten of them are labelled as images, and leave the test set of their seed.
Paper: alpha 0.003 and k 20 on CIFAR-10; it tells of no other values. Verified here: a few steps in the test suite.
"""

from dataclasses import replace

from pushpull_jax.config import Ablation, load_config

quick, images = load_config("quick"), load_config("quick_images")
config = replace(quick, training=replace(quick.training, loss="push_pull"), supervision=images.supervision)
ablation = Ablation(config, {"supervision.alpha": (0.003, 0.03, 0.3), "supervision.k": (5, 20, 80), "seed": (0, 1, 2)})
