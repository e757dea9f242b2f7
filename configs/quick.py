"""Our recipe: EfficientNet-Lite0 at 256 px, a 32x32 grid folded into 64 tokens, minutes on a laptop.

    pushpull train quick --data.root ROOT --data.category CATEGORY --workdir runs/CATEGORY

Data: any in the layout of MVTec-AD. What differs from the paper, and why, is in docs/experiments.md.
Verified here: bottle, toothbrush and juice_bottle, seeds 0 to 2; the figures are in the README.
"""

from pushpull_jax.config import Config, Features, Reconstructor, Scoring, Training

config = Config(
    features=Features(
        stages=(2, 3, 4, 5),
        # The root of a stage's channels, but no more for stage 5, which is coarse: between concatenation and equality.
        stage_weights=(4.9, 6.3, 10.6, 10.6),
        grid=32,
        resample="area",
        standardise=True,
    ),
    reconstructor=Reconstructor(encoder_layers=2, decoder_layers=2, hidden=512, dropout=0.0, fold=4),
    training=Training(steps=200, learning_rate=1e-3, warmup_steps=20, jitter=1.0),
    # Fine defects want the fine stages, misplaced parts the coarse one: all have a say in the map, stage 5 the least,
    # and the mean residual of the image tells of what is missing.
    scoring=Scoring(map="whitened", map_weights=(1.0, 1.0, 1.0, 0.25), blocks=(1,), smoothing=3.0),
)
