"""The same with irrelevant images as anomalies by image (eq. 8 and 9), from a run of configs/quick_cifar10.py on.

    pushpull train quick_cifar10_images --data.source classes --data.root ROOT --data.category airplane \\
        --supervision.irrelevant FOLDER --training.start runs/airplane --workdir runs/airplane_images

Data: as for quick_cifar10; the irrelevant images are those of a folder, or CIFAR-100 by tensorflow-datasets.
Verified here: docs/experiments.md, section 10, one class of a subset.
"""

from dataclasses import replace

from pushpull_jax.config import Supervision, load_config

cifar10 = load_config("quick_cifar10")
config = replace(
    cifar10,
    training=replace(cifar10.training, steps=60, learning_rate=3e-4, warmup_steps=10, loss="push_pull"),
    supervision=Supervision(irrelevant="cifar100", share=0.5, normals="image", by_stage=True, alpha=0.1),
)
