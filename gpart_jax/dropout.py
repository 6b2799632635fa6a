"""Which elements of P theta are dropped, and how sums are dithered: by a hash of a key and of the element's canonical index alone.

So the mask is the same however leaves are stacked, stored and sharded, forward and backward; a few 32-bit operations make it
where it is used, inside of the fusion or the kernel that needs it. JAX's own random bits are an array of N words each time.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax import uint64
from gpart_jax.targets import Array, Leaf

# lowbias32, a mixer of 32 bits (github.com/skeeto/hash-prospector), and two odd numbers of MurmurHash3 and of the golden ratio.
_FIRST, _SECOND, _KEY, _HIGH = 0x7FEB352D, 0x846CA68B, 0xCC9E2D51, 0x9E3779B9


def key_words(key: jax.Array) -> jax.Array:
    """Two random words, uint32 (2,), from a `jax.random` key of any kind, however alike keys are."""
    return jax.random.bits(key, (2,), jnp.uint32)


def keep_mask(index_hi: Array, index_lo: Array, key_words: tuple[Array, Array] | Array, rate: float) -> jax.Array:
    """Whether each element is kept; with the probability 1 - rate, to within 2^-32. Runs in Pallas kernels too.

    Args:
      index_hi, index_lo: the elements' canonical indices, as two words: uint32 of shapes that broadcast.
      key_words: uint32 (2,) or a pair of uint32 scalars, from the function of that name.
      rate: the share that is dropped, a Python float in [0, 1).

    Returns:
      bool of the indices' common shape.
    """
    return kept(hashed(index_hi, index_lo, key_words), rate)


def kept(bits: jax.Array, rate: float) -> jax.Array:
    """`keep_mask` of what `hashed` returns."""
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def hashed(index_hi: Array, index_lo: Array, key_words: tuple[Array, Array] | Array) -> jax.Array:
    """32 bits of each element, uint32, of which `keep_mask` looks at the highest and `dithered` at the lowest 16."""
    first, second = key_words[0], key_words[1]
    # The second word here too: after one round alone, keys that differ in one bit of it have masks that are opposites.
    h = index_lo ^ (first + second * np.uint32(_KEY) + index_hi * np.uint32(_HIGH))
    h = (h ^ (h >> np.uint32(16))) * np.uint32(_FIRST)
    h = h ^ second  # amid the rounds: before them alone, two keys' masks would be one and the same, moved
    h = (h ^ (h >> np.uint32(15))) * np.uint32(_SECOND)
    return jnp.asarray(h ^ (h >> np.uint32(16)))


def dithered(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 rounded to bfloat16's grid, up with the probability of what it is above it, so that its mean is x. Still float32.

    What lies on the grid stays as it is, and so do infinities. Runs in Pallas kernels too.
    """
    noisy = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & np.uint32(0xFFFF))
    return jax.lax.bitcast_convert_type(noisy & np.uint32(0xFFFF0000), jnp.float32)


def scale(rate: float) -> np.float32:
    """What the elements that are kept are multiplied by."""
    return np.float32(1 / (1 - rate))


def index_words(
    leaf: Leaf, layer: int | Array | None = None, parts: Sequence[tuple[int, int | Array, int]] = ()
) -> tuple[jax.Array, jax.Array]:
    """The canonical indices of a leaf's elements, as (high, low) words for `keep_mask`.

    Args:
      layer: of a stacked leaf that layer alone, without the layer axis. May be traced.
      parts: (axis, start, length) each: that slice alone, of the leaf or of its layer. The starts may be traced.

    Returns:
      Two uint32 arrays, the low words of the shape of what is asked for; the high words of shape () where they are all equal.
    """
    shape, strides = leaf.shape, leaf.strides
    high, low = (jnp.asarray(word) for word in uint64.split(leaf.offset))
    one_high_word = not leaf.crosses_2_32
    steps = [step & uint64.MASK for step in strides]
    if layer is not None:
        number = jnp.asarray(layer, jnp.uint32)
        high, low = uint64.add(uint64.multiply((jnp.zeros_like(number), number), steps[0]), (high, low))
        shape, steps = shape[1:], steps[1:]
    lengths, begins = {axis: n for axis, _, n in parts}, {axis: start for axis, start, _ in parts}
    shape = tuple(lengths.get(axis, n) for axis, n in enumerate(shape))
    for axis, (n, step) in enumerate(zip(shape, steps)):
        along = jnp.arange(n, dtype=jnp.uint32)
        if axis in begins:
            along += jnp.asarray(begins[axis], jnp.uint32)
        along = along.reshape([-1 if k == axis else 1 for k in range(len(shape))])
        if one_high_word:
            low = low + along * np.uint32(step & 0xFFFFFFFF)
        else:
            high, low = uint64.add(uint64.multiply((jnp.zeros_like(along), along), step), (high, low))
    if one_high_word:
        high = jnp.uint32(leaf.offset >> 32)
    return high, jnp.broadcast_to(low, shape)
