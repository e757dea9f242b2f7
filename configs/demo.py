"""The demo: drawn parts with five kinds of defects, by the recipe of configs/quick.py.

pushpull demo
"""

from pushpull_jax.config import load_config

config = load_config("quick")
