"""The artifact of fine-tuning: what was trained, and what it was trained on, in one safetensors file.

The tensors are the trained numbers (`theta`, `head/classifier/kernel`, ...). The header's metadata says how to apply them
(method, scheme, seed, d, ...) and to what: N, a fingerprint of the canonical layout and one of the base model.
"""

import hashlib
import inspect
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpart_jax.methods import METHODS, Method, from_spec
from gpart_jax.targets import Targets, canonical_layout, named_leaves, replace_leaves, select

_FORMAT = 1
_FIELDS = {  # what must agree before an adapter may be applied, and how to say that it doesn't
    "n": "number of adapted weights N",
    "layout": "canonical layout (which weights are adapted, their shapes and order)",
    "base": "base model's weights",
}


def save_adapter(path, spec: dict, trainable, params, head_targets: Targets = None) -> None:
    """Writes an adapter, by way of a temporary file, so that an interrupted save harms nothing.

    Args:
      path: the file to write, usually `adapter.safetensors`.
      spec: the method as plain data, as `methods.from_spec` takes it: {"name": "gpart", "d": 4096, "seed": 42, ...}.
      trainable: the trained pytree of that method.
      params: the frozen model it was trained on.
      head_targets: pattern(s) of the leaves trained beside it, if any.

    Raises:
      ValueError: a spec that isn't plain data (a predicate or Layout as targets).
    """
    options = inspect.signature(METHODS[spec["name"]]).parameters.values()
    defaults = {option.name: option.default for option in options if option.default is not option.empty}
    spec = defaults | dict(spec)  # written out, so that a later change of a default changes no adapter
    metadata = {
        "format": _FORMAT,
        "method": spec,
        "head_targets": head_targets,
        **_identity(spec, head_targets, params),
    }
    try:
        text = json.dumps(metadata)
    except TypeError as error:
        raise ValueError(f"The adapter's method must be plain data, with targets as patterns: {error}.") from None
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in named_leaves(jax.device_get(trainable))}
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata={"gpart_jax": text})
    temporary.replace(path)


def load_adapter(path, params) -> tuple[Method, dict]:
    """Reads an adapter and checks that it belongs to `params`.

    Args:
      path: a file that `save_adapter` wrote.
      params: the frozen model to adapt.

    Returns:
      (method, trainable): `method.apply(params, trainable)` is the adapted model.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, one that isn't an adapter of this library, or one made for another model or layout; the
        message names what differs.
    """
    metadata, tensors = _read(pathlib.Path(path))
    spec, head_targets = metadata["method"], metadata["head_targets"]
    method = from_spec(spec, head_targets)
    shapes = jax.eval_shape(method.init, params, jax.random.key(0))
    found = _identity(spec, head_targets, params)
    for field, meaning in _FIELDS.items():
        if metadata[field] != found[field]:
            raise ValueError(
                f"{path} was trained on another model: the {meaning} is {metadata[field]} there and {found[field]} here. "
                f"Load the base model that it was trained on."
            )

    wanted = {name: leaf.shape for name, leaf in named_leaves(shapes)}
    stored = {name: array.shape for name, array in tensors.items()}
    if wanted != stored:
        raise ValueError(f"{path} is damaged: its tensors should be {wanted}, but are {stored}.")
    return method, replace_leaves(shapes, {name: jnp.asarray(array) for name, array in tensors.items()})


def _read(path: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no adapter at {path}.")
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("gpart_jax")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}.") from None
    if text is None:
        raise ValueError(f"{path} is a safetensors file, but not one that gpart_jax.adapter wrote.")
    metadata = json.loads(text)
    if metadata["format"] != _FORMAT:
        raise ValueError(f"{path} has adapter format {metadata['format']}; this version of gpart_jax reads {_FORMAT}.")
    return metadata, tensors


def _identity(spec: dict, head_targets: Targets, params) -> dict:
    trained = head_targets if spec["name"] == "head" and spec.get("targets") is None else spec.get("targets")
    layout = canonical_layout(params, trained)
    return {"n": layout.size, "layout": layout.fingerprint(), "base": _base_fingerprint(params, head_targets)}


def _base_fingerprint(params, head_targets: Targets) -> str:
    """16 hexadecimal digits of up to 16 evenly spaced values of each leaf outside the head.

    Values enter as bfloat16, so that a model keeps its fingerprint when it is loaded in half precision.
    """
    digest = hashlib.sha256()
    own = select(params, head_targets) if head_targets is not None else {}
    for path, leaf in select(params).items():
        if path not in own:
            at = np.linspace(0, leaf.size - 1, min(16, leaf.size)).astype(np.int64)
            values = jnp.asarray(leaf)[np.unravel_index(at, leaf.shape)] if leaf.ndim else jnp.asarray(leaf)
            digest.update(f"{path}{leaf.shape}".encode() + np.asarray(values.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:16]
