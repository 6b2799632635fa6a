"""Pretrained decoders: Hugging Face directories and GGUF files onto a mesh, and back into a directory.

A weight of all layers is one leaf here and a tensor for each layer there. Each leaf is read, converted and placed by
itself, so that beside the model there is never more than one in memory.
"""

import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from gpart_jax import sharding
from gpart_jax.models.decoder import Decoder, DecoderConfig
from gpart_jax.models.storage import WEIGHTS, locate, open_tensors, read_config, replace
from gpart_jax.targets import PyTree

MODULES = {  # our module -> the checkpoint's, where "#" is the number of the layer
    "embed": "model.embed_tokens",
    "layers/attention_norm": "model.layers.#.input_layernorm",
    "layers/attention/query": "model.layers.#.self_attn.q_proj",
    "layers/attention/key": "model.layers.#.self_attn.k_proj",
    "layers/attention/value": "model.layers.#.self_attn.v_proj",
    "layers/attention/out": "model.layers.#.self_attn.o_proj",
    "layers/mlp_norm": "model.layers.#.post_attention_layernorm",
    "layers/mlp/gate": "model.layers.#.mlp.gate_proj",
    "layers/mlp/up": "model.layers.#.mlp.up_proj",
    "layers/mlp/down": "model.layers.#.mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gemma": "GemmaForCausalLM",
}


def load_decoder(
    source: str | os.PathLike, *, mesh: Mesh | None = None, dtype: DTypeLike = jnp.bfloat16, remat: str = "full"
) -> tuple[Decoder, dict]:
    """A pretrained Llama, Mistral, Qwen2 or Gemma.

    Args:
      source: as in `locate`. Of GGUF files, Llamas alone.
      mesh: where the weights go, by the rules `sharding.DECODER`. None: the first device.
      dtype: of the weights, whatever they were stored as, and of the computation.
      remat: of `remat.CHOICES`.

    Returns:
      (model, params): a `Decoder` and its nested dict of arrays on the mesh.

    Raises:
      FileNotFoundError: nothing is there, or a file is missing.
      ValueError: a model of another architecture, a damaged file, or a tensor that is missing or has the wrong shape.
    """
    mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    where = locate(source)
    stored: dict
    with contextlib.ExitStack() as stack:
        config = read_decoder_config(where)
        if where.suffix == ".gguf":
            from gpart_jax.models import gguf_file  # here, because a directory needs no gguf

            stored = gguf_file.open_tensors(where, gguf_file.open_file(where))
        else:
            stored = open_tensors(where, stack)
        model = Decoder(config, dtype, dtype, remat)
        token = jnp.zeros((1, 1), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), token, token)["params"]
        rules = sharding.DECODER_TIED if config.tied else sharding.DECODER
        shardings = traverse_util.flatten_dict(sharding.param_shardings(shapes, mesh, rules), sep="/")
        leaves = traverse_util.flatten_dict(shapes, sep="/")
        found = {path: [_find(stored, name, where) for name in names(path, config)] for path in leaves}
        params = {path: _place(leaf, shardings[path], path, found[path]) for path, leaf in leaves.items()}
    return model, traverse_util.unflatten_dict(params, sep="/")


def read_decoder_config(where: pathlib.Path) -> DecoderConfig:
    """The shape of the decoder in a directory or GGUF file; none of its weights is read."""
    if where.suffix == ".gguf":
        from gpart_jax.models import gguf_file

        return DecoderConfig.from_hf(gguf_file.read_config(gguf_file.open_file(where)))
    return DecoderConfig.from_hf(read_config(where))


def names(path: str, config: DecoderConfig) -> list[str]:
    """The tensors of a checkpoint that are our leaf `path`: one, or one for each layer."""
    module, leaf = path.rsplit("/", 1)
    name = f"{MODULES[module]}.{'bias' if leaf == 'bias' else 'weight'}"
    return [name.replace("#", str(n)) for n in range(config.num_layers)] if "#" in name else [name]


def _find(stored: dict, name: str, where: pathlib.Path):
    found = stored.get(name, stored.get(name.removeprefix("model.")))  # without it where the model was saved headless
    if found is None:
        raise ValueError(
            f"{where} holds no tensor {name!r}, which the model of its config needs. Download or save the model again."
        )
    return found


def _place(leaf: jax.ShapeDtypeStruct, placement: NamedSharding, path: str, tensors: list) -> jax.Array:
    """One leaf on the mesh. This process reads the parts of it that its devices hold, each once, layer by layer."""
    stacked, turn = _is_stacked(path), _stored_axes(path)
    made = {}

    def part(index):
        key = str(index)  # devices that hold the same part share it
        if key not in made:
            layers, inner = (index[0], index[1:]) if stacked else (slice(None), index)
            made[key] = np.empty(placement.shard_shape(leaf.shape), leaf.dtype)
            for layer, tensor in zip(made[key] if stacked else made[key][None], tensors[layers]):
                layer[...] = tensor.read(leaf.shape[stacked:][turn], inner[turn]).transpose(range(layer.ndim)[turn])
        return made[key]

    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, placement, part))


def _is_stacked(path: str) -> bool:
    return path.startswith("layers/")


def _stored_axes(path: str) -> slice:
    """Of a shape: PyTorch's weights are (out, in), our kernels (in, out)."""
    return slice(None, None, -1 if path.endswith("/kernel") else 1)


def tensors(model: Decoder, params: PyTree, known: Collection[str] = ()) -> dict[str, Callable[[], np.ndarray]]:
    """A checkpoint's tensors by name, a layer's together; each is made where it is called.

    Args:
      model, params: the model; its nested dict, on a mesh of this process.
      known: names of a checkpoint whose spelling is kept, as of one that was saved without "model.".
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    slices = [(name, path, n) for path in leaves for n, name in enumerate(names(path, model.config))]
    made: dict[str, Callable[[], np.ndarray]] = {}
    for name, path, n in sorted(slices, key=lambda entry: (entry[2], entry[1])):
        bare = name.removeprefix("model.")
        made[bare if bare in known and name not in known else name] = functools.partial(_tensor, leaves[path], path, n)
    if model.config.tied and "lm_head.weight" in known:  # some keep a copy, and transformers unties what differs
        made["lm_head.weight"] = functools.partial(_tensor, leaves["embed/embedding"], "embed/embedding", 0)
    return made


def _tensor(leaf: jax.Array, path: str, n: int) -> np.ndarray:
    whole = np.asarray(leaf[n] if _is_stacked(path) else leaf)
    return np.ascontiguousarray(whole.transpose(range(whole.ndim)[_stored_axes(path)]))


def save(directory: str | os.PathLike, model: Decoder, params: PyTree, shard_bytes: int = 4 * 2**30) -> None:
    """Writes a model as a Hugging Face directory that `transformers` loads too, with no more than a file in memory.

    Args:
      directory: made if need be. Weights that are there are removed first, so that a save that was cut short leaves none
        that load.
      model: whose config is written.
      params: its nested dict, on a mesh of this process.
      shard_bytes: the most that a file shall hold, if it holds more than one tensor.
    """
    directory, config = pathlib.Path(directory), model.config
    directory.mkdir(parents=True, exist_ok=True)
    index = directory / f"{WEIGHTS}.index.json"
    for old in (directory / WEIGHTS, index, *directory.glob("model-*-of-*.safetensors")):
        old.unlink(missing_ok=True)
    described = config.to_hf() | {
        "architectures": [ARCHITECTURES[config.family]],
        "torch_dtype": str(np.dtype(model.param_dtype)),
    }
    replace(directory / "config.json", lambda beside: beside.write_text(json.dumps(described, indent=2) + "\n"))
    leaves = traverse_util.flatten_dict(params, sep="/")
    sizes = {
        name: leaf.nbytes // (config.num_layers if _is_stacked(path) else 1)
        for path, leaf in leaves.items() for name in names(path, config)
    }  # fmt: skip
    shards: list[dict[str, Callable]] = [{}]
    size = 0
    for name, make in tensors(model, params).items():
        if shards[-1] and size + sizes[name] > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = make
        size += sizes[name]
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for file, shard in zip(files if len(files) > 1 else [WEIGHTS], shards):
        made = {name: make() for name, make in shard.items()}
        replace(directory / file, lambda beside: safetensors.numpy.save_file(made, beside, {"format": "pt"}))
    if len(files) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        listed = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        replace(index, lambda beside: beside.write_text(json.dumps(listed, indent=2) + "\n"))
