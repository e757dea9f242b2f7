"""Our recipe with ten image labels: eq. 8 and 9 by stage, from a normal-only run of configs/quick.py on.

    pushpull train quick_images --data.root ROOT --data.category CATEGORY --workdir runs/CATEGORY_images \\
        --training.start runs/CATEGORY

The run that it starts from is that of configs/quick_masks.py. Data: any with test anomalies.
Verified here: docs/experiments.md, section 9, on bottle, toothbrush and juice_bottle, seeds 0 to 2.
"""

from dataclasses import replace

from pushpull_jax.config import load_config

masks = load_config("quick_masks")
config = replace(masks, supervision=replace(masks.supervision, labels=("image",)))
