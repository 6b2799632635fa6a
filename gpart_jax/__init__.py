"""GPart in JAX: end-to-end isometric fine-tuning through one vector (arXiv 2605.14841)."""

from gpart_jax.adapter import Adapter, load_adapter, save_adapter
from gpart_jax.methods import Method, bitfit, chain, fastfood, full, gpart, head, lora, uni_lora, vera
from gpart_jax.partition import Partition, make_partition
from gpart_jax.targets import Layout, Leaf, canonical_layout
from gpart_jax.transform import gpart_transform

__all__ = [
    "Adapter",
    "Layout",
    "Leaf",
    "Method",
    "Partition",
    "bitfit",
    "canonical_layout",
    "chain",
    "fastfood",
    "full",
    "gpart",
    "gpart_transform",
    "head",
    "load_adapter",
    "lora",
    "make_partition",
    "save_adapter",
    "uni_lora",
    "vera",
]
