"""GPart in JAX: end-to-end isometric fine-tuning through one vector (arXiv 2605.14841)."""

from gpart_jax.partition import Partition, make_partition
from gpart_jax.targets import Layout, Leaf, canonical_layout
from gpart_jax.transform import gpart_transform

__all__ = ["Layout", "Leaf", "Partition", "canonical_layout", "gpart_transform", "make_partition"]
