"""GPart in JAX: end-to-end isometric fine-tuning through one vector (arXiv 2605.14841)."""

from gpart_jax.adapter import load_adapter, save_adapter
from gpart_jax.methods import Method, chain, full, gpart, head, lora
from gpart_jax.partition import Partition, make_partition
from gpart_jax.targets import Layout, Leaf, canonical_layout
from gpart_jax.transform import gpart_transform

__all__ = [
    "Layout",
    "Leaf",
    "Method",
    "Partition",
    "canonical_layout",
    "chain",
    "full",
    "gpart",
    "gpart_transform",
    "head",
    "load_adapter",
    "lora",
    "make_partition",
    "save_adapter",
]
