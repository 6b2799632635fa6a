"""Attention of the decoder, the encoder and the ViT: in XLA's operations, or in a kernel that keeps the scores on the chip.

"splash" is JAX's own TPU kernel (`jax.experimental.pallas.ops.tpu.splash_attention`, after arXiv 2205.14135). It passes over
blocks that a causal mask or a window hides. "cudnn" is cuDNN's, through `jax.nn.dot_product_attention`. "xla" writes all scores to
memory; it is the reference, works everywhere, and is what generation and dropout on attention weights use.

In the comments B is the batch, L the queries, S the keys, A the heads, K the key and value heads, and D the size of one head.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

IMPLEMENTATIONS = ("xla", "splash", "cudnn")
CHOICES = ("auto", *IMPLEMENTATIONS)
# Rows and columns of scores that the TPU kernel makes at once: what one score costs then. By estimate for v5e, bfloat16, 8 heads of
# 128, 1,024 columns, there and back; blocks of 1,024 cost no less, and skip less.
_BLOCKS = {512: 1.0, 256: 1.65, 128: 3.3}
KEPT = "attention"  # what its backward pass needs goes by this name in `jax.checkpoint`'s policies
_INTERPRET = False  # tests run the TPU kernel on a CPU


class Pattern(NamedTuple):
    """What a query sees."""

    causal: bool
    window: int | None = None  # keys, itself included; where not causal, so many on both sides; None: all
    soft_cap: float | None = None  # scores s become cap * tanh(s / cap)
    packed: bool = True  # a row may hold several texts, which don't see one another; False, cheaper in XLA: one and padding


def choose(choice: str, platform: str, dtype: DTypeLike, head_dim: int, pattern: Pattern, dropout: float = 0.0) -> str:
    """The implementation, one of IMPLEMENTATIONS, that a choice means on a platform.

    Args:
      choice: of CHOICES. "auto" takes the platform's kernel where it can compute this, and "xla" elsewhere.
      platform: of the devices, as `jax.Device.platform` has it.
      dtype: of queries, keys and values.
      dropout: the rate on attention weights in training.

    Raises:
      ValueError: an unknown choice, or a kernel that can't compute this.
    """
    if choice not in CHOICES:
        raise ValueError(f"config.model.attention = {choice!r} must be one of {', '.join(CHOICES)}.")
    kernel = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla") if choice == "auto" else choice
    obstacle = _obstacle(kernel, platform, jnp.dtype(dtype), head_dim, pattern, dropout)
    if obstacle and choice != "auto":
        raise ValueError(f"config.model.attention = {choice!r} {obstacle}. Choose 'auto' or 'xla'.")
    return "xla" if obstacle else kernel


def _obstacle(kernel, platform, dtype, head_dim, pattern, dropout) -> str | None:
    if kernel == "xla":
        return None
    if platform not in {"splash": ("tpu",), "cudnn": ("gpu", "cuda")}[kernel]:
        return f"needs a {'TPU' if kernel == 'splash' else 'GPU'}, but the devices are of platform {platform!r}"
    if dropout:
        return f"has no dropout on attention weights, and this model's rate is {dropout}"
    if kernel == "splash":
        return None
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, not in {dtype.name}"
    if head_dim % 8 or head_dim > 128:
        return f"takes heads of up to 128 numbers, a multiple of 8, not {head_dim}"
    return "has no soft cap" if pattern.soft_cap else None


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    pattern: Pattern,
    implementation: str = "xla",
    *,
    start: jax.Array | int = 0,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """softmax(query key^T / sqrt(D)) value, of the keys that each query sees.

    Args:
      query: (B, L, A, D).
      key: (B, S, K, D), where K divides A: each serves A / K heads of queries, one after another.
      value: likewise.
      segments: int or bool (B, L), to which text of a row each token belongs; 0: padding, on either side. None: all to one. With
        None, S may be more than L.
      pattern: what a query sees of its segment.
      implementation: of IMPLEMENTATIONS; see `choose`. The kernels need L = S.
      start: the column of the first query among the keys, or of each row's, int (B,); "xla" alone.
      drop: dropout of the weights, float32 (B, A, L, S); "xla" alone.

    Returns:
      (B, L, A, D), in the queries' dtype. That of padding is finite, and means nothing.
    """
    if implementation == "splash":
        return _by_splash(query, key, value, segments, pattern)
    mask = _mask(segments, query.shape[1], key.shape[1], start, pattern)
    if implementation == "cudnn":
        mask = None if mask is None else mask[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    batch, length, heads, size = query.shape
    if heads == key.shape[2]:  # without an axis of groups, for which XLA would transpose the scores
        scores = jnp.einsum("blad,bsad->bals", query, key, preferred_element_type=jnp.float32) * size**-0.5
    else:
        grouped = query.reshape(batch, length, key.shape[2], -1, size)  # (B, L, K, A / K, D)
        scores = jnp.einsum("blkgd,bskd->bkgls", grouped, key, preferred_element_type=jnp.float32) * size**-0.5
        scores = scores.reshape(batch, heads, length, -1)
    if pattern.soft_cap:
        scores = pattern.soft_cap * jnp.tanh(scores / pattern.soft_cap)
    if mask is not None:  # the lowest finite number, not -inf: a row that sees nothing gets even weights instead of 0/0
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores)  # (B, A, L, S)
    weights = (weights if drop is None else drop(weights)).astype(query.dtype)
    if heads == key.shape[2]:
        return jnp.einsum("bals,bsad->blad", weights, value)
    grouped = weights.reshape(batch, key.shape[2], -1, length, key.shape[1])
    return jnp.einsum("bkgls,bskd->blkgd", grouped, value).reshape(query.shape)


def _mask(segments, length, columns, start, pattern):
    """bool (B or 1, L or 1, S); None: all is seen. Of a cache (S > L) there are no segments."""
    parts = []
    if segments is not None and pattern.packed:
        parts.append(segments[:, :, None] == segments[:, None])
    elif segments is not None:
        parts.append(segments[:, None] != 0)
    if pattern.causal or pattern.window is not None:
        # (B or 1, L, S), how far the key lies before the query
        ahead = jnp.reshape(start, (-1, 1, 1)) + jnp.arange(length)[:, None] - jnp.arange(columns)
        if pattern.causal:
            parts.append(ahead >= 0)
        if pattern.window is not None:
            parts.append((ahead if pattern.causal else jnp.abs(ahead)) < pattern.window)
    return functools.reduce(jnp.logical_and, parts) if parts else None


def _by_splash(query, key, value, segments, pattern):
    """`_splash` on each device's rows and heads where XLA would divide the arrays by itself, which it can't for a kernel."""
    mesh, local = jax.sharding.get_abstract_mesh(), functools.partial(_splash, pattern=pattern)
    axes = set(mesh.auto_axes)
    if segments is None:
        segments = jnp.ones(query.shape[:2], jnp.int32)
    if not axes:
        return local(query, key, value, segments)
    rows = tuple(axis for axis in ("data", "fsdp") if axis in axes)
    if query.shape[0] % math.prod(mesh.shape[axis] for axis in rows):
        rows = ()
    parts = mesh.shape["tensor"] if "tensor" in axes else 1
    copies = parts // math.gcd(parts, key.shape[2])  # of each head of keys, so that "tensor" divides them
    divided = query.shape[2] % (key.shape[2] * copies) == 0
    if divided and copies > 1:
        key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
    by_row = P(rows or None)
    spec = P(*by_row, None, "tensor" if divided and "tensor" in axes else None)
    on_mesh = jax.shard_map(local, in_specs=(spec, spec, spec, by_row), out_specs=spec, axis_names=axes, check_vma=False)
    return on_mesh(query, key, value, segments)


def _splash(query, key, value, segments, pattern):
    length, heads, size = query.shape[1:]
    block, padded = _blocks(length)

    def heads_first(x):  # (B, A or K, padded, D)
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - length), (0, 0)))

    segments = segments if pattern.packed else segments != 0
    segments = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, padded - length)))
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([_seen(pattern, padded)] * heads), block_sizes=sizes,
        attn_logits_soft_cap=pattern.soft_cap, residual_checkpoint_name=KEPT, head_shards=1, q_seq_shards=1, interpret=_INTERPRET,
    )  # fmt: skip
    arrays = map(heads_first, (query * size**-0.5, key, value))
    out = jax.vmap(kernel)(*arrays, splash.SegmentIds(segments, segments))
    return out[:, :, :length].swapaxes(1, 2)


def _seen(pattern: Pattern, length: int) -> splash.Mask:
    shape = length, length
    if pattern.window is not None:
        side = pattern.window - 1
        return splash.LocalMask(shape, (side, 0 if pattern.causal else side), 0)
    return splash.CausalMask(shape) if pattern.causal else splash.FullMask(shape)


def _blocks(length: int) -> tuple[int, int]:
    """(block, the length as a multiple of it): the cheapest."""
    choices = [(block, -(-length // block) * block) for block in _BLOCKS]
    return min(choices, key=lambda pair: _BLOCKS[pair[0]] * pair[1] ** 2)


def share(pattern: Pattern, length: int) -> float:
    """The part of its blocks of scores that the TPU kernel makes: the pattern hides the others."""
    block, padded = _blocks(length)
    first = np.arange(padded // block) * block
    ahead = first[:, None] - first  # of a block's first query, before its first key
    made = ahead > -block if pattern.causal else np.full(ahead.shape, True)
    if pattern.window is not None:
        made &= ahead - block < pattern.window - 1
        made &= (ahead + block > -pattern.window + 1) | pattern.causal
    return float(made.mean())
