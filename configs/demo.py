"""The demo: drawn parts with five kinds of defects, by the recipe of configs/quick.py.

    pushpull demo

Data: drawn by the program. Verified here: a few steps in the test suite.

Of 120 good parts 19 are held out, the fewest that can promise a false-positive rate of 5 %.
"""

from dataclasses import replace

from pushpull_jax.config import load_config

quick = load_config("quick")
config = replace(quick, scoring=replace(quick.scoring, held_out=0.16))
