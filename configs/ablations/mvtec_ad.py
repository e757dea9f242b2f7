"""A model of our recipe for each category of MVTec-AD: fifteen, trained in one program.

    pushpull ablate mvtec_ad --data.root MVTEC_AD --workdir runs/mvtec_ad

Data: MVTec-AD; the features of all its images are in memory at once, 11 GB.
Verified here: a few steps in the test suite.
"""

from pushpull_jax.config import Ablation, load_config
from pushpull_jax.data.mvtec_ad import MVTEC_AD_CATEGORIES

ablation = Ablation(load_config("quick"), {"data.category": MVTEC_AD_CATEGORIES})
