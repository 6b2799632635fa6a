"""Checkpoints of the authors' PyTorch release, which is a fork of PEFT: adapter_config.json, adapter_model.safetensors.

What is known of them, from that release and from what it saved:

- The adapted parameters are numbered in the order in which the targeted modules occur in the model: layer by layer, in a
  layer query, key, value, output, then the MLP. Of each module the weight comes first, in PyTorch's (out, in) row-major
  order, and then, unless `bias` is "none", its bias. Names are matched as PEFT does: a list by exact name or dotted
  ending, a string as a regular expression for the whole name; `layers_to_transform` and `layers_pattern` narrow a list.
- assignment_backend "stateless" ("implicit_stateless_v1" in older files) is our scheme splitmix64.
- partition_scope "global" is ours; "transformer_block" is our scope of that name. isometric false leaves the ones.
- theta is the tensor `base_model.gpart_theta_d`; a saved head lies under `base_model.model.`, by its name in the model.

What isn't supported, and refused: the "materialized" backend, whose groups come from PyTorch's random numbers; fastfood;
signed_magnitude; targets that are resolved inside PEFT ("all-linear", or none); targets within a saved head, of which we
don't know which is adapted; any option or tensor that isn't named here. With a bias option PEFT may also train biases
directly; as far as we know it doesn't save them, and a checkpoint that holds some is refused.
"""

import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from flax import linen as nn

from gpart_jax import sharding
from gpart_jax.adapter import Adapter
from gpart_jax.methods import from_spec
from gpart_jax.models import pretrained, pretrained_decoder
from gpart_jax.models.fields import stated
from gpart_jax.models.storage import read_json, replace
from gpart_jax.targets import Layout, Leaf, PyTree, named_leaves

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
THETA, PREFIX = "base_model.gpart_theta_d", "base_model.model."
VIT_5 = {  # what transformers 5 calls the modules of a ViT's layers
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.o_proj",
    "intermediate": "mlp.fc1",
    "output": "mlp.fc2",
}
_FIXED: dict[str, tuple] = {  # options of theirs, and the values that we can read
    "peft_type": ("GPART",),
    "assignment_backend": ("stateless", "implicit_stateless_v1"),
    "projection_type": ("partition",),
    "grouping_strategy": ("random",),
    "partition_scope": ("global", "transformer_block"),
    "bias": ("none", "all", "gpart_only"),
    "fan_in_fan_out": (False, None),
    "exclude_modules": (None, []),
}
_DEFAULTS = {"projection_type": "partition", "grouping_strategy": "random", "partition_scope": "global", "bias": "none"}
_READ = ("d", "proj_seed", "target_modules", "isometric", "gpart_dropout", "init_bound", "layers_to_transform",
         "layers_pattern")  # fmt: skip
_INERT = ("auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_version", "revision",
          "task_type")  # fmt: skip


class Linear(NamedTuple):
    """A linear module of theirs that is a kernel of ours, or one layer of a stacked one."""

    name: str  # its whole name in their model
    path: str  # of ours, without /kernel
    layer: int | None  # of a stacked leaf


def layout(
    model: nn.Module, params: PyTree, target_modules: list[str] | str, *, bias: bool = False, **layers: Any
) -> Layout:
    """How their release numbers the weights of those modules: what to train with for an adapter that `write` can write.

      method = gpart(d=4096, seed=42, scheme="splitmix64", targets=peft.layout(model, params, ["query", "value"]))

    Args:
      model: an `EncoderClassifier`, a `ViTClassifier` or a `Decoder`.
      params: its params, or their shapes.
      target_modules: as in PEFT, by the names of their model: ["query", "value"], ["q_proj", "v_proj"].
      bias: whether the biases of those modules are adapted too.
      **layers: PEFT's layers_to_transform and layers_pattern.

    Raises:
      ValueError: modules that aren't there, or some layers of a stacked leaf alone.
    """
    leaves = dict(named_leaves(params))
    for linears in _linears(model, leaves):
        if chosen := [one for one in linears if _is_target(one.name, target_modules, **layers)]:
            return _number(chosen, leaves, bias)
    some = ", ".join(one.name for one in _linears(model, leaves)[0][:4])
    raise ValueError(f"target_modules {target_modules} match no linear module. Their names look like {some}.")


def read(directory: str | os.PathLike, model: nn.Module, params: PyTree) -> Adapter:
    """An adapter that their release saved, or `write` wrote. Their config is kept as `adapter.metadata["peft"]`.

    Args:
      directory: with adapter_config.json and adapter_model.safetensors.
      model: the base: an `EncoderClassifier`, a `ViTClassifier` or a `Decoder`.
      params: its params.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: damage, or something that this module doesn't know; says what.
    """
    directory = pathlib.Path(directory)
    stored = _read_config(directory / CONFIG)
    config = _DEFAULTS | stated(stored)
    try:
        with safetensors.safe_open(directory / TENSORS, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{directory / TENSORS} is missing, damaged or no safetensors file: {error}.") from None
    theta = tensors.pop(THETA, None)
    if theta is None or theta.shape != (config["d"],):
        raise ValueError(f"{directory / TENSORS} must hold {THETA!r} of shape ({config['d']},), as its config has d.")

    chosen = _layout_of(config, model, params)
    leaves, ours = dict(named_leaves(params)), _names(model, params)
    head = {}
    for name, tensor in tensors.items():
        path = ours.get(name.removeprefix(PREFIX))
        if path is None or not name.startswith(PREFIX):
            raise ValueError(f"{directory / TENSORS} holds {name!r}, which is neither theta nor a leaf of this model.")
        axes = pretrained.kernel_axes(path, leaves[path].ndim)
        if tensor.ndim != len(axes) or tuple(tensor.shape[axis] for axis in axes) != tuple(leaves[path].shape):
            raise ValueError(f"{name!r} has shape {tensor.shape}, but the model's {path} is {leaves[path].shape}.")
        head[path] = tensor.transpose(axes)
    if both := sorted(head.keys() & {leaf.path for leaf in chosen.leaves}):
        raise ValueError(f"{', '.join(both)}: a target within a saved module, of which it isn't known what is adapted.")

    spec = {
        "name": "gpart", "d": config["d"], "seed": config["proj_seed"] % 2**64, "targets": chosen,
        "scheme": "splitmix64", "scope": config["partition_scope"], "isometric": config.get("isometric", True),
        "dropout": config.get("gpart_dropout", 0.0), "init_bound": config.get("init_bound", 0.0),
    }  # fmt: skip
    trainable = {"theta": np.asarray(theta, np.float32)} | ({"head": head} if head else {})
    head_targets = [f"^{re.escape(path)}$" for path in head] or None
    return Adapter.of(from_spec(spec, head_targets), trainable, params, metadata={"peft": stored})


def write(
    directory: str | os.PathLike, adapter: Adapter, model: nn.Module, params: PyTree, base_model: str | None = None
) -> None:
    """Writes an adapter as their release reads it. Under several processes all call it, and the first writes.

    Args:
      directory: made if need be. What is there is replaced file by file, each in one step.
      adapter: of GPart, scheme splitmix64, and with targets numbered as they do: by `layout`, or from `read`.
      model, params: the base it belongs to.
      base_model: its name, for their config.

    Raises:
      ValueError: their release has no such adapter, or it belongs to another model.
    """
    adapter.on(params)
    spec, targets = adapter.method, adapter.method.get("targets")
    known = {"name": ("gpart",), "scheme": ("splitmix64",), "scope": _FIXED["partition_scope"]}
    for option, values in known.items():
        if spec.get(option) not in values:
            raise ValueError(
                f"Their release has no {option} {spec.get(option)!r}, but {' or '.join(map(repr, values))}. Train with that, "
                f"or export the merged model."
            )
    leaves = dict(named_leaves(params))
    adapted = {leaf.path for leaf in targets.leaves} if isinstance(targets, Layout) else set()
    bias = any(path.endswith("/bias") for path in adapted)
    for linears in _linears(model, leaves):
        chosen = [one for one in linears if f"{one.path}/kernel" in adapted]
        if chosen and _number(chosen, leaves, bias) == targets:
            break
    else:
        raise ValueError(
            "The adapter's weights are not numbered as their release does. Train with targets=peft.layout(model, params, "
            "target_modules), or export the merged model."
        )

    names = {path: name for name, path in _names(model, params).items()}
    modules = {_module(names.get(path, "")) for path in adapter.head}  # saved whole
    if partly := {path for path, name in names.items() if _module(name) in modules} ^ adapter.head.keys():
        raise ValueError(
            f"PEFT saves whole modules outside the layers, but of these only some leaves: {sorted(partly)}."
        )
    tensors = {THETA: adapter.theta}
    for path, array in adapter.head.items():
        back = np.argsort(pretrained.kernel_axes(path, array.ndim))
        tensors[PREFIX + names[path]] = np.ascontiguousarray(array.transpose(back))
    stored = adapter.metadata.get("peft", {})
    if stored and _layout_of(_DEFAULTS | stated(stored), model, params) != targets:
        stored = {}  # of another adapter
    config = {
        "auto_mapping": None, "base_model_name_or_path": base_model, "inference_mode": True, "layers_pattern": None,
        "layers_to_transform": None, "revision": None, "task_type": _task(model), "fan_in_fan_out": False,
        "modules_to_save": sorted(modules) or None,
        "target_modules": _target_modules(chosen, linears), "bias": "all" if bias else "none",
        "assignment_backend": "stateless",
    }  # fmt: skip
    config |= stored | {
        "peft_type": "GPART", "projection_type": "partition", "grouping_strategy": "random", "d": spec["d"],
        "proj_seed": spec["seed"], "partition_scope": spec["scope"], "isometric": spec["isometric"],
        "gpart_dropout": spec["dropout"], "init_bound": spec["init_bound"],
    }  # fmt: skip

    def put():
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(sorted(config.items())), indent=2)
        for name, save in {
            TENSORS: lambda file: safetensors.numpy.save_file(tensors, file, {"format": "pt"}),
            CONFIG: lambda file: file.write_text(text),
        }.items():
            replace(folder / name, save)

    sharding.on_first_process(put)


def _layout_of(config: dict, model: nn.Module, params) -> Layout:
    return layout(
        model, params, config["target_modules"], bias=config["bias"] != "none",
        layers_to_transform=config.get("layers_to_transform"), layers_pattern=config.get("layers_pattern"),
    )  # fmt: skip


def _read_config(file: pathlib.Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing. Give a directory that holds {CONFIG} and {TENSORS}.")
    stored = read_json(file)
    config = _DEFAULTS | stated(stored)
    for option, values in _FIXED.items():
        if config.get(option) not in values:
            raise ValueError(
                f"{file} has {option} {config.get(option)!r}; what can be read is {values[0]!r} and its like."
            )
    for option in ("d", "proj_seed"):
        if type(config.get(option)) is not int:
            raise ValueError(f"{file} must say {option}, an integer, and has {config.get(option)!r}.")
    if unknown := [name for name in config if name not in (*_FIXED, *_READ, *_INERT) and config[name] is not None]:
        raise ValueError(f"{file} has {unknown[0]} {config[unknown[0]]!r}, of which it isn't known what it changes.")
    targets = config.get("target_modules")
    if not targets or targets == "all-linear" or not isinstance(targets, (list, str)):
        raise ValueError(f"{file} has target_modules {targets!r}, which PEFT resolves by itself. List the modules.")
    kinds: dict[str, tuple[Any, Any]] = {
        "target_modules": (str, str), "layers_pattern": (str, str), "layers_to_transform": (int, int), "isometric": (bool, None),
        "gpart_dropout": ((int, float), None), "init_bound": ((int, float), None),
    }  # fmt: skip
    for option, (kind, of_list) in kinds.items():
        value = config.get(option)
        listed = of_list and isinstance(value, list) and all(isinstance(one, of_list) for one in value)
        if not (value is None or isinstance(value, kind) or listed):
            raise ValueError(f"{file} has {option} {str(value)[:60]!r}, which it can't be.")
    try:
        for pattern in (targets, config.get("layers_pattern")):
            re.compile(pattern if isinstance(pattern, str) else "|".join(pattern or []))
    except re.error as error:
        raise ValueError(f"{file} has a pattern that is none: {error}.") from None
    return stored


def _is_target(name: str, target_modules, layers_to_transform=None, layers_pattern=None) -> bool:
    """PEFT's rule."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    if not any(name == target or name.endswith(f".{target}") for target in target_modules):
        return False
    if layers_to_transform is None or layers_to_transform == []:
        return True
    wanted = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or [r"[^.]*"]
    numbers = (re.match(rf".*\.{pattern}\.(\d+)\.", name) for pattern in patterns)
    number = next((match for match in numbers if match), None)
    return number is not None and int(number[1]) in wanted


def _linears(model: nn.Module, leaves: dict) -> list[list[Linear]]:
    """Their linear modules in the order of the model; for a ViT by the names of transformers 4, then by those of 5."""
    config = model.config
    if config.family not in pretrained.MODULES:
        table = {path: name for path, name in pretrained_decoder.MODULES.items() if f"{path}/kernel" in leaves}
        stacked = {path: name for path, name in table.items() if "#" in name}
        layers = [
            Linear(stacked[path].replace("#", str(n)), path, n) for n in range(config.num_layers) for path in stacked
        ]
        return [layers + ([Linear("lm_head", "lm_head", None)] if "lm_head/kernel" in leaves else [])]
    table = pretrained.MODULES[config.family]
    paths = [path.replace("#", str(n)) for n in range(config.num_layers) for path in table if path.startswith("layer_")]
    paths += [path for path in table if not path.startswith("layer_")]
    paths = [path for path in paths if f"{path}/kernel" in leaves and len(leaves[f"{path}/kernel"].shape) == 2]
    named = [Linear(_name(f"{path}/kernel", config.family).removesuffix(".weight"), path, None) for path in paths]
    if config.family != "vit":
        return [named]
    return [named, [one._replace(name=_vit_5(one)) for one in named]]


def _vit_5(one: Linear) -> str:
    match = re.fullmatch(r"layer_(\d+)/(.*)", one.path)
    return f"vit.layers.{match[1]}.{VIT_5[match[2]]}" if match else one.name


def _name(path: str, family: str) -> str:
    """The whole name of our leaf in their model for classification."""
    without, prefixed = pretrained.names(path, family)[:: len(pretrained.LEAVES[path.rsplit("/", 1)[1]])]
    return without if path.startswith("classifier/") else prefixed


def _names(model: nn.Module, params) -> dict[str, str]:
    """Their names of all leaves that may be saved whole -> ours."""
    family, paths = model.config.family, [path for path, _ in named_leaves(params)]
    if family in pretrained.MODULES:
        return {_name(path, family): path for path in paths}
    return {pretrained_decoder.names(path, model.config)[0]: path for path in paths if not path.startswith("layers/")}


def _module(name: str) -> str:
    """Which of modules_to_save a tensor of theirs belongs to."""
    return "classifier" if name.startswith("classifier.") else name.rsplit(".", 1)[0]


def _number(chosen: list[Linear], leaves: dict, bias: bool) -> Layout:
    """The layout of modules in the order of the model."""
    first: dict[str, list[int]] = {}  # where a leaf starts, or each layer of a stacked one
    shapes, strides, offset = {}, {}, 0
    for one in chosen:
        for path in (f"{one.path}/kernel", f"{one.path}/bias") if bias else (f"{one.path}/kernel",):
            if path not in leaves:
                continue  # no bias
            shape = tuple(leaves[path].shape)
            inner = shape if one.layer is None else shape[1:]
            shapes[path], strides[path] = shape, (1,) if len(inner) == 1 else (1, inner[0])
            first.setdefault(path, []).append(offset)
            offset += int(np.prod(inner))
    numbered = []
    for path, starts in first.items():
        stacked = len(shapes[path]) > len(strides[path])
        if stacked:
            period = starts[1] - starts[0] if len(starts) > 1 else int(np.prod(shapes[path][1:]))
            if len(starts) != shapes[path][0]:
                raise ValueError(
                    f"{path} holds all layers, but only some are targeted. Target the same in every layer."
                )
            strides[path] = (period, *strides[path])
        numbered.append(Leaf(path, shapes[path], starts[0], strides[path], stacked))
    return Layout(tuple(sorted(numbered, key=lambda leaf: leaf.offset)))


def _target_modules(chosen: list[Linear], linears: list[Linear]) -> list[str]:
    """The shortest endings that match those modules and no other; whole names where there are none."""
    wanted, endings = {one.name for one in chosen}, set()
    for name in wanted:
        parts = name.split(".")
        for start in range(len(parts) - 1, -1, -1):
            ending = ".".join(parts[start:])
            if {one.name for one in linears if _is_target(one.name, [ending])} <= wanted:
                endings.add(ending)
                break
    return sorted(endings)


def _task(model: nn.Module) -> str | None:
    family = model.config.family
    return {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "vit": None}.get(family, "CAUSAL_LM")
