"""GPart in JAX: end-to-end isometric fine-tuning through one vector (arXiv 2605.14841)."""

import importlib.metadata

import jax

from gpart_jax import requirements

requirements.warn_of_old_jax(jax.__version__)

from gpart_jax.adapter import Adapter, load_adapter, save_adapter  # noqa: E402
from gpart_jax.isometry import base_norm, learning_rate  # noqa: E402
from gpart_jax.methods import Method, bitfit, chain, fastfood, full, gpart, head, lora, uni_lora, vera  # noqa: E402
from gpart_jax.partition import Partition, make_partition  # noqa: E402
from gpart_jax.targets import Layout, Leaf, canonical_layout  # noqa: E402
from gpart_jax.transform import gpart_transform  # noqa: E402

try:
    __version__ = importlib.metadata.version("gpart_jax")
except importlib.metadata.PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Adapter",
    "Layout",
    "Leaf",
    "Method",
    "Partition",
    "__version__",
    "base_norm",
    "bitfit",
    "canonical_layout",
    "chain",
    "fastfood",
    "full",
    "gpart",
    "gpart_transform",
    "head",
    "learning_rate",
    "load_adapter",
    "lora",
    "make_partition",
    "save_adapter",
    "uni_lora",
    "vera",
]
