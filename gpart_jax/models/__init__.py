"""Flax models, and pretrained weights for them."""

from gpart_jax import requirements

requirements.check_flax()
