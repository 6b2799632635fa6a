"""GPart as a method."""

import jax
import jax.numpy as jnp

from gpart_jax import transform
from gpart_jax.methods.base import Method, registered
from gpart_jax.partition import Partition, make_partition, regions_of
from gpart_jax.sharding import tensor_axis
from gpart_jax.targets import Layout, Targets, canonical_layout, named_leaves


@registered(size="d")
def gpart(
    d: int,
    seed: int = 0,
    *,
    targets: Targets | Layout = None,
    scheme: str = "balanced-v1",
    scope: str = "global",
    isometric: bool = True,
    dropout: float = 0.0,
    init_bound: float = 0.0,
    stacked: str | None = None,
    apply: str = "sum",
) -> Method:
    """GPart: W = W0 + P theta with theta of d numbers (arXiv 2605.14841).

    Args:
      d: length of theta, 1 <= d <= N.
      seed: of the partition; an int in [0, 2^64).
      targets, scheme, scope, isometric, dropout: as in `gpart_transform`.
      init_bound: theta starts uniform in [-init_bound, init_bound]; 0, as in the paper, is the base model itself.
      stacked: a pattern of leaves whose first axis counts layers, as in `canonical_layout`.
      apply: "sum": W0 + P theta, rounded to W0's dtype. "dither": rounded to bfloat16 up or down by chance, so that no entry of
        P theta is lost on average; with a key by that, else by a fixed hash of each entry's index. "split", for the models of `gpart_jax.models`: their layers get W0 and
        P theta apart, and compute x W0 + x P theta, so that bfloat16 loses no entry of P theta (`linear.py`).

    Returns:
      A `Method` that trains {"theta": float32 (d,)}.
    """
    if init_bound < 0:
        raise ValueError(f"init_bound = {init_bound} must not be negative.")
    if apply not in transform.APPLY:
        raise ValueError(f"apply = {apply!r} must be one of {', '.join(transform.APPLY)}.")

    def init(params, key):
        layout = canonical_layout(params, targets, stacked=stacked)
        regions_of(layout, d, scheme=scheme, scope=scope)  # so that a bad d or target fails here, not later
        return {"theta": jax.random.uniform(key, (d,), jnp.float32, -init_bound, init_bound)}

    def make_tables(params):
        layout = canonical_layout(params, targets, stacked=stacked)
        options = dict(scheme=scheme, scope=scope, isometric=isometric, params=params)
        return make_partition(layout, d, seed, **options).tables

    def bind(params, trainable, key=None, on_mesh=False, tables=None, rows=None):
        layout = canonical_layout(params, targets, stacked=stacked)
        regions = regions_of(layout, d, scheme=scheme, scope=scope)
        tables = make_tables(params) if tables is None else tables
        partition = Partition(
            **tables, scheme=scheme, scope=scope, d=d, isometric=isometric, layout=layout, regions=regions
        )
        leaves = dict(named_leaves(params))
        split = {leaf.path: tensor_axis(leaves[leaf.path]) for leaf in partition.layout.leaves} if on_mesh else None
        return transform.bind(partition, trainable["theta"], dropout, key if dropout or apply == "dither" else None, split, apply=apply)

    return Method(init, bind, make_tables, linear=True, isometric=isometric)
