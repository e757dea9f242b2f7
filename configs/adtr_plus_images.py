"""ADTR+ by images on CIFAR-10: eq. 8 and 9, with as many irrelevant images of CIFAR-100 as normal ones.

    pushpull train adtr_plus_images --data.category airplane --workdir runs/airplane_plus

Data: CIFAR-10 and CIFAR-100 by tensorflow-datasets; or --data.source classes --data.root ROOT --supervision.irrelevant
FOLDER. Paper: 96.1 image AUROC (mean of ten classes), alpha 0.003, k 20.
Verified here: a few steps in the test suite.
"""

from dataclasses import replace

from pushpull_jax.config import Supervision, load_config

cifar10 = load_config("adtr_cifar10")
config = replace(
    cifar10,
    training=replace(cifar10.training, loss="push_pull"),
    supervision=Supervision(irrelevant="cifar100", share=0.5, normals="image", alpha=0.003, k=20),
)
