"""One class of CIFAR-10 is normal, the others are anomalous: our recipe at 32 px, in minutes on two CPU cores.

    pushpull train quick_cifar10 --data.source classes --data.root ROOT --data.category airplane --workdir runs/airplane

Data: a folder of classes, or CIFAR-10 by tensorflow-datasets without --data.source and --data.root.
Verified here: docs/experiments.md, section 10, one class of a subset.
"""

from dataclasses import replace

from pushpull_jax.config import Data, load_config

quick = load_config("quick")
config = replace(
    quick,
    data=Data(source="cifar10", image_size=32),
    features=replace(quick.features, grid=8),
    reconstructor=replace(quick.reconstructor, fold=1),
    training=replace(quick.training, batch_size=32),
    scoring=replace(quick.scoring, smoothing=0.0, blocks=(1,)),
)
