"""Hugging Face directories of any family that is here: the base an adapter belongs to, and what merging gives."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from gpart_jax import sharding
from gpart_jax.adapter import Adapter, Merged
from gpart_jax.models import output, pretrained, pretrained_decoder
from gpart_jax.models.decoder import FAMILIES, Decoder
from gpart_jax.models.encoder import EncoderClassifier
from gpart_jax.models.storage import locate, open_tensors, read_config, stated_dtype, stored_dtype
from gpart_jax.models.vit import ViTClassifier
from gpart_jax.targets import PyTree

LOAD: dict[str, Callable[..., tuple[nn.Module, dict]]] = {
    "bert": pretrained.load_encoder,
    "roberta": pretrained.load_encoder,
    "vit": pretrained.load_vit,
}
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt"
)  # fmt: skip
MOST_LABELS = 2**20


def _save_decoder(directory, model, params, labels):
    del labels  # of classes, which a language model has none of
    merged = model.clone(param_dtype=params["embed"]["embedding"].dtype)
    pretrained_decoder.save(directory, merged, params)


SAVE = {EncoderClassifier: pretrained.save, ViTClassifier: pretrained.save, Decoder: _save_decoder}
TENSORS: dict[type, Callable[..., output.Lazy]] = {
    EncoderClassifier: pretrained.tensors, ViTClassifier: pretrained.tensors, Decoder: pretrained_decoder.tensors
}  # fmt: skip


def load_base(source: str | os.PathLike, adapter: Adapter | None = None) -> tuple[nn.Module, dict]:
    """(model, params): a pretrained model, a classifier's head with as many outputs as the adapter's, or as its config says.

    Args:
      source: as in `models.storage.locate`.

    Raises:
      FileNotFoundError, ValueError: as `load_encoder`; a family that isn't here.
    """
    where = locate(source)
    # Of GGUF files, Llamas alone.
    config: dict[str, Any] = read_config(where) if where.is_dir() else {"model_type": "llama"}
    family = config.get("model_type")
    if family in FAMILIES:
        return pretrained_decoder.load_decoder(source, dtype=jnp.dtype(base_dtype(source)))
    if family not in tuple(LOAD):
        raise ValueError(f"{source} is a {family!r}; what can be read here is {', '.join((*LOAD, *FAMILIES))}.")
    trained = {name.partition("/")[2]: x for name, x in adapter.tensors.items()} if adapter else {}
    biases = [trained[path] for path in ("classifier/bias", "classifier/out_proj/bias") if path in trained]
    return LOAD[family](source, len(biases[0]) if biases else _outputs(config), key=jax.random.key(0))


def base_dtype(source: str | os.PathLike) -> str:
    """The dtype of a pretrained model: its config's, else that of most of its weights; bfloat16 of a GGUF file.

    Raises:
      FileNotFoundError, ValueError: as `load_base`; a dtype that isn't float32, float16 or bfloat16.
    """
    where = locate(source)
    return (stated_dtype(read_config(where)) or stored_dtype(where)) if where.is_dir() else "bfloat16"


def _outputs(config: dict[str, Any]) -> int:
    """How many a classifier's config.json says."""
    labels, number = config.get("id2label") or {}, config.get("num_labels")
    if not isinstance(labels, dict):
        raise ValueError(f"config.json has id2label {str(labels)[:60]}, which is no object of names.")
    number = len(labels) or (2 if number is None else number)
    if type(number) is not int or not 1 <= number <= MOST_LABELS:
        raise ValueError(f"config.json has num_labels {number!r}; it must be a number from 1 to {MOST_LABELS:,}.")
    return number


def merge(
    adapter: Adapter,
    source: str | os.PathLike,
    directory: str | os.PathLike,
    dtype: DTypeLike | None = None,
    *,
    overwrite: bool = False,
) -> Merged:
    """Writes a base and an adapter as one directory: the base's, with other weights, and the adapter's head if it has one.

    Args:
      source: as in `models.storage.locate`.
      directory: as in `export`.
      dtype: of the merged weights; None: as `base_dtype`.

    Raises:
      FileNotFoundError, ValueError: as `load_base`, `Adapter.merge` and `export`.
    """
    output.check_directory(directory, overwrite=overwrite, inputs=[locate(source)])  # before anything large is read
    model, params = load_base(source, adapter)
    merged = adapter.merge(params, dtype or base_dtype(source))
    written = merged.params
    if not isinstance(model, Decoder) and not any("/classifier/" in name for name in adapter.tensors):
        drawn = pretrained.drawn(source, model)  # noise, unless a head was trained on it
        written = {name: leaves for name, leaves in written.items() if f"{name}/" not in drawn}
    export(directory, model, written, base=source, overwrite=overwrite)
    return merged


def export(
    directory: str | os.PathLike,
    model: nn.Module,
    params: PyTree,
    *,
    labels: Sequence[str] | None = None,
    tokenizer: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model as a Hugging Face directory that `transformers` and vLLM load, whole or not at all.

    Its params may be sharded, over several processes too: all call it, and the first writes one copy of the whole.

    Args:
      directory: made if need be, on the first process's disk.
      model: whose config is written.
      params: of it, such as those of `Adapter.merge`.
      labels: the names of a classifier's outputs.
      tokenizer: a source, as in `models.storage.locate`, whose tokenizer is copied.
      base: the source that the model was made from. The directory is then its copy with these weights, in its files if it has all of
        their names: every file stays but weights in other formats and what is hidden, and of config.json all but the dtype, the
        names of the outputs and the architecture, where they are others.
      overwrite: whether another model may be replaced.

    Raises:
      ValueError: a model of a family that can't be written; a directory that isn't empty, unless it may be replaced; or one that is
        the base's, or holds it.
    """
    if type(model) not in SAVE:
        names = ", ".join(kind.__name__ for kind in SAVE)
        raise ValueError(f"A {type(model).__name__} can't be written as a Hugging Face directory; {names} can.")
    whole = sharding.fetch(params)
    where = None if base is None else locate(base)

    def write():
        inputs = [] if where is None else [where]
        with output.new_directory(directory, overwrite=overwrite, inputs=inputs) as new:
            if where is not None and where.is_dir():
                _write_like(where, new, model, whole, labels)
            else:
                SAVE[type(model)](new, model, whole, labels)
            if tokenizer is not None:
                for file in (file for name in TOKENIZER if (file := locate(tokenizer) / name).is_file()):
                    shutil.copyfile(file, new / file.name)

    sharding.on_first_process(write)


def _write_like(where: pathlib.Path, new: pathlib.Path, model: nn.Module, params: PyTree, labels: Sequence[str] | None) -> None:
    config = read_config(where)
    dtype, before = str(jnp.result_type(*jax.tree.leaves(params))), stated_dtype(config) or stored_dtype(where)
    changes: dict[str, Any] = {}
    if dtype != before:
        changes |= {name: dtype for name in ("dtype", "torch_dtype") if config.get(name) is not None} or {"torch_dtype": dtype}
    if not isinstance(model, Decoder) and "classifier" in params:
        changes["architectures"] = [pretrained.ARCHITECTURES[model.config.family]]
        if model.num_labels != _outputs(config):
            labels = labels or [f"LABEL_{number}" for number in range(model.num_labels)]
            changes |= {"num_labels": model.num_labels} if "num_labels" in config else {}
            changes |= {"problem_type": None} if "problem_type" in config else {}
        if labels is not None:
            changes |= pretrained.named(labels)
    with contextlib.ExitStack() as stack:
        stored = open_tensors(where, stack)
        tensors = TENSORS[type(model)](model, params, stored)
        if tensors.keys() <= stored.keys():
            output.write_weights_like(stored, tensors, new, (stored_dtype(where), dtype))
        else:  # a head that the base doesn't have
            SAVE[type(model)](new, model, params, labels)
    output.copy_side_files(where, new)
    output.change_json(where / "config.json", new / "config.json", changes)
