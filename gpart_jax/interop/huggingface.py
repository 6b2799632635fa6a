"""Hugging Face directories of any family that is here: the base an adapter belongs to, and what merging gives."""

import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gpart_jax import sharding
from gpart_jax.adapter import Adapter
from gpart_jax.models import pretrained, pretrained_decoder
from gpart_jax.models.decoder import FAMILIES, Decoder
from gpart_jax.models.encoder import EncoderClassifier
from gpart_jax.models.storage import locate, read_config
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


def _save_decoder(directory, model, params, labels):
    del labels  # of classes, which a language model has none of
    merged = model.clone(param_dtype=params["embed"]["embedding"].dtype)
    pretrained_decoder.save(directory, merged, params)


SAVE = {EncoderClassifier: pretrained.save, ViTClassifier: pretrained.save, Decoder: _save_decoder}


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
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        return pretrained_decoder.load_decoder(source, dtype=jnp.dtype(dtype))
    if family not in LOAD:
        raise ValueError(f"{source} is a {family!r}; what can be read here is {', '.join((*LOAD, *FAMILIES))}.")
    trained = {name.partition("/")[2]: x for name, x in adapter.tensors.items()} if adapter else {}
    biases = [trained[path] for path in ("classifier/bias", "classifier/out_proj/bias") if path in trained]
    outputs = len(biases[0]) if biases else len(config.get("id2label", {})) or config.get("num_labels", 2)
    return LOAD[family](source, outputs, key=jax.random.key(0))


def export(
    directory: str | os.PathLike,
    model: nn.Module,
    params: PyTree,
    *,
    labels: Sequence[str] | None = None,
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Writes a model as a Hugging Face directory that `transformers` and vLLM load.

    Its params may be sharded, over several processes too: all call it, and the first writes one copy of the whole.

    Args:
      directory: made if need be, on the first process's disk.
      model: whose config is written.
      params: of it, such as those of `Adapter.merge`.
      labels: the names of a classifier's outputs.
      tokenizer: a source, as in `models.storage.locate`, whose tokenizer is copied.

    Raises:
      ValueError: a model of a family that can't be written.
    """
    if type(model) not in SAVE:
        names = ", ".join(kind.__name__ for kind in SAVE)
        raise ValueError(f"A {type(model).__name__} can't be written as a Hugging Face directory; {names} can.")
    whole = sharding.fetch(params)

    def write():
        SAVE[type(model)](directory, model, whole, labels)
        if tokenizer is None:
            return
        for name in TOKENIZER:
            if (file := locate(tokenizer) / name).is_file():
                shutil.copyfile(file, pathlib.Path(directory) / name)

    sharding.on_first_process(write)
