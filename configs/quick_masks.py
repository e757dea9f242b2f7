"""Our recipe with ten masks: eq. 7 by stage on ten labelled anomalies, from a normal-only run of configs/quick.py on.

    pushpull train quick --data.root ROOT --data.category CATEGORY --workdir runs/CATEGORY \\
        --supervision.shots 10 --supervision.labels unused
    pushpull train quick_masks --data.root ROOT --data.category CATEGORY --workdir runs/CATEGORY_masks \\
        --training.start runs/CATEGORY

Data: any with test anomalies that have masks; the ten leave the test set of both runs.
Verified here: docs/experiments.md, section 9, on bottle, toothbrush and juice_bottle, seeds 0 to 2.
"""

from dataclasses import replace

from pushpull_jax.config import Supervision, load_config

quick = load_config("quick")
config = replace(
    quick,
    training=replace(quick.training, steps=60, batch_size=16, learning_rate=3e-4, warmup_steps=10, loss="push_pull"),
    supervision=Supervision(shots=10, labels=("mask",), share=0.5, by_stage=True, alpha=0.1),
)
