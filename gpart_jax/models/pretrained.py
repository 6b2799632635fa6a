"""Pretrained weights: a Hugging Face directory of safetensors into the modules of this package, and back.

PyTorch is never involved.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from flax import traverse_util
from jax.typing import DTypeLike

from gpart_jax.models import encoder, vit
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.models.storage import WEIGHTS, Tensor, locate, open_tensors, read_config, read_preprocessor, replace
from gpart_jax.models.vit import ViTClassifier, ViTConfig
from gpart_jax.targets import PyTree

logger = logging.getLogger(__name__)

# Our module -> the checkpoint's, where "#" is the number of the layer.
BERT = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "layer_#/attention/query": "encoder.layer.#.attention.self.query",
    "layer_#/attention/key": "encoder.layer.#.attention.self.key",
    "layer_#/attention/value": "encoder.layer.#.attention.self.value",
    "layer_#/attention/out": "encoder.layer.#.attention.output.dense",
    "layer_#/attention_norm": "encoder.layer.#.attention.output.LayerNorm",
    "layer_#/intermediate": "encoder.layer.#.intermediate.dense",
    "layer_#/output": "encoder.layer.#.output.dense",
    "layer_#/output_norm": "encoder.layer.#.output.LayerNorm",
    "pooler": "pooler.dense",
    "classifier": "classifier",  # BERT
    "classifier/dense": "classifier.dense",  # RoBERTa
    "classifier/out_proj": "classifier.out_proj",
}
VIT = {
    "embeddings": "embeddings",
    "embeddings/patch": "embeddings.patch_embeddings.projection",
    "layer_#/attention/query": "encoder.layer.#.attention.attention.query",
    "layer_#/attention/key": "encoder.layer.#.attention.attention.key",
    "layer_#/attention/value": "encoder.layer.#.attention.attention.value",
    "layer_#/attention/out": "encoder.layer.#.attention.output.dense",
    "layer_#/attention_norm": "encoder.layer.#.layernorm_before",
    "layer_#/intermediate": "encoder.layer.#.intermediate.dense",
    "layer_#/output": "encoder.layer.#.output.dense",
    "layer_#/output_norm": "encoder.layer.#.layernorm_after",
    "norm": "layernorm",
    "pooler": "pooler.dense",
    "classifier": "classifier",
}
ARCHITECTURES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "vit": "ViTForImageClassification",
}
MODULES = {"bert": BERT, "roberta": BERT, "vit": VIT}
# Our leaf -> the checkpoint's; gamma and beta are what TensorFlow called a LayerNorm's weight and bias.
LEAVES = {
    "kernel": ["weight"], "embedding": ["weight"], "scale": ["weight", "gamma"], "bias": ["bias", "beta"],
    "class_token": ["cls_token"], "position": ["position_embeddings"],
}  # fmt: skip


def load_encoder(
    source: str | os.PathLike, num_labels: int, *, key: jax.Array, dtype: DTypeLike = jnp.float32
) -> tuple[EncoderClassifier, dict]:
    """A pretrained BERT (arXiv 1810.04805) or RoBERTa (arXiv 1907.11692) under a head of `num_labels` outputs.

    The head is the checkpoint's if it has one of `num_labels` outputs, and otherwise fresh: normal with the config's
    initializer_range, biases zero. So is the pooler of a BERT saved without one. Either is logged.

    Args:
      source: as in `locate`.
      num_labels: classes, or 1 for regression.
      key: draws what is fresh.
      dtype: what the model computes in; the weights are float32 whatever they were stored as.

    Returns:
      (model, params): an `EncoderClassifier` and its nested dict of float32 arrays.

    Raises:
      FileNotFoundError: nothing is there, or a file is missing.
      ValueError: a model of another architecture, a damaged file, or a tensor that is missing or has the wrong shape.
    """
    directory = locate(source)
    model = EncoderClassifier(EncoderConfig.from_hf(read_config(directory)), num_labels, dtype)
    token = jnp.zeros((1, 1), jnp.int32)
    return model, _load(directory, model, jax.eval_shape(model.init, key, token, token)["params"], key)


def load_vit(
    source: str | os.PathLike,
    num_labels: int,
    *,
    key: jax.Array,
    dtype: DTypeLike = jnp.float32,
    pooler: bool = False,
) -> tuple[ViTClassifier, dict]:
    """A pretrained ViT (arXiv 2010.11929) under a head of `num_labels` classes, as `load_encoder` does it.

    Args:
      pooler: whether the checkpoint's pooler is under the head; Hugging Face's `ViTForImageClassification` has none.

    Returns:
      (model, params): a `ViTClassifier` and its nested dict of float32 arrays.
    """
    directory = locate(source)
    normalised: dict[str, Any] = vit.normalisation(read_preprocessor(directory))
    config = dataclasses.replace(ViTConfig.from_hf(read_config(directory)), pooler=pooler, **normalised)
    model = ViTClassifier(config, num_labels, dtype)
    return model, _load(directory, model, jax.eval_shape(model.init, key, model.config.example)["params"], key)


def _load(directory: pathlib.Path, model: nn.Module, shapes, key: jax.Array):
    config, params = model.config, {}
    expected = traverse_util.flatten_dict(shapes, sep="/")
    with contextlib.ExitStack() as stack:
        found = _find(open_tensors(directory, stack), model, shapes)
        fresh = _fresh(found, config.family, model.num_labels)
        # What is drawn comes last: no file vouches for its size until the others fit.
        for number, (path, leaf) in sorted(enumerate(expected.items()), key=lambda entry: entry[1][0].startswith(fresh)):
            if path.startswith(fresh):
                params[path] = _draw(jax.random.fold_in(key, number), path, leaf.shape, config.initializer_range)
            elif tensor := found[path]:
                params[path] = _read(tensor, path, leaf.shape)
            else:
                name = names(path, config.family)[0]
                raise ValueError(
                    f"{directory}: the safetensors hold no tensor {name!r}, nor '{config.family}.{name}', which the "
                    "model of config.json needs. Download or save the model again."
                )
    return traverse_util.unflatten_dict(params, sep="/")


def drawn(source: str | os.PathLike, model: nn.Module) -> tuple[str, ...]:
    """What `load_encoder` or `load_vit` draws of a model's params, for it is in no file: the beginnings of its paths.

    Raises: as they do.
    """
    token = jnp.zeros((1, 1), jnp.int32)
    inputs = (token, token) if isinstance(model, EncoderClassifier) else (model.config.example,)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    with contextlib.ExitStack() as stack:
        return _fresh(_find(open_tensors(locate(source), stack), model, shapes), model.config.family, model.num_labels)


def _find(stored: dict[str, Tensor], model: nn.Module, shapes) -> dict[str, Tensor | None]:
    paths, family = traverse_util.flatten_dict(shapes, sep="/"), model.config.family
    return {path: next((stored[n] for n in names(path, family) if n in stored), None) for path in paths}


def names(path: str, family: str) -> list[str]:
    """The names a checkpoint may give to our leaf `path`; the first is without the family's prefix."""
    module, leaf = path.rsplit("/", 1)
    number = "".join(re.findall(r"^layer_(\d+)/", module))
    name = MODULES[family][re.sub(r"^layer_\d+/", "layer_#/", module)].replace("#", number)
    return [f"{prefix}{name}.{ending}" for prefix in ("", f"{family}.") for ending in LEAVES[leaf]]


def _fresh(found: dict[str, Tensor | None], family: str, num_labels: int) -> tuple[str, ...]:
    """Which modules the checkpoint lacks that may be drawn instead of read; says so."""
    fresh: tuple[str, ...] = ()
    kernel = found["classifier/out_proj/kernel" if family == "roberta" else "classifier/kernel"]
    outputs = kernel.shape[0] if kernel else 0
    if outputs != num_labels:
        has = f"has a head of {outputs}" if kernel else "has none"
        logger.info("The head of %d outputs is fresh: the checkpoint %s.", num_labels, has)
        fresh += ("classifier/",)
    if "pooler/kernel" in found and not (found["pooler/kernel"] or found["pooler/bias"]):
        logger.warning("The pooler is fresh, and frozen unless you train it: the checkpoint has none.")
        fresh += ("pooler/",)
    return fresh


def _draw(key: jax.Array, path: str, shape: tuple[int, ...], scale: float) -> jax.Array:
    if path.endswith("/bias"):
        return jnp.zeros(shape, jnp.float32)
    return scale * jax.random.normal(key, shape, jnp.float32)


def _read(tensor: Tensor, path: str, shape: tuple[int, ...]) -> jax.Array:
    """One tensor as our leaf. The only copy beside the result is its own."""
    axes = kernel_axes(path, len(shape))
    stored = tensor.read(tuple(shape[axes.index(n)] for n in range(len(shape))))
    return jnp.array(np.asarray(stored, np.float32).transpose(axes))


def kernel_axes(path: str, ndim: int) -> tuple[int, ...]:
    """Which axis of PyTorch's tensor each of our leaf's is: its weights are (out, in) and (out, in, height, width)."""
    if not path.endswith("/kernel"):
        return tuple(range(ndim))
    return {2: (1, 0), 4: (2, 3, 1, 0)}[ndim]


def tensors(model: nn.Module, params: PyTree, known: Collection[str] = ()) -> dict[str, Callable[[], np.ndarray]]:
    """A checkpoint's tensors by name; each is made where it is called.

    Args:
      model, params: an `EncoderClassifier` or a `ViTClassifier`; its nested dict, or a part of it.
      known: names of a checkpoint whose spelling is kept.
    """
    made: dict[str, Callable[[], np.ndarray]] = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        spelt = names(path, model.config.family)
        without, prefixed = spelt[:: len(LEAVES[path.rsplit("/", 1)[1]])]
        usual = without if path.startswith("classifier/") else prefixed
        made[next((name for name in spelt if name in known), usual)] = functools.partial(_tensor, leaf, path)
    return made


def _tensor(leaf: jax.Array, path: str) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(leaf).transpose(np.argsort(kernel_axes(path, leaf.ndim))))


def save(directory: str | os.PathLike, model: nn.Module, params: PyTree, labels: Sequence[str] | None = None) -> None:
    """Writes a model as a Hugging Face directory, config.json and model.safetensors, that `transformers` loads too.

    Args:
      directory: made if need be. What is there is replaced file by file, each in one step.
      model: an `EncoderClassifier` or a `ViTClassifier`.
      params: its nested dict.
      labels: the names of its outputs.
    """
    directory, config = pathlib.Path(directory), model.config
    directory.mkdir(parents=True, exist_ok=True)
    hf_names = (vit if config.family == "vit" else encoder).HF_NAMES
    if config.family == "vit":
        size = {"height": config.image_size, "width": config.image_size}
        prepared = {"image_processor_type": "ViTImageProcessor", "size": size, "resample": 2}  # bilinear
        each = config.channels // len(config.image_mean)
        prepared |= {"image_mean": config.image_mean * each, "image_std": config.image_std * each}
        replace(directory / "preprocessor_config.json", lambda file: file.write_text(json.dumps(prepared) + "\n"))
    ours = {"pooler", "image_mean", "image_std"}  # which a config.json doesn't have
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in ours}
    described = {hf_names.get(name, name): value for name, value in fields.items()}
    described |= {"architectures": [ARCHITECTURES[config.family]], "num_labels": model.num_labels}
    described["torch_dtype"] = str(jax.tree.leaves(params)[0].dtype)
    if labels is not None:
        described |= named(labels)
    replace(directory / "config.json", lambda file: file.write_text(json.dumps(described, indent=2) + "\n"))
    made = {name: make() for name, make in tensors(model, params).items()}
    replace(directory / WEIGHTS, lambda file: safetensors.numpy.save_file(made, file, {"format": "pt"}))


def named(labels: Sequence[str]) -> dict[str, dict]:
    """The fields of config.json that name a classifier's outputs."""
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }
