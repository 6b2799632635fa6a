"""Fine-tuning methods, each a pair of pure functions as in Optax, and the only thing that training code sees of them.

method = gpart(d=23_040, seed=42, targets=r"attention/(query|value)/kernel")
trainable = method.init(params, key)             # a dict of small pytrees: what is trained and saved
params = method.apply(params, trainable, key)    # the adapted model; a key turns on dropout
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpart_jax import transform
from gpart_jax.partition import make_partition
from gpart_jax.sharding import one_copy, tensor_axis
from gpart_jax.targets import Layout, Targets, canonical_layout, named_leaves, replace_leaves, select


class Method(NamedTuple):
    """A pair of pure functions; a trainable is a dict of pytrees.

    init(params, key) -> trainable.
    bind(params, trainable, key=None, on_mesh=False) -> adapt: prepares what is needed once for the whole of params (or
      `jax.ShapeDtypeStruct`s of them). `adapt(part)` adapts any part of params; `adapt({"layers": slices}, layer=index)`
      the slices of stacked leaves that the body of a scan holds. `on_mesh` is for `sharding.value_and_grad`: params then
      have NamedShardings, and each leaf of the trainable a copy for each device along "tensor", (T, ...).
    """

    init: Callable[[Any, jax.Array], dict]
    bind: Callable[..., Callable]

    def apply(self, params, trainable, key=None):
        """The adapted params; a key turns on dropout on the delta."""
        return self.bind(params, trainable, key)(params)


def gpart(
    d: int,
    seed: int = 0,
    *,
    targets: Targets | Layout = None,
    scheme: str = "balanced-v1",
    scope: str = "global",
    isometric: bool = True,
    dropout: float = 0.0,
    stacked: str | None = None,
) -> Method:
    """GPart: W = W0 + P theta with theta of d numbers, zero at the start (arXiv 2605.14841).

    Args:
      d: length of theta, 1 <= d <= N.
      seed: of the partition; an int in [0, 2^64).
      targets, scheme, scope, isometric, dropout: as in `gpart_transform`.
      stacked: a pattern of leaves whose first axis counts layers, as in `canonical_layout`.

    Returns:
      A `Method` that trains {"theta": float32 (d,)}.
    """

    def init(params, key):
        del key
        layout = canonical_layout(
            params, targets, stacked=stacked
        )  # so that a bad d or target fails here, not in the first step
        make_partition(layout, d, seed, scheme=scheme, scope=scope, isometric=isometric)
        return {"theta": jnp.zeros(d, jnp.float32)}

    def bind(params, trainable, key=None, on_mesh=False):
        layout = canonical_layout(params, targets, stacked=stacked)
        partition = make_partition(layout, d, seed, scheme=scheme, scope=scope, isometric=isometric)
        leaves = dict(named_leaves(params))
        split = {leaf.path: tensor_axis(leaves[leaf.path]) for leaf in layout.leaves} if on_mesh else None
        return transform.bind(partition, trainable["theta"], dropout, key if dropout else None, split)

    return Method(init, bind)


def lora(rank: int, alpha: float | None = None, *, targets: Targets = None) -> Method:
    """LoRA: W = W0 + (alpha / rank) A B, A (in, rank) and B (rank, out) (Hu et al., arXiv 2106.09685, section 4.1).

    A starts Kaiming-uniform (each entry within 1 / sqrt(in)), B at zero, as in PEFT; no dropout.

    Args:
      rank: r >= 1.
      alpha: scale; None means alpha = rank.
      targets: as in `canonical_layout`; each targeted leaf must be a matrix (in, out), or several (..., in, out).

    Returns:
      A `Method` that trains {"lora": {path: {"a": (..., in, rank), "b": (..., rank, out)}}}, float32.
    """
    if rank < 1:
        raise ValueError(f"LoRA's rank must be at least 1, not {rank}.")
    scale = (rank if alpha is None else alpha) / rank

    def init(params, key):
        factors = {}
        for number, (path, leaf) in enumerate(select(params, targets).items()):
            if leaf.ndim < 2:
                raise ValueError(f"LoRA adapts matrices, but {path!r} has shape {leaf.shape}. Narrow the targets.")
            *stack, fan_in, fan_out = leaf.shape
            bound = fan_in**-0.5
            a = jax.random.uniform(jax.random.fold_in(key, number), (*stack, fan_in, rank), jnp.float32, -bound, bound)
            factors[path] = {"a": a, "b": jnp.zeros((*stack, rank, fan_out), jnp.float32)}
        return {"lora": factors}

    def bind(params, trainable, key=None, on_mesh=False):
        del params, key
        factors = one_copy(trainable["lora"]) if on_mesh else trainable["lora"]

        def adapt(part, layer=None):
            adapted = {}
            for path, leaf in named_leaves(part):
                if path in factors:
                    a, b = (x if layer is None else x[layer] for x in (factors[path]["a"], factors[path]["b"]))
                    adapted[path] = (leaf + scale * (a @ b)).astype(leaf.dtype)
            return replace_leaves(part, adapted)

        return adapt

    return Method(init, bind)


def head(targets: Targets) -> Method:
    """Trains the targeted leaves themselves: a task head alone, or beside another method through `chain`.

    Returns:
      A `Method` that trains {"head": {path: array}}, starting from the values in params.
    """
    return _leaves("head", targets)


def full(targets: Targets = None) -> Method:
    """Full fine-tuning: trains every floating-point leaf, or the targeted ones.

    Returns:
      A `Method` that trains {"params": {path: array}}, starting from the values in params.
    """
    return _leaves("params", targets)


def _leaves(name: str, targets: Targets) -> Method:
    def init(params, key):
        del key
        # Copies: a train step may donate its trainable, and params must survive that.
        return {name: {path: jnp.array(leaf, copy=True) for path, leaf in select(params, targets).items()}}

    def bind(params, trainable, key=None, on_mesh=False):
        del params, key
        trained = one_copy(trainable[name]) if on_mesh else trainable[name]

        def adapt(part, layer=None):
            mine = {path: trained[path] for path, _ in named_leaves(part) if path in trained}
            return replace_leaves(part, mine if layer is None else {path: x[layer] for path, x in mine.items()})

        return adapt

    return Method(init, bind)


def chain(*methods: Method) -> Method:
    """Methods side by side: `chain(gpart(...), head("^classifier/"))` trains theta and the head. Applied in order."""

    def init(params, key):
        trainable = {}
        for number, method in enumerate(methods):
            part = method.init(params, jax.random.fold_in(key, number))
            if shared := trainable.keys() & part.keys():
                raise ValueError(f"Two chained methods both train {sorted(shared)}.")
            trainable |= part
        return trainable

    def bind(params, trainable, key=None, on_mesh=False):
        keys = [None if key is None else jax.random.fold_in(key, number) for number in range(len(methods))]
        adapts = [method.bind(params, trainable, key, on_mesh) for method, key in zip(methods, keys)]

        def adapt(part, layer=None):
            for one in adapts:
                part = one(part, layer)
            return part

        return adapt

    return Method(init, bind)


METHODS = {"gpart": gpart, "lora": lora, "head": head, "full": full}


def from_spec(spec: dict, head_targets: Targets = None) -> Method:
    """A method from plain data: {"name": "gpart", "d": 4096, ...}, with the leaves of `head_targets` trained beside it.

    Raises:
      ValueError: an unknown method, or an option that the method doesn't have.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in METHODS:
        raise ValueError(f"Unknown method {name!r}. Choose one of {', '.join(METHODS)}.")
    if name == "head":
        options.setdefault("targets", head_targets)
        head_targets = None
    elif name == "full":
        head_targets = None  # already among its leaves
    try:
        method = METHODS[name](**options)
    except TypeError as error:
        raise ValueError(f"Method {name!r} with options {options}: {error}.") from None
    return method if head_targets is None else chain(method, head(head_targets))


def trained_numbers(trainable) -> int:
    """How many numbers a trainable holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(trainable))
