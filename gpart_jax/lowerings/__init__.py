"""How P theta is computed: two functions, over one file for each way.

  plain     balanced-v1 on runs of consecutive indices, in XLA's own operations: no element is looked at by itself. The
            reference that the others are tested against.
  tpu       the same as Pallas kernels (`pieces.py`: what they move)
  elements  everything else, element by element

All agree to the bit in P theta, and in P^T to the rounding of float32 sums. What they compute is defined in `partition.py`, which
never changes; these files may.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gpart_jax import dropout
from gpart_jax.lowerings import elements, plain, tpu
from gpart_jax.lowerings.base import Call, Where, parts_of, table_shape


def adapt(call: Call, table: jax.Array, weights: Sequence[jax.Array], where: Where, kernels: bool) -> list[jax.Array]:
    """W + P theta for each cut, in the dtype of W; the sum is taken in the table's or wider.

    Args:
      table: see `base.py`.
      weights: of each cut.
      kernels: whether a TPU's may be used; True only where the program is for one.
    """
    chosen = _for_kernels(call, [(x.dtype, table.dtype) for x in weights], kernels)
    results: dict[int, jax.Array] = {}
    if chosen:
        adapted = tpu.adapt(*some(call, where, chosen), table, [weights[n] for n in chosen])
        results |= dict(zip(chosen, adapted))
    for number, weight in enumerate(weights):
        if number not in results:
            lowering = plain if plain.reaches(call, number) else elements
            delta = _drop(call, number, lowering.expand(call, number, table, where), where)
            results[number] = _rounded(call, number, weight + delta, weight.dtype, where)
    return [results[number] for number in range(len(weights))]


def contract(call: Call, cotangents: Sequence[jax.Array], where: Where, dtype: DTypeLike, kernels: bool) -> jax.Array:
    """The tables' cotangent, of that dtype, from the cuts'. Arguments as in `adapt`."""
    chosen = _for_kernels(call, [(x.dtype, dtype) for x in cotangents], kernels)
    total = None
    if chosen:
        total = tpu.contract(*some(call, where, chosen), [cotangents[n] for n in chosen])
    others = [n for n in range(len(cotangents)) if n not in chosen]
    dropped = {n: _drop(call, n, cotangents[n], where) for n in others}
    streamed = [n for n in others if plain.reaches(call, n)]
    if streamed:
        sums = plain.contract(call, streamed, [dropped[n] for n in streamed], where, dtype)
        total = sums if total is None else total + sums
    for n in reversed([n for n in others if n not in streamed]):  # the last comes first, as in a model's backward pass
        if total is None:
            total = jnp.zeros_like(dropped[n], shape=table_shape(call), dtype=dtype)
        total = elements.contract(call, n, dropped[n].astype(dtype), where, total.reshape(-1)).reshape(table_shape(call))
    assert total is not None  # there is a cut
    return total


def _for_kernels(call, dtypes, kernels) -> list[int]:
    return [n for n, (own, table) in enumerate(dtypes) if kernels and table == jnp.float32 and tpu.reaches(call, n, own)]


def some(call: Call, where: Where, numbers: Sequence[int]) -> tuple[Call, Where]:
    """The call for some of its cuts."""
    starts = None if where.starts is None else where.starts[..., np.array(numbers), :]  # under vmap with axes before
    keys = tuple(where.keys[n] for n in numbers)
    return call._replace(cuts=tuple(call.cuts[n] for n in numbers)), where._replace(keys=keys, starts=starts)


def _drop(call: Call, number: int, x: jax.Array, where: Where) -> jax.Array:
    """Dropout on a cut's entries of P theta, or on their cotangent. The mask is made again, not kept."""
    if not call.rate:
        return x
    assert where.drop is not None
    kept = dropout.keep_mask(*_indices(call, number, where), where.drop, call.rate)
    return jnp.where(kept, x * dropout.scale(call.rate), 0)  # in float32 at least, as the scale is


def _rounded(call: Call, number: int, x: jax.Array, dtype: DTypeLike, where: Where) -> jax.Array:
    if call.dither and dtype == jnp.bfloat16:
        assert where.drop is not None
        x = dropout.dithered(x.astype(jnp.float32), dropout.hashed(*_indices(call, number, where), where.drop))
    return x.astype(dtype)


def _indices(call: Call, number: int, where: Where) -> tuple[jax.Array, jax.Array]:
    return dropout.index_words(call.cuts[number].leaf, where.layer, parts_of(call, number, where))
