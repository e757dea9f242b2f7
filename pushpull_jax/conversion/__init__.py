"""Conversion of pretrained weights to our parameter trees, in NumPy alone: one module a family of networks."""
