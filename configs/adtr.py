"""The paper's values (ADTR, arXiv 2209.01816, normal samples only), EfficientNet-Lite0 standing in for B4.

    pushpull train adtr --data.root ROOT --data.category CATEGORY --workdir runs/CATEGORY

Batch 16, AdamW, learning rate 1e-4, weight decay 1e-4, 500 epochs, times 0.1 at epoch 400. The steps below are 500
epochs of 188 images, those of MVTec-AD's bottle that are not held out; give --training.steps for other categories. The
gradient is clipped at 0.1 (UniAD).
"""

from pushpull_jax.config import Checkpoint, Config, Features, Log, Reconstructor, Scoring, Training

config = Config(
    features=Features(stages=(1, 2, 3, 4, 5), grid=16),
    reconstructor=Reconstructor(width=256, encoder_layers=4, decoder_layers=4, heads=8, hidden=1024, dropout=0.1),
    training=Training(steps=5875, batch_size=16, learning_rate=1e-4, schedule="step", weight_decay=1e-4, clip_norm=0.1),
    scoring=Scoring(smoothing=0.0, window=16),
    log=Log(every=20),
    checkpoint=Checkpoint(every=200),
)
