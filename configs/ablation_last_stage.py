"""The paper's ablation "last stage only", everything else as in configs/adtr.py.

    pushpull train ablation_last_stage --data.root MVTEC_AD --data.category CATEGORY --workdir runs/CATEGORY_last_stage

Data: MVTec-AD. Paper: 96.0 pixel AUROC (mean of 15 categories), against 97.2 of the full method.
Verified here: a few steps in the test suite.
"""

from dataclasses import replace

from pushpull_jax.config import load_config

adtr = load_config("adtr")
config = replace(adtr, features=replace(adtr.features, stages=(5,)))
