"""Which leaves are adapted, and in which order their elements are numbered: the canonical layout.

A leaf is named by its path: the keys from the root joined with "/", as in `layer_0/attention/query/kernel`, for Flax
Linen dicts, Flax NNX states, Equinox modules and plain containers alike. A layout gives each targeted leaf an offset and
a stride for each axis; the element at coordinates x has the index `offset + sum(strides[k] * x[k])`, and the N elements
of the layout have the indices 0 ... N-1, each once. The partition sees indices only, so a weight that is stored
transposed, or stacked over layers, keeps its group as long as its strides say so.
"""

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Array = jax.Array | np.ndarray
PyTree = Any  # containers of arrays, or of what stands for them
Params = TypeVar("Params")  # a pytree that comes back with the same structure
_PARAMS = jax.tree_util.DictKey("params")
Targets = str | Sequence[str] | Callable[[str, jax.Array], bool] | None


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One adapted array: its path, shape, the index of its first element, and the index step along each axis."""

    path: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    stacked: bool = False  # axis 0 counts layers

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_dense(self) -> bool:
        """Whether row-major order is the order of the indices, with no gaps."""
        return all(n == 1 or step == dense for n, step, dense in zip(self.shape, self.strides, _row_major(self.shape)))

    @property
    def crosses_2_32(self) -> bool:
        """Whether the high words of the 64-bit indices aren't all equal."""
        return self.offset >> 32 != (self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides))) >> 32

    def layers(self) -> list["Leaf"]:
        """The layers of a stacked leaf as leaves of their own, in order; any other leaf alone."""
        if not self.stacked:
            return [self]
        return [
            Leaf(self.path, self.shape[1:], self.offset + layer * self.strides[0], self.strides[1:])
            for layer in range(self.shape[0])
        ]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The canonical layout: the targeted leaves in the order of their offsets. Hashable; holds no array."""

    leaves: tuple[Leaf, ...]

    @property
    def size(self) -> int:
        """N, the number of adapted weights."""
        return sum(leaf.size for leaf in self.leaves)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on what is numbered how, and not on paths, stacking or storage order.

        Each layer of each leaf enters with its offset and its shape in canonical (descending stride) axis order. It can't
        tell a square matrix from its transpose; an adapter's fingerprint of the base model can.
        """
        rows = []
        for leaf in self.leaves:
            for layer in leaf.layers():
                # A tie of strides needs a unit axis; the longer axis goes last, as it would in row-major order.
                axes = sorted(range(len(layer.shape)), key=lambda k: (-layer.strides[k], layer.shape[k]))
                rows.append([layer.offset, [layer.shape[k] for k in axes]])
        return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]


def named_leaves(params: PyTree) -> list[tuple[str, Any]]:
    """The leaves of any pytree with their paths, in the tree's own order."""
    leaves, _ = _with_paths(params)
    if len({path for path, _ in leaves}) < len(leaves):
        raise ValueError(
            "Two leaves of params have the same path; a key that holds '/' makes this possible. Rename one."
        )
    return leaves


def replace_leaves(params: Params, new: Mapping[str, Any]) -> Params:
    """`params` with the leaves named in `new` exchanged; every other leaf is the same object."""
    leaves, tree = _with_paths(params)
    return jax.tree_util.tree_unflatten(tree, [new.get(path, leaf) for path, leaf in leaves])


def select(params: PyTree, targets: Targets = None) -> dict[str, jax.Array]:
    """The targeted leaves by path, ordered by path with numbers compared as numbers.

    Args:
      params: any pytree of arrays (or `jax.ShapeDtypeStruct`).
      targets: one regular expression or several, searched for in each leaf's path; or a predicate `(path, leaf) -> bool`;
        or None for every floating-point leaf that is a parameter. What isn't: variables of an NNX State or Module that aren't
        `nnx.Param`, as the statistics of a BatchNorm; and in a dict with an entry "params", as Linen's variables are, the others.

    Raises:
      ValueError: a pattern or predicate that selects nothing, or a selected leaf that is not floating-point.
    """
    leaves = named_leaves(params)
    if targets is None:
        state = _state(params)
        chosen = [(path, leaf) for path, leaf in leaves if _is_float(leaf) and path not in state]
        if not chosen:
            raise ValueError("params hold no floating-point array that is a parameter, so there is nothing to adapt.")
    elif callable(targets):
        chosen = [(path, leaf) for path, leaf in leaves if targets(path, leaf)]
        if not chosen:
            raise ValueError(f"The targets predicate chose no leaf. Paths look like: {_examples(leaves)}.")
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        if not patterns:
            raise ValueError("targets is an empty list. Give a pattern, or None for every floating-point leaf.")
        for pattern in patterns:
            if not any(re.search(pattern, path) for path, _ in leaves):
                raise ValueError(f"Target pattern {pattern!r} matches no leaf. Paths look like: {_examples(leaves)}.")
        chosen = [(path, leaf) for path, leaf in leaves if any(re.search(p, path) for p in patterns)]
    for path, leaf in chosen:
        if not _is_float(leaf):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(f"Target {path!r} is {kind}, not floating-point. Narrow the targets to leave it out.")
    return dict(sorted(chosen, key=lambda item: _natural(item[0])))


def floating(params: PyTree) -> dict[str, jax.Array]:
    """Every floating-point leaf by path, parameter or not, ordered as `select` does."""
    return dict(sorted(((path, leaf) for path, leaf in named_leaves(params) if _is_float(leaf)), key=lambda item: _natural(item[0])))


def wide(dtype: DTypeLike) -> np.dtype:
    """What numbers of a floating-point dtype are summed in: float32, or itself where it is wider."""
    return jnp.dtype(jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype)  # promote_types knows no float8


def canonical_layout(
    params: PyTree, targets: Targets | Layout = None, *, stacked: str | None = None, transposed: str | None = None
) -> Layout:
    """The layout of the targeted leaves: ordered by path, numbers as numbers, each leaf in row-major order.

    Args:
      params: any pytree of arrays (or `jax.ShapeDtypeStruct`).
      targets: as in `select`; or a `Layout`, which is checked against `params` and returned.
      stacked: a pattern of leaves whose first axis counts layers (an `nn.scan`ned model). Leaves for which it matches the
        same text are numbered together, layer by layer, as their unstacked twins would be: with `stacked="^layers"`,
        `layers/query/kernel` of shape (12, 8, 8) is numbered as `layers/0/query/kernel`, ... of shape (8, 8).
      transposed: a pattern of leaves whose last two axes are stored in the opposite of the canonical order. With
        `transposed="kernel$"` Flax kernels (in, out) are numbered as PyTorch's (out, in) weights are.

    Raises:
      ValueError: as `select`; a pattern that matches no target; stacked leaves of unequal layer counts; a `Layout` that
        does not fit `params`.
    """
    if isinstance(targets, Layout):
        _check_fits(targets, params)
        return targets
    chosen = select(params, targets)

    for name, pattern in (("stacked", stacked), ("transposed", transposed)):
        if pattern and not any(re.search(pattern, path) for path in chosen):
            raise ValueError(
                f"The `{name}` pattern {pattern!r} matches none of the targets: {_examples(chosen.items())}."
            )
    groups: dict[
        tuple[bool, str], list[str]
    ] = {}  # leaves to number together, layer by layer; an unstacked one is alone
    for path in chosen:
        match = re.search(stacked, path) if stacked else None
        groups.setdefault((True, match.group(0)) if match else (False, path), []).append(path)

    leaves, offset = [], 0
    for (is_stacked, _), paths in groups.items():
        counts = {path: chosen[path].shape[0] if chosen[path].ndim else 0 for path in paths} if is_stacked else {}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            raise ValueError(f"Stacked leaves must share one number of layers as their first axis, but have {counts}.")
        inner = {path: chosen[path].shape[1:] if is_stacked else chosen[path].shape for path in paths}
        period = sum(math.prod(shape) for shape in inner.values())
        start = offset
        for path in paths:
            strides = _row_major(inner[path], swap=bool(transposed and re.search(transposed, path)))
            if is_stacked:
                strides = (period, *strides)
            leaves.append(Leaf(path, tuple(chosen[path].shape), start, strides, is_stacked))
            start += math.prod(inner[path])
        offset += period * next(iter(counts.values()), 1)
    return Layout(tuple(leaves))


def _row_major(shape: tuple[int, ...], swap: bool = False) -> tuple[int, ...]:
    """Strides of a dense array; with `swap`, of one whose last two axes are stored the other way round."""
    order = list(range(len(shape)))
    if swap:
        if len(shape) < 2:
            raise ValueError(f"A leaf of shape {shape} has no two axes to transpose. Narrow the `transposed` pattern.")
        order[-2:] = order[:-3:-1]
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis], step = step, step * shape[axis]
    return tuple(strides)


def _check_fits(layout: Layout, params) -> None:
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(params) if _is_float(leaf)}
    for leaf in layout.leaves:
        if leaf.path not in shapes:
            raise ValueError(f"The layout's leaf {leaf.path!r} is not a floating-point leaf of params.")
        if shapes[leaf.path] != leaf.shape:
            raise ValueError(
                f"Leaf {leaf.path!r} has shape {shapes[leaf.path]}, but the layout was made for {leaf.shape}."
            )


def _with_paths(params) -> tuple[list[tuple[str, Any]], Any]:
    """([(path, leaf), ...], the tree's structure)"""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    variables = _variables(params)
    return [(_path(keys, variables), leaf) for keys, leaf in leaves], tree


def _path(keys: tuple, variables: Mapping[tuple, Any]) -> str:
    # An NNX Variable, of a Module or of a State, adds a key around its array. Its path is the Variable's own.
    own = keys[:-1] if keys[:-1] in variables else keys
    return jax.tree_util.keystr(own, simple=True, separator="/")


def _variables(params) -> dict[tuple, Any]:
    """The NNX Variables of a tree by their keys."""
    if (nnx := sys.modules.get("flax.nnx")) is None:
        return {}
    inner = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
    return {keys: leaf for keys, leaf in inner if isinstance(leaf, nnx.Variable)}


def _state(params) -> set[str]:
    """The paths of what isn't a parameter, though it may be floating-point; see `select`."""
    leaves, variables = jax.tree_util.tree_flatten_with_path(params)[0], _variables(params)
    collections = {keys[:n] for keys, _ in leaves for n, key in enumerate(keys) if key == _PARAMS}
    found = set()
    for keys, _ in leaves:
        if (variable := variables.get(keys[:-1])) is not None:
            beside = not isinstance(variable, sys.modules["flax.nnx"].Param)
        else:
            beside = any(keys[:n] in collections and key != _PARAMS for n, key in enumerate(keys))
        if beside:
            found.add(_path(keys, variables))
    return found


def _natural(path: str) -> list:
    return [
        (0, int(part), "") if "0" <= part[0] <= "9" else (1, 0, part) for part in re.split("([0-9]+)", path) if part
    ]


def _is_float(leaf) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _examples(leaves) -> str:
    paths = [path for path, leaf in leaves if _is_float(leaf)]
    step = max(1, len(paths) // 4)
    return ", ".join(repr(path) for path in paths[::step][:5])
