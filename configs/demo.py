"""The demo: drawn parts with five kinds of defects.

    pushpull demo
"""

from pushpull_jax.config import Checkpoint, Config, Features, Reconstructor, Scoring, Training

config = Config(
    features=Features(stages=(1, 2, 3, 4), grid=32, standardise=True),
    reconstructor=Reconstructor(encoder_layers=2, decoder_layers=2, hidden=512, dropout=0.0, fold=4),
    training=Training(steps=100, learning_rate=1e-3, warmup_steps=10),
    scoring=Scoring(smoothing=4.0),
    checkpoint=Checkpoint(every=50),
)
