"""Many adapters over one frozen model: a batch in which each example names its adapter.

What the adapters trained is stacked, theta (M, d) and a head of each, and an argument of the compiled program, as are the
numbers of the adapters in a batch: another adapter, or a new one in the stack, compiles nothing.

A batch goes through in tiles, each of up to R rows of one adapter. A tile's weights W0 + P theta are made once, and its rows
share them; so they are made for each adapter of a batch, not for each example, and only those of one step are alive.
`plan` cuts the tiles, on the host; of it the compiled program depends on R alone, which is a power of two.

  stacked = serving.stack(adapters)
  run = jax.jit(serving.serve(lambda adapt, frozen, batch: model.apply({"params": adapt(frozen)}, **batch), method))
  outputs = run(stacked, frozen, batch, serving.plan(which, len(adapters)), method.tables(frozen))
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpart_jax.adapter import Adapter, check_shared
from gpart_jax.methods import Method


class Plan(NamedTuple):
    """How a batch of B rows goes through: step after step, each of G tiles of up to R rows.

    steps: int32 (), how many there are; the arrays have room for B tiles, the most there can be.
    adapter: int32 (ceil(B / G), G), of each tile.
    rows: int32 (ceil(B / G), G, R), which of the batch; B where a tile has no more.
    """

    steps: np.int32
    adapter: np.ndarray
    rows: np.ndarray


def stack(adapters: Sequence[Adapter]) -> dict:
    """What they trained, along a first axis: {"theta": (M, d), "head": {path: (M, ...)}}, on the device.

    Raises:
      ValueError: adapters that don't share a partition, a head and a base model, or have no theta.
    """
    for other in adapters[1:]:
        check_shared(adapters[0], other)
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *map(_trainable, adapters))


def put(stacked: dict, number: int, adapter: Adapter) -> dict:
    """`stacked`, which is used up, with this adapter in that place. It must share the partition of the others.

    Raises:
      IndexError: there is no such place.
    """
    if not 0 <= number < len(stacked["theta"]):
        raise IndexError(f"There is no place {number} among {len(stacked['theta'])} adapters.")
    return _put(stacked, number, _trainable(adapter))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked, number, trainable):
    return jax.tree.map(lambda leaves, leaf: leaves.at[number].set(leaf), stacked, trainable)


def _trainable(adapter: Adapter) -> dict:
    if kept := [name for name in adapter.tensors if name.startswith("given/")]:
        raise ValueError(f"{', '.join(kept)}: leaves that an adapter brings along untrained can't be served. Merge it instead.")
    return {"theta": adapter.theta} | ({"head": adapter.head} if adapter.head else {})


def plan(which: Sequence[int] | np.ndarray, adapters: int, *, together: int = 1, tile_cost: float = 1.0) -> Plan:
    """The tiles of a batch, of the size R at which it is least work.

    Args:
      which: the number of each row's adapter, (B,).
      adapters: M, how many there are.
      together: tiles that go through in one step, if there are so many: the adapted weights of all of them are alive at
        once. On CPU one is best. An accelerator may want more, so that the frozen layers see more rows (not measured).
      tile_cost: what making the weights of a tile costs, in rows. It was about one of 32 tokens (docs/adapters.md).

    Raises:
      ValueError: no rows, or a number that is none of an adapter's.
    """
    which = np.asarray(which)
    if which.ndim != 1 or not which.size or which.min() < 0 or which.max() >= adapters:
        raise ValueError(f"Each row must name one of the adapters 0 ... {adapters - 1}, not {which}.")
    numbers, counts = np.unique(which, return_counts=True)
    sizes = [2**k for k in range(int(np.max(counts) - 1).bit_length() + 1)]
    tiles = [int(np.sum(-(-counts // size))) for size in sizes]
    best = min(range(len(sizes)), key=lambda k: tiles[k] * (sizes[k] + tile_cost))
    size, together = sizes[best], min(together, tiles[best])
    most = -(-len(which) // together) * together
    adapter, rows = np.zeros(most, np.int32), np.full((most, size), len(which), np.int32)
    tile = 0
    for number in numbers:
        mine = np.flatnonzero(which == number)
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            adapter[tile], rows[tile, : len(part)] = number, part
            tile += 1
    steps = np.int32(-(-tile // together))
    return Plan(steps, adapter.reshape(-1, together), rows.reshape(-1, together, size))


def serve(forward: Callable, method: Method) -> Callable:
    """The forward pass of a batch of examples with an adapter each.

    Args:
      forward: forward(adapt, frozen, batch) -> outputs, a pytree of arrays with the rows of `batch` first, each of which
        depends on its own row alone. `adapt` is a bound method, as in `sharding.value_and_grad`.
      method: of the adapters, `adapter.on(params)[0]`.

    Returns:
      f(stacked, frozen, batch, plan, tables) -> outputs, for use under `jax.jit`. `batch` is a pytree of arrays with B rows
      each; `tables` are `method.tables(frozen)`. Not differentiable in reverse mode.
    """

    def run(stacked, frozen, batch, plan, tables):
        def tile(number, rows):
            trainable = jax.tree.map(lambda leaves: leaves[number], stacked)
            adapt = method.bind(frozen, trainable, None, False, tables)
            return forward(adapt, frozen, jax.tree.map(lambda x: x.at[rows].get(mode="clip"), batch))

        def step(n, outputs):
            rows = plan.rows[n]
            new = jax.vmap(tile)(plan.adapter[n], rows)
            # Rows that only fill up a tile lie outside, and are dropped.
            return jax.tree.map(lambda out, x: out.at[rows].set(x, mode="drop"), outputs, new)

        total = len(jax.tree.leaves(batch)[0])
        shapes = jax.eval_shape(tile, plan.adapter[0, 0], plan.rows[0, 0])
        outputs = jax.tree.map(lambda x: jnp.zeros((total, *x.shape[1:]), x.dtype), shapes)
        return jax.lax.fori_loop(0, plan.steps, step, outputs)

    return run
