"""The paper's ablation "reconstructing pixels", everything else as in configs/adtr.py.

    pushpull train ablation_pixels --data.root MVTEC_AD --data.category CATEGORY --workdir runs/CATEGORY_pixels

Data: MVTec-AD. Paper: 91.3 pixel AUROC (mean of 15 categories), against 97.2 of the full method.
Verified here: a few steps in the test suite.

A cell holds the 16x16 pixels under it (models/pixels.py).
"""

from dataclasses import replace

from pushpull_jax.config import load_config

adtr = load_config("adtr")
config = replace(adtr, features=replace(adtr.features, backbone="pixels", stages=(4,)))
