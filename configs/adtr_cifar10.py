"""ADTR on CIFAR-10: one class is normal, nine are anomalous; the whole test set, ten runs.

    pushpull train adtr_cifar10 --data.category airplane --workdir runs/airplane

Data: CIFAR-10 by tensorflow-datasets; a folder of classes with --data.source classes --data.root ROOT.
Paper: 94.7 image AUROC (mean of ten classes).
Verified here: a few steps in the test suite.

Batch 128 and an 8x8 grid of 32 px images are the paper's; it does not tell epochs and learning rate, which are those of
MVTec-AD but for the number: 100 epochs of 4500 images.
"""

from dataclasses import replace

from pushpull_jax.config import Data, Features, load_config

adtr = load_config("adtr")
config = replace(
    adtr,
    data=Data(source="cifar10", image_size=32),
    features=Features(backbone="tf_efficientnet_b4", stages=(1, 2, 3, 4, 5), grid=8),
    training=replace(adtr.training, steps=3520, batch_size=128),
)
