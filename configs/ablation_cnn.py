"""The paper's ablation "CNN instead of the transformer", everything else as in configs/adtr.py.

    pushpull train ablation_cnn --data.root MVTEC_AD --data.category CATEGORY --workdir runs/CATEGORY_cnn

Data: MVTec-AD. Paper: 94.4 pixel AUROC (mean of 15 categories), against 97.2 of the full method.
Verified here: a few steps in the test suite.

The paper tells nothing else of its CNN; ours has as many parameters as the transformer (models/convolutional.py).
"""

from dataclasses import replace

from pushpull_jax.config import load_config

adtr = load_config("adtr")
config = replace(adtr, reconstructor=replace(adtr.reconstructor, kind="convolutional"))
