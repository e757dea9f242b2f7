"""Flax linen networks: the frozen backbones and the reconstructors."""
