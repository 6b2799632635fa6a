"""What tells one base model from another: a checksum of every weight, by integer arithmetic.

Integer sums come out the same in any order: on every backend, under every sharding, in float32 and in bfloat16. Each
process sums what its own devices hold, so that a model of 8 billion weights is read once, where it lies, and never moved.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax.targets import PyTree, Targets, floating, select


def base_fingerprint(params: PyTree, head_targets: Targets = None) -> str:
    """16 hexadecimal digits of the path, shape and checksum of each leaf outside the head. All processes call it.

    Any one weight of a leaf that changes changes it, and several do but for one case in 2^32. Weights enter rounded to
    bfloat16, so that a model keeps its fingerprint when it is loaded in that. What it doesn't see: smaller changes, the
    head, and what isn't in params, as a model's config and its tokenizer. It isn't cryptographic: a model can be made to
    have a given one.
    """
    own = select(params, head_targets) if head_targets is not None else {}
    digest = hashlib.sha256()
    for path, leaf in floating(params).items():
        if path not in own:  # awaited one by one: sums over processes that overtake one another may never end
            digest.update(f"{path}{tuple(leaf.shape)}".encode() + np.asarray(_checksum(leaf)).astype("<u4").tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def _checksum(leaf):
    """uint32 (): the sum of all weights' bits, each times an odd hash of its place, modulo 2^32."""
    if leaf.dtype == jnp.bfloat16:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32)
    else:  # to bfloat16, ties to even, in integers: denormals have the same bits everywhere
        wide = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        bits = (wide + np.uint32(0x7FFF) + ((wide >> 16) & np.uint32(1))) >> 16
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, n in enumerate(leaf.shape):
        place = place * np.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(bits * (_mix(place) | np.uint32(1)), dtype=jnp.uint32)


def _mix(x):
    """The finalizer of MurmurHash3, a bijection of 32-bit numbers."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
