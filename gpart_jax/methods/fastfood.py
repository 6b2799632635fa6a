"""Fastfood: a dense random projection of theta without its matrix."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax import uint64
from gpart_jax.methods.base import Method, adding, one_of, registered
from gpart_jax.partition import seed_to_int
from gpart_jax.targets import Leaf, Targets, canonical_layout


@registered(size="d")
def fastfood(d: int, seed: int = 0, *, targets: Targets = None, stacked: str | None = None) -> Method:
    """W = W0 + P theta with the dense P of Fastfood (Le et al., ICML 2013; for fine-tuning: arXiv 2012.13255, section 3).

    theta is padded to L, the next power of two, and the N weights to whole blocks of L. Block c is
    H G_c Pi_c H B_c theta / sqrt(L N): B_c random signs, H the Walsh-Hadamard matrix, Pi_c a permutation, G_c normal. All
    are hashes of (seed, c, position), computed anew at each use: nothing of N entries is held. P is an isometry only on
    the average over seeds: E |P theta|^2 = |theta|^2. A product costs N log L additions, where GPart's costs N.

    Args:
      d: length of theta, 1 <= d <= N.
      seed: an int in [0, 2^64).
      targets: as in `canonical_layout`.
      stacked: a pattern of leaves whose first axis counts layers, as in `canonical_layout`.

    Returns:
      A `Method` that trains {"theta": float32 (d,)}, zero at the start.
    """
    length = 1 << max(d - 1, 0).bit_length()
    number = seed_to_int(seed)

    def layout_of(params):
        layout = canonical_layout(params, targets, stacked=stacked)
        if not 1 <= d <= layout.size:
            raise ValueError(f"d = {d} must be between 1 and N = {layout.size}, the number of adapted weights.")
        return layout

    def init(params, key):
        del key
        layout_of(params)
        return {"theta": jnp.zeros(d, jnp.float32)}

    def make_tables(params):
        del params
        return np.array(uint64.split(number), np.uint32)

    def bind(params, trainable, key=None, on_mesh=False, tables=None, rows=None):
        layout = layout_of(params)
        key = make_tables(params) if tables is None else tables
        leaves = {leaf.path: leaf for leaf in layout.leaves}
        theta = jnp.pad(one_of(trainable["theta"], on_mesh), (0, length - d)) / math.sqrt(length * layout.size)

        def deltas(path, layer):
            return _expand(leaves[path], layer, key, theta) if path in leaves else None

        return adding(deltas)

    return Method(init, bind, make_tables, linear=True, isometric=True)


def _expand(leaf: Leaf, layer, key, theta):
    """P theta in a leaf or one of its layers, whose elements follow one another in the canonical order."""
    if not all(piece.is_dense for piece in leaf.layers()):
        raise ValueError(f"fastfood can't adapt {leaf.path!r}, whose elements are not numbered in row-major order.")
    if leaf.stacked and layer is None:
        every = jax.vmap(lambda number: _expand(leaf, number, key, theta))
        return every(jnp.arange(leaf.shape[0]))
    shape = leaf.shape if layer is None else leaf.shape[1:]
    size, length = math.prod(shape), len(theta)
    offsets = np.array([piece.offset for piece in leaf.layers()], np.int64)
    numbers, skips = np.divmod(offsets, length)
    blocks = -(-(int(skips.max()) + size) // length)
    at = 0 if layer is None else layer
    first, skip = (jnp.asarray(x.astype(np.int32))[at] for x in (numbers, skips))
    rows = _blocks(key, first + jnp.arange(blocks), theta)  # (blocks, L)
    return jax.lax.dynamic_slice(rows.reshape(-1), (skip,), (size,)).reshape(shape)


@jax.jit
@jax.checkpoint  # signs and permutations are made again on the way back, not kept
def _blocks(key, numbers, theta):
    """The given blocks of P theta, (blocks, L)."""
    length = len(theta)
    count = length.bit_length() - 1
    high, low = uint64.multiply((jnp.zeros_like(numbers, jnp.uint32), numbers.astype(jnp.uint32)), uint64.GAMMA)
    seeds = uint64.mix(uint64.add((high, low), tuple(key)))  # of each block
    position = jnp.arange(length, dtype=jnp.uint32)
    own = tuple(word[:, None] for word in seeds)
    bits, normal_bits = uint64.mix(uint64.add(own, (jnp.zeros_like(position), position)))  # (blocks, L) each
    signs = 1.0 - 2.0 * (bits & np.uint32(1)).astype(jnp.float32)
    order = _permute(position, own, count).astype(jnp.int32)
    rows = _hadamard(signs * theta)
    rows = jax.vmap(lambda row, at: row.at[at].get(unique_indices=True, mode="promise_in_bounds"))(rows, order)
    uniform = ((normal_bits >> np.uint32(8)).astype(jnp.float32) + 0.5) * 2.0**-23 - 1.0
    return _hadamard(np.sqrt(2).astype(np.float32) * jax.lax.erf_inv(uniform) * rows)


def _permute(position, own, bits: int):
    """A permutation of 0 ... 2^bits - 1 for each block: four rounds, each of which can be undone."""
    mask = np.uint32(2**bits - 1)
    x = position
    for round_, word in enumerate((*own, *own)):
        x = (x * (2 * word + 1) + (word >> np.uint32(16 if round_ < 2 else 8))) & mask
        x = x ^ (x >> np.uint32(max(1, bits // 2)))
    return x


def _hadamard(rows):
    """Each row times the Walsh-Hadamard matrix of its length, 2^n, of entries 1 and -1."""
    blocks, length = rows.shape
    bits = length.bit_length() - 1
    done = 0
    while done < bits:  # 64 by 64 products: few passes over memory, and what matrix units are made for
        take = min(6, bits - done)
        matrix = np.ones((1, 1), np.float32)
        for _ in range(take):
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        rows = rows.reshape(blocks, -1, 2**take, 2**done)
        rows = jnp.einsum("bxiy,ij->bxjy", rows, matrix, precision="highest")
        done += take
    return rows.reshape(blocks, length)
