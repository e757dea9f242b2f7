"""Our recipe with confetti anomalies: eq. 7 by stage on noisy copies, from a normal-only run of configs/quick.py on.

    pushpull train quick_confetti --data.root ROOT --data.category CATEGORY --workdir runs/CATEGORY_confetti \\
        --training.start runs/CATEGORY

No label is needed: the run that it starts from is one of quick, with whatever shots are given here.
Data: any. Verified here: docs/experiments.md, section 9, on bottle, toothbrush and juice_bottle, seeds 0 to 2.
"""

from dataclasses import replace

from pushpull_jax.config import Supervision, load_config

masks = load_config("quick_masks")
config = replace(
    masks, supervision=Supervision(confetti_copies=1, share=0.5, by_stage=True, alpha=masks.supervision.alpha)
)
