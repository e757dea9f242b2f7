"""ADTR+ by pixels: eq. 7 on confetti anomalies, 300 epochs more from a run of configs/adtr.py.

    pushpull train adtr_plus_pixels --data.root MVTEC_AD --data.category CATEGORY --training.start runs/CATEGORY \\
        --workdir runs/CATEGORY_plus

Data: MVTec-AD. Paper: 96.9 image AUROC, 97.5 pixel AUROC (mean of 15 categories).
Verified here: a few steps in the test suite; the same on our recipe is configs/quick_confetti.py.

A training image is replaced by a noisy one with probability 0.5 (FCDD), here half of every batch; each has four noisy
copies, whose features are extracted once. The steps are 300 epochs of 188 images.
"""

from dataclasses import replace

from pushpull_jax.config import Supervision, load_config

adtr = load_config("adtr")
config = replace(
    adtr,
    training=replace(adtr.training, steps=3525, schedule="constant", loss="push_pull"),
    supervision=Supervision(confetti_copies=4, share=0.5, alpha=0.003),
)
