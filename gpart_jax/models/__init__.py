"""Flax models, and pretrained weights for them."""
