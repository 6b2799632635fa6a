"""What a config describes, apart from how it is trained: the model with its frozen weights, and the task."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from experiments import data
from experiments.tasks import IMAGES, LANGUAGE, TEXT, load_task, task_kind
from gpart_jax import sharding
from gpart_jax.adapter.fingerprint import base_fingerprint
from gpart_jax.models import decoder, pretrained, storage
from gpart_jax.models.attention import choose
from gpart_jax.models.pretrained_decoder import load_decoder
from gpart_jax.models.vit import ViTClassifier, ViTConfig
from gpart_jax.targets import named_leaves


class Experiment(NamedTuple):
    """What a config describes, apart from how it is trained: the model, its frozen params with a fresh head, the task."""

    model: nn.Module
    params: Any  # on the host; a decoder's on the mesh
    task: data.Task
    rules: sharding.Rules  # how a mesh divides the params
    drawn: tuple[str, ...] = ()  # the beginnings of paths of what no file holds

    def origin(self, splits: Sequence[str] = ("train", "validation", "test")) -> dict[str, str]:
        """What a run depends on beside its config: the data of these splits, the model's weights and shape. All processes call it."""
        read = {path: leaf for path, leaf in named_leaves(self.params) if not path.startswith(self.drawn)}
        labels = hashlib.sha256(json.dumps(self.task.labels).encode()).hexdigest()[:16]
        found = {f"{split} data": data.fingerprint(getattr(self.task, split)) for split in splits}
        shape = {f"model.{name}": str(value) for name, value in dataclasses.asdict(self.model.config).items()}
        return found | {"labels of the data": labels, "model's weights": base_fingerprint(read)} | shape


def build(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None) -> Experiment:
    """Loads the pretrained model of a config, or makes a fresh one of `config.model.shape`, and its task.

    Args:
      mesh: where a decoder's weights go; None: the first device.

    Raises:
      ValueError: a model and a task that don't go together, besides what loading raises.
    """
    source = config.model.source
    where = storage.locate(source) if source else None
    takes, gives = model_kind(where), task_kind(config.task.name)
    if takes != gives:
        raise ValueError(
            f"config.task.name = {config.task.name!r} gives {gives}, but config.model.source = {source!r} is a model of "
            f"{takes}. Change one of them."
        )
    task = load_task(config.task.to_dict(), where, config.seed)
    key, dtype = jax.random.key(config.seed), jnp.dtype(config.model.dtype)
    if takes == LANGUAGE:
        model, params = load_decoder(source, mesh=mesh, dtype=dtype)
        rules, longest = sharding.DECODER_TIED if model.config.tied else sharding.DECODER, model.config.max_positions
    elif takes == TEXT:
        model, params = pretrained.load_encoder(where, task.outputs, key=key, dtype=dtype)
        rules, longest = sharding.ENCODER, model.config.max_length
    else:
        rules, longest = sharding.VIT, None
        if where is None:
            model = ViTClassifier(ViTConfig(**config.model.shape.to_dict()), task.outputs, dtype)
            params = jax.jit(model.init)(key, jnp.zeros(model.config.example.shape))["params"]
        else:
            model, params = pretrained.load_vit(where, task.outputs, key=key, dtype=dtype)
    if longest is not None and task.max_length > longest:
        raise ValueError(f"config.task.max_length = {task.max_length}, but {source} takes {longest} tokens.")
    if takes != IMAGES:
        check_ids(task, model.config, source)
    mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    if takes == LANGUAGE:
        return Experiment(fitted(model, config.model, mesh), params, task, rules)
    if config.model.get("dropout") is not None:
        rates = {"hidden_dropout", "attention_dropout", "classifier_dropout"} & vars(model.config).keys()
        rated = dataclasses.replace(model.config, **dict.fromkeys(rates, config.model.dropout))
        model = model.clone(config=rated)
    drawn = pretrained.drawn(where, model) if where else ()
    return Experiment(fitted(model, config.model, mesh), jax.tree.map(np.asarray, params), task, rules, drawn)


def check_ids(task: data.Task, shape: Any, source: str) -> None:
    """Raises a ValueError that names the first example with an id that the model has no embedding of: it would be NaN."""
    for field, size in (("input_ids", "vocab_size"), ("token_type_ids", "type_vocab_size")):
        if (count := getattr(shape, size, None)) is None:
            continue
        for split in ("train", "validation", "test"):
            for number, example in enumerate(getattr(task, split)):
                ids = np.asarray(example.get(field, ()))
                if ids.size and not 0 <= ids.min() <= (largest := ids.max()) < count:
                    raise ValueError(
                        f"Example {number} of {split}, {str(example.get('text'))[:60]!r}, has {field} up to {largest}, but {source} has "
                        f"{size} {count}. Tokenizer and model are of different models: take both from one place."
                    )


def fitted(model: nn.Module, options: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> nn.Module:
    """The model with the attention and the remat that config.model asks for, or that suit a mesh."""
    shape, platform = model.config, mesh.devices.flat[0].platform
    attention = choose(
        options.get("attention", "auto"), platform, model.dtype, shape.head_dim, shape.pattern,
        getattr(shape, "attention_dropout", 0.0),
    )  # fmt: skip
    # An encoder whose weights "fsdp" divides would else gather all of them at once.
    suited = "full" if isinstance(model, decoder.Decoder) or mesh.shape["fsdp"] > 1 else "none"
    return model.clone(attention=attention, remat=options.get("remat") or suited)


def model_kind(where: pathlib.Path | None) -> str:
    """What a model at a place (None: a fresh one) is of: TEXT, IMAGES or LANGUAGE."""
    if where is None:
        return IMAGES
    if where.suffix == ".gguf":
        return LANGUAGE
    family = storage.read_config(where).get("model_type")
    return IMAGES if family == "vit" else LANGUAGE if family in decoder.FAMILIES else TEXT
