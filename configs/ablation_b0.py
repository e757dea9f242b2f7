"""The paper's ablation of the backbone, EfficientNet-B0, everything else as in configs/adtr.py.

    pushpull train ablation_b0 --data.root MVTEC_AD --data.category CATEGORY --workdir runs/CATEGORY_b0

Data: MVTec-AD. Paper: 96.4 pixel AUROC (mean of 15 categories), against 97.2 of the full method.
Verified here: a few steps in the test suite.
"""

from dataclasses import replace

from pushpull_jax.config import load_config

adtr = load_config("adtr")
config = replace(adtr, features=replace(adtr.features, backbone="tf_efficientnet_b0"))
