"""What the kernel of a dense layer can be: an array, or something else that can be applied to activations (models/linear.py).

W0 + D rounds to the dtype of W0. In bfloat16 that loses all of a delta's entries that are below half of W0's last place, which are
most of them as long as the delta is small. Applied apart, x W0 + x D, no entry is lost, and only the products are rounded as they are
added: the authors' release and PEFT compute it so. A low-rank delta, x A B, then needs no array of the kernel's size. What each costs
and loses: docs/bfloat16.md.

A method puts these where `is_kernel` says; `merged` makes arrays of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpart_jax.targets import Params, wide


class Split(NamedTuple):
    """x W0 + x D."""

    kernel: jax.Array  # W0, (in, out)
    delta: jax.Array  # D, (in, out)


class LowRank(NamedTuple):
    """x W0 + dropout(x) A B, each row's mask by a key of its own."""

    kernel: jax.Array  # W0, (in, out)
    a: jax.Array  # (in, r)
    b: jax.Array  # (r, out)
    keys: jax.Array | None = None  # uint32 (B, 2): of the rows of x; None: no dropout
    keep: jax.Array | float = 1.0  # the share of x that is kept


Kernel = jax.Array | Split | LowRank


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether a leaf is the kernel of one of our dense layers, as it is where it is applied."""
    return path.endswith("kernel") and leaf.ndim == 2


def apply(kernel: Kernel, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x (..., in) through a kernel: (..., out), in `dtype`."""
    if isinstance(kernel, Split):
        return apply(kernel.kernel, x, dtype) + apply(kernel.delta, x, dtype)
    if isinstance(kernel, LowRank):
        dropped = x if kernel.keys is None else _dropped(x, kernel.keys, kernel.keep)
        return apply(kernel.kernel, x, dtype) + apply(kernel.b, apply(kernel.a, dropped, dtype), dtype)
    return jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), (((x.ndim - 1,), (0,)), ((), ())))


def add(weight: jax.Array, delta: jax.Array) -> jax.Array:
    """W0 + D, rounded to the dtype of W0."""
    held = weight.astype(wide(weight.dtype)) if is_narrow(weight.dtype) else weight
    return (held + delta).astype(weight.dtype)


def is_narrow(dtype: DTypeLike) -> bool:
    """Whether a floating-point dtype has so few bits that JAX promotes it to no other by itself: float8 and less."""
    return jnp.finfo(dtype).bits < 16


def _dropped(x, keys, keep):
    def of_row(words, row):  # more tokens leave the masks of the first as they are
        return jnp.where(jax.random.bernoulli(jax.random.wrap_key_data(words), keep, row.shape), row / keep, 0).astype(row.dtype)

    return jax.vmap(of_row)(keys, x)


def merged(params: Params) -> Params:
    """`params` with an array in the place of each `Split` and `LowRank`: without dropout, rounded to W0's dtype."""

    def merge(kernel):
        if isinstance(kernel, Split):
            return add(kernel.kernel, kernel.delta)
        if isinstance(kernel, LowRank):
            return add(kernel.kernel, kernel.a @ kernel.b)
        return kernel

    return jax.tree.map(merge, params, is_leaf=lambda x: isinstance(x, Split | LowRank))
