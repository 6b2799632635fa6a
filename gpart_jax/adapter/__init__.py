"""The artifact of fine-tuning: what was trained, how to apply it, and what it belongs to.

save_adapter("adapter.safetensors", method, trainable, params)   # a method, what it trained, and the frozen model
adapter = load_adapter("adapter.safetensors")
params = adapter.apply(params)                                   # or an error that says what differs
merged = adapter.merge(params, jnp.bfloat16)                     # merged.params; what the rounding cost

`python -m gpart_jax.adapter` does this from the command line; docs/adapters.md describes the file.
"""

import dataclasses
import logging
import math
import operator
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gpart_jax import linear, sharding
from gpart_jax.adapter import file
from gpart_jax.adapter.fingerprint import base_fingerprint
from gpart_jax.methods import Method, chain, from_spec
from gpart_jax.methods.leaves import given
from gpart_jax.partition import SIGNED_MAGNITUDE
from gpart_jax.targets import (
    Layout,
    Leaf,
    Params,
    PyTree,
    Targets,
    canonical_layout,
    floating,
    named_leaves,
    replace_leaves,
    wide,
)

logger = logging.getLogger(__name__)

_BELONGS = {  # what must agree before an adapter may be applied, and how to say that it doesn't
    "n": "number of adapted weights N",
    "layout": "canonical layout (which weights are adapted, their shapes and order)",
    "base": "base model's weights",
}
_FREE = ("dropout", "init_bound", "apply")  # options of a method that don't matter once it is trained


class Merged(NamedTuple):
    """A merged model, and what it takes to know it.

    params: the adapted model.
    kept: the frozen leaves that were replaced, by path, for `unmerge`.
    rounding: |W - (W0 + P theta)| over the adapted weights: what rounding to the leaves' dtype cost, 0 for float32.
    update: |P theta| in the same norm, the root of the sum of squares.
    """

    params: PyTree
    kept: dict
    rounding: float
    update: float


class Unmerged(NamedTuple):
    """The model without the adapter. error: by path, the most by which an entry may differ from the frozen one.

    It is 0 throughout where the frozen leaves were kept, and infinite for a leaf that the adapter replaced, such as the
    head's, if they weren't: that one is left as it is.
    """

    params: PyTree
    error: dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """d numbers, and all that gives them a meaning.

    method: as `methods.from_spec` takes it, with every option written out: name, d, seed, scheme and its version
      ("balanced-v1"), scope, targets, ...
    tensors: what was trained, NumPy arrays by name: "theta", "head/classifier/kernel", ...; and "given/pooler/kernel", ...: what
      wasn't, and is in no file of the base model's.
    head_targets: pattern(s) of the leaves trained beside it, if any.
    n: N, the number of adapted weights.
    layout, base: fingerprints of the canonical layout and of the base model's weights (`fingerprint.py`).
    metadata: anything of yours that JSON can hold.
    """

    method: dict
    tensors: dict[str, np.ndarray]
    head_targets: Targets
    n: int
    layout: str
    base: str
    metadata: dict

    @classmethod
    def of(
        cls,
        method: Method | dict,
        trainable: PyTree,
        params: PyTree,
        head_targets: Targets = None,
        metadata: dict | None = None,
        drawn: Sequence[str] = (),
    ) -> "Adapter":
        """What was trained on `params`. Under several processes all call it.

        Args:
          method: that trained it. As plain data with `head_targets` it is deprecated, for nobody then knows that it did.
          trainable: the trained pytree of that method.
          params: the frozen model it was trained on.
          metadata: anything of yours that JSON can hold.
          drawn: the beginnings of paths of what no file holds, as `pretrained.drawn` gives them. Those leaves are no part of the
            base model; what of them isn't trained is kept in the adapter as it is.

        Raises:
          ValueError: a trainable that isn't the method's on these params, or a chain that an adapter can't hold.
        """
        if isinstance(method, dict):
            warnings.warn("Pass the Method that trained this, instead of plain data.", DeprecationWarning, stacklevel=2)
            method = from_spec(method, head_targets)
        if method.name == "chain":
            raise ValueError("An adapter holds one method, and a head beside it: chain(method, head(...)).")
        wanted = _shapes(jax.eval_shape(method.init, params, jax.random.key(0)))
        tensors = {name: np.ascontiguousarray(leaf) for name, leaf in named_leaves(sharding.fetch(trainable))}
        if wanted != (found := _shapes(tensors)):
            raise ValueError(f"{method.name!r} trains {wanted} on these params, but the trainable is {found}.")
        spec, trained = {"name": method.name} | method.options, {name.partition("/")[2] for name in tensors}
        kept = {
            f"given/{path}": np.ascontiguousarray(sharding.fetch(leaf))
            for path, leaf in named_leaves(params)
            if path.startswith(tuple(drawn)) and path not in trained
        }
        own = _identity(spec, method.head_targets, params, kept)
        return cls(spec, tensors | kept, method.head_targets, **own, metadata=metadata or {})

    @property
    def theta(self) -> np.ndarray:
        """The trained vector, float32 (d,).

        Raises:
          ValueError: the method has none.
        """
        if "theta" not in self.tensors:
            raise ValueError(f"An adapter of {self.method['name']!r} has no theta; it has {', '.join(self.tensors)}.")
        return self.tensors["theta"]

    @property
    def head(self) -> dict[str, np.ndarray]:
        """The leaves of the head that were trained beside theta, by path."""
        return {name.removeprefix("head/"): x for name, x in self.tensors.items() if name.startswith("head/")}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file, whole or not at all. Under several processes all call it, and the first writes.

        Raises:
          ValueError: a method or metadata that aren't plain data (a predicate as targets).
        """
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "tensors"
        }
        if isinstance(targets := self.method.get("targets"), Layout):
            fields["method"] = self.method | {"targets": _to_plain(targets)}
        sharding.on_first_process(lambda: file.write(path, fields, self.tensors))

    def on(self, params: PyTree, merged: bool = False) -> tuple[Method, dict]:
        """(method, trainable): `method.apply(params, trainable)` is the adapted model. Under several processes all call it.

        Args:
          params: the frozen model; with `merged`, the adapted one, whose weights are then not looked at.

        Raises:
          ValueError: it was made for another model or layout, or is none that its method makes; says what differs.
        """
        stored = _shapes(self.tensors)
        if "d" in self.method and stored.get("theta") != (self.method["d"],):
            # First of all, since what a wrong d asks for may not fit into memory.
            d = str(self.method["d"])[:40]
            raise ValueError(f"The adapter is damaged: d is {d}, but the shape of theta is {stored.get('theta')}.")
        try:
            method, kept = from_spec(self.method, self.head_targets), [name for name in stored if name.startswith("given/")]
            if kept:
                method = chain(method, given([f"^{re.escape(name.removeprefix('given/'))}$" for name in kept]))
            shapes = jax.eval_shape(method.init, params, jax.random.key(0))
            found = _identity(self.method, self.head_targets, params, kept)
        except (TypeError, KeyError, IndexError, OverflowError, re.error) as error:
            raise ValueError(f"The adapter's method {str(self.method)[:200]} can't be made: {error}.") from None
        for field, meaning in _BELONGS.items():
            if getattr(self, field) != found[field] and not (merged and field == "base"):
                raise ValueError(
                    f"The adapter was trained on another model: the {meaning} is {getattr(self, field)} there and "
                    f"{found[field]} here. Load the base model that it was trained on."
                )
        wanted = _shapes(shapes)
        if wanted != stored:
            raise ValueError(f"The adapter is damaged: its tensors should be {wanted}, but are {stored}.")
        return method, replace_leaves(shapes, {name: jnp.asarray(array) for name, array in self.tensors.items()})

    def apply(self, params: Params, key: jax.Array | None = None) -> Params:
        """The adapted model, as `gpart_transform` gives it; a key turns on dropout. Raises as `on` does."""
        method, trainable = self.on(params)
        return method.apply(params, trainable, key)

    def merge(self, params: PyTree, dtype: DTypeLike | None = None) -> Merged:
        """The adapted model to keep, each leaf where the frozen one lies. Under several processes all call it.

        Args:
          params: the frozen model.
          dtype: of all floating-point leaves; None leaves each as it is.

        Raises:
          ValueError: as `on`; a number that isn't finite, in the adapter or, once rounded, in the model; names where.
        """
        for name, array in self.tensors.items():
            if count := int((~np.isfinite(array)).sum()):
                raise ValueError(f"The adapter's {name} isn't finite: {count} of {array.size} are NaN or infinite. Train it again.")
        method, trainable = self.on(params)
        replaced, adapt = _replaced(trainable), _adapting(method, params)
        frozen = {path: jnp.asarray(leaf) for path, leaf in floating(params).items()}
        dithers = method.options.get("apply") == "dither" and dtype in (None, jnp.bfloat16)

        def compute(frozen, trainable, tables):
            exact = adapt(jax.tree.map(_wide, frozen), trainable, tables)
            found = adapt(frozen, trainable, tables) if dithers else exact  # rounded as in training and its test
            new, off, moved = {}, jnp.zeros(()), jnp.zeros(())
            for path, x in exact.items():
                new[path] = found[path].astype(dtype or frozen[path].dtype)
                if path not in replaced:
                    off += jnp.sum((_wide(new[path]) - x) ** 2)
                    moved += jnp.sum((x - _wide(frozen[path])) ** 2)
            return new, jnp.sqrt(off), jnp.sqrt(moved)

        new, rounding, update = _jit_in_place(compute, frozen, trainable, method.tables(params))
        if dtype is not None:
            new = {path: leaf.astype(dtype) for path, leaf in frozen.items() if leaf.dtype != dtype} | new
        finite = jax.jit(lambda new: {path: jnp.isfinite(leaf).all() for path, leaf in new.items()})(new)
        if bad := [path for path, whole in finite.items() if not whole]:
            raise ValueError(
                f"{bad[0]}{f' and {len(bad) - 1} more' if bad[1:] else ''} would hold NaN or infinities in {new[bad[0]].dtype}: the "
                "sum is beyond its range, or the base isn't finite. Merge in float32 or bfloat16, or look at the adapter's norm."
            )
        kept = {path: leaf for path, leaf in named_leaves(params) if path in new}
        return Merged(replace_leaves(params, new), kept, float(rounding), float(update))

    def unmerge(self, params: PyTree, kept: dict | None = None) -> Unmerged:
        """The frozen model from the merged one: bit for bit with the `kept` leaves of `merge`, else as near as it can be.

        Without them P theta is subtracted; what rounding took from the weights stays lost. Says so, and by how much.

        Raises:
          ValueError: the adapter is another layout's; or, without `kept`, of scheme signed_magnitude, which needs the
            frozen weights to know its groups.
        """
        if kept is not None:
            return Unmerged(replace_leaves(params, kept), dict.fromkeys(kept, 0.0))
        if self.method.get("scheme") == SIGNED_MAGNITUDE:
            raise ValueError(
                "signed_magnitude reads its groups off the frozen weights. Pass what `merge` kept of them."
            )
        method, trainable = self.on(params, merged=True)
        replaced, adapt = _replaced(trainable), _adapting(method, params)
        merged = {path: jnp.asarray(leaf) for path, leaf in floating(params).items()}

        def compute(merged, trainable, tables):
            deltas = adapt(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), merged), trainable, tables)
            new, error = {}, {}
            for path in sorted(deltas.keys() - replaced):
                new[path] = (_wide(merged[path]) - deltas[path]).astype(merged[path].dtype)
                # Each of the two sums was rounded once, each by at most half of this.
                most = [jnp.max(jnp.abs(_wide(x))) for x in (merged[path], new[path], deltas[path])]
                error[path] = jnp.finfo(merged[path].dtype).eps * (most[0] + most[1]) + 1e-6 * most[2]
            return new, error

        new, error = _jit_in_place(compute, merged, trainable, method.tables(params))
        error = {path: float(most) for path, most in error.items()} | dict.fromkeys(replaced, math.inf)
        logger.warning(
            "Unmerged without the frozen weights: entries may be off by %.2g%s. Keep what `merge` returns to be exact.",
            max((most for most in error.values() if most < math.inf), default=0.0),
            f", and {len(replaced)} replaced leaves stay as they are" if replaced else "",
        )
        return Unmerged(replace_leaves(params, new), error)

    def norm(self) -> float:
        """|theta|, which is how far the weights moved, the head's apart: P^T P = I (arXiv 2605.14841).

        Raises:
          ValueError: the method isn't isometric.
        """
        if self.method["name"] != "gpart" or not self.method["isometric"]:
            raise ValueError("Only an isometric GPart adapter's theta is as long as the way that the weights moved.")
        return float(np.linalg.norm(self.theta.astype(np.float64)))


def load_adapter(path: str | os.PathLike, params: PyTree = None) -> Adapter:
    """Reads a file that `Adapter.save` wrote.

    Args:
      params: deprecated; gives `load_adapter(path).on(params)`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, one of another format, or one that isn't an adapter of this library.
    """
    fields, tensors = file.read(path)
    method = dict(fields["method"])
    if isinstance(method.get("targets"), dict):
        method["targets"] = _from_plain(method["targets"], path)
    adapter = Adapter(method, tensors, *(fields[name] for name in ("head_targets", "n", "layout", "base", "metadata")))
    if params is None:
        return adapter
    warnings.warn("load_adapter(path, params) is now load_adapter(path).on(params).", DeprecationWarning, stacklevel=2)
    return adapter.on(params)  # type: ignore[return-value]


load = load_adapter  # its name until 0.3


def distance(a: Adapter, b: Adapter) -> float:
    """|theta_a - theta_b|, which is the distance of the two adapted models, their heads apart.

    Raises:
      ValueError: they share no partition, or aren't isometric.
    """
    check_shared(a, b)
    return dataclasses.replace(a, tensors={"theta": a.theta.astype(np.float64) - b.theta}).norm()


def interpolate(a: Adapter, b: Adapter, t: float) -> Adapter:
    """(1 - t) a + t b, heads included; a itself at 0 and b at 1. Raises as `average`."""
    return average([a, b], [1 - t, t])


def average(adapters: list[Adapter], weights: list[float] | None = None) -> Adapter:
    """The weighted mean of adapters of one partition, heads included: a model whose weights are the mean of theirs.

    Args:
      weights: as many; equal by default. They are divided by their sum.

    Raises:
      ValueError: adapters that don't share a partition, a method that isn't linear in what it trains, as LoRA, or weights
        that don't fit.
    """
    first, *others = adapters
    for other in others:
        check_shared(first, other)
    if not from_spec(first.method, first.head_targets).linear:
        raise ValueError(
            f"The mean of {first.method['name']!r} adapters isn't the mean of their models. Merge them first."
        )
    shares = np.ones(len(adapters)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(adapters),) or not np.isfinite(shares).all() or not shares.sum():
        raise ValueError(f"weights must be {len(adapters)} numbers whose sum isn't zero, not {shares}.")
    weighted = list(zip(shares / shares.sum(), adapters))
    tensors = {
        name: sum((w * one.tensors[name].astype(np.float64) for w, one in weighted), np.float64(0)).astype(x.dtype)
        for name, x in first.tensors.items()
    }
    return dataclasses.replace(first, tensors=tensors, metadata={})


def check_shared(a: Adapter, b: Adapter) -> None:
    """Raises a ValueError that says what differs, unless two adapters are of one method, partition, head and base model."""
    mine, theirs = (
        {name: value for name, value in one.method.items() if name not in _FREE}
        | {"head": one.head_targets, "N": one.n, "layout": one.layout, "base model": one.base}
        for one in (a, b)
    )
    differs = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
    if differs:
        shown = ", ".join(f"{name} is {str(mine.get(name))[:60]} and {str(theirs.get(name))[:60]}" for name in differs)
        raise ValueError(f"The adapters don't share a partition: {shown}.")


def save_adapter(
    path: str | os.PathLike,
    method: Method | dict,
    trainable: PyTree,
    params: PyTree,
    head_targets: Targets = None,
    drawn: Sequence[str] = (),
) -> None:
    """`Adapter.of(method, trainable, params, drawn=drawn).save(path)`."""
    Adapter.of(method, trainable, params, head_targets, drawn=drawn).save(path)


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in named_leaves(tree)}


def _identity(spec: dict, head_targets: Targets, params, kept: Iterable[str]) -> dict:
    trained = head_targets if spec["name"] == "head" and spec.get("targets") is None else spec.get("targets")
    layout = canonical_layout(params, trained)
    others = {name.removeprefix("given/") for name in kept}
    base = {path: leaf for path, leaf in named_leaves(params) if path not in others}
    return {"n": layout.size, "layout": layout.fingerprint(), "base": base_fingerprint(base, head_targets)}


def _adapting(method: Method, params):
    """adapt(leaves, trainable, tables): those of the leaves, by path, that the method changes, changed."""
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in floating(params).items()}
    like = replace_leaves(params, shapes)

    def adapt(leaves, trainable, tables):
        adapted = linear.merged(method.bind(like, trainable, None, False, tables)(leaves))
        return {path: leaf for path, leaf in adapted.items() if leaf is not leaves[path]}

    return adapt


def _jit_in_place(compute, leaves: dict, trainable, tables):
    """`compute`, which returns new leaves by path and more, compiled so that each of them lies where the old one does."""
    trainable = jax.tree.map(np.asarray, trainable)  # what every process has, and no mesh does
    new, *more = jax.eval_shape(compute, leaves, trainable, tables)
    placed = {path: leaves[path].sharding for path in new}
    return jax.jit(compute, out_shardings=(placed, *[None] * len(more)))(leaves, trainable, tables)


def _replaced(trainable: dict) -> set[str]:
    """The paths of leaves that a method exchanges instead of adding to them."""
    return {path for name in ("head", "params", "bias", "given") for path in trainable.get(name, {})}


def _wide(x):
    return x.astype(wide(x.dtype))


def _to_plain(layout: Layout) -> dict:
    return {"layout": [[leaf.path, leaf.shape, leaf.offset, leaf.strides, leaf.stacked] for leaf in layout.leaves]}


def _from_plain(plain: dict, path) -> Layout:
    def numbers(values):
        return tuple(operator.index(value) for value in values)

    try:
        leaves = tuple(
            Leaf(str(name), numbers(shape), operator.index(offset), numbers(strides), bool(stacked))
            for name, shape, offset, strides, stacked in plain["layout"]
        )
        total = sum(leaf.size for leaf in leaves)
        sound = bool(leaves) and all(
            len(leaf.shape) == len(leaf.strides)
            and min((*leaf.shape, *leaf.strides, leaf.offset + 1)) > 0
            and leaf.offset + sum((n - 1) * step for n, step in zip(leaf.shape, leaf.strides)) < total
            for leaf in leaves
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is damaged: its layout doesn't number N elements from 0 to N - 1.")
    return Layout(leaves)
