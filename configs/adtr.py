"""ADTR, the paper's values (arXiv 2209.01816), normal samples only: one model a category.

    pushpull train adtr --data.root MVTEC_AD --data.category CATEGORY --workdir runs/CATEGORY

Data: MVTec-AD. Paper: 96.4 image AUROC, 97.2 pixel AUROC (mean of 15 categories).
Verified here: a few steps in the test suite; not trained to its end, which takes hours on two CPU cores.

Batch 16, AdamW, learning rate 1e-4, weight decay 1e-4, 500 epochs, times 0.1 at epoch 400. The steps below are 500
epochs of 188 images, those of bottle that are not held out: for n images give --training.steps of 500 n / 16. The
gradient is clipped at 0.1 (UniAD). The grid of 16x16 and factorised positions are two of several readings of the paper.
"""

from pushpull_jax.config import Checkpoint, Config, Features, Log, Reconstructor, Training

config = Config(
    features=Features(backbone="tf_efficientnet_b4", stages=(1, 2, 3, 4, 5), grid=16),
    reconstructor=Reconstructor(width=256, encoder_layers=4, decoder_layers=4, heads=8, hidden=1024, dropout=0.1),
    training=Training(steps=5875, batch_size=16, learning_rate=1e-4, schedule="step", weight_decay=1e-4, clip_norm=0.1),
    log=Log(every=20),
    checkpoint=Checkpoint(every=200),
)
