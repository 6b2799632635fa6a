"""A Llama in a GGUF file, seen as the Hugging Face directory that it was converted from. Needs the package `gguf`.

The weights are dequantized one tensor at a time. The converter permuted the rows of the query and key projections, so
that a rotary pair lies in neighbouring rows and not half a head apart; here they are put back.
"""

import pathlib
import re
from types import EllipsisType
from typing import Any, NamedTuple

import gguf
import numpy as np

from gpart_jax.models.storage import check_shape

NAMES = {  # GGUF's module -> the directory's, where "#" is the number of the layer
    "token_embd": "model.embed_tokens",
    "blk.#.attn_norm": "model.layers.#.input_layernorm",
    "blk.#.attn_q": "model.layers.#.self_attn.q_proj",
    "blk.#.attn_k": "model.layers.#.self_attn.k_proj",
    "blk.#.attn_v": "model.layers.#.self_attn.v_proj",
    "blk.#.attn_output": "model.layers.#.self_attn.o_proj",
    "blk.#.ffn_norm": "model.layers.#.post_attention_layernorm",
    "blk.#.ffn_gate": "model.layers.#.mlp.gate_proj",
    "blk.#.ffn_up": "model.layers.#.mlp.up_proj",
    "blk.#.ffn_down": "model.layers.#.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}
CONFIG = {  # config.json's name -> the metadata's, after the architecture's prefix
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}


def open_file(file: pathlib.Path) -> gguf.GGUFReader:
    """The file's metadata, and where its tensors are.

    Raises:
      ValueError: it is damaged, or its model is no Llama.
    """
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # NumPy's and the reader's own: where a file ends too early decides which
        raise ValueError(f"{file} is damaged or no GGUF file ({error}). Download or copy it again.") from error
    architecture = field(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"{file} has architecture {architecture!r}; of GGUF files only 'llama' is read.")
    scaling = field(reader, "llama.rope.scaling.type") or "none"
    if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ValueError(f"{file} scales its rotary angles, which isn't read from GGUF. Load the model's safetensors.")
    return reader


def field(reader: gguf.GGUFReader, name: str) -> Any:
    """A value of the metadata; None where there is none."""
    found = reader.get_field(name)
    return None if found is None else found.contents()


def read_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """What config.json would hold."""
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    config = {name: field(reader, f"llama.{ending}") for name, ending in CONFIG.items()}
    config |= {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": "output.weight" not in shapes}
    if "token_embd.weight" in shapes:
        config["vocab_size"] = int(shapes["token_embd.weight"][1])
    return config


class Quantized(NamedTuple):
    """As `storage.Tensor`."""

    name: str
    file: pathlib.Path
    stored: gguf.gguf_reader.ReaderTensor
    heads: int | None  # whose rows are permuted

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self.stored.shape))

    def read(self, shape: tuple[int, ...], part: tuple[slice, ...] | EllipsisType = ...) -> np.ndarray:
        """float32, as `storage.Tensor.read`."""
        check_shape(self, shape)
        try:
            weights = gguf.dequantize(self.stored.data, self.stored.tensor_type).astype(np.float32)
        except NotImplementedError as error:
            raise ValueError(f"{self.file}: tensor {self.stored.name!r}: {error}. Load another quantization.") from None
        if self.heads is not None:  # a head's rows: (D / 2, 2) -> (2, D / 2)
            weights = weights.reshape(self.heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        return weights[part]


def open_tensors(file: pathlib.Path, reader: gguf.GGUFReader) -> dict[str, Quantized]:
    """The tensors by the names that they have in a directory."""
    heads = {
        name: field(reader, f"llama.attention.{count}")
        for name, count in (("attn_q", "head_count"), ("attn_k", "head_count_kv"))
    }
    tensors = {}
    for stored in reader.tensors:
        module, ending = stored.name.rsplit(".", 1)
        number = "".join(re.findall(r"\d+", module))
        name = NAMES.get(re.sub(r"\d+", "#", module))
        if name is not None:
            name = f"{name.replace('#', number)}.{ending}"
            tensors[name] = Quantized(name, file, stored, heads.get(module.split(".")[-1]))
    return tensors
