"""What a config describes, from shapes alone: its steps of training, evaluation and generation on a mesh that needn't be here.

`build.build` is the same with weights and data. Nothing is downloaded, and no weight is allocated.
"""

import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.build import fitted
from experiments.data import Task
from experiments.flops import matmul_flops
from experiments.optimizer import make_optimizer, options_of
from experiments.step import make_loss, make_outputs, make_train_step, trained_shardings
from experiments.text import INPUTS
from gpart_jax import sharding
from gpart_jax.methods import from_spec
from gpart_jax.models import decoder, generate, published
from gpart_jax.models.attention import share
from gpart_jax.models.decoder import Decoder, DecoderConfig
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig
from gpart_jax.models.storage import read_config
from gpart_jax.models.vit import ViTClassifier, ViTConfig

PARTS = {"train": "training", "evaluate": "evaluation", "generate": "generation"}  # the last of decoders alone
NEW_TOKENS = 32  # in a step of generation, which are as many between looks of the host


class Step(NamedTuple):
    """A step of training, evaluation or generation, and the shapes of its arguments, laid out on a mesh."""

    function: Any  # jitted
    # jax.ShapeDtypeStructs, after those that are static; of training: trainable, optimizer state, frozen, batch, key data, number, tables
    arguments: tuple
    params: int  # numbers of the whole model
    held: dict[str, Any]  # the arguments by what they are: trees
    attended: float  # the share of its blocks of scores that a TPU's attention kernel makes
    divided: int  # among how many devices the matrix products are, whose shapes the program has


def describe(config, mesh, length: int | None = None, part: str = "train") -> Step:
    """A config's step on a mesh, of PARTS, for texts of `length` tokens (None: the longest that the task has)."""
    described, dtype = published.CONFIGS.get(config.model.source), jnp.dtype(config.model.dtype)
    folder = pathlib.Path(config.model.source or "").expanduser()
    if config.model.source and (folder / "config.json").is_file():
        described = read_config(folder)
    if described is None:
        raise ValueError(
            f"The shape of {config.model.source} isn't known: it is no directory with a config.json, and none of "
            f"{', '.join(published.CONFIGS)}."
        )
    rows = config.train.batch_size
    sharding.check_batch("config.train.batch_size", rows, mesh, config.train.accumulate)
    if part != "train":
        rows = config.train.eval_batch_size
        rows += -rows % (mesh.shape["data"] * mesh.shape["fsdp"])
    label = jax.ShapeDtypeStruct((rows,), jnp.int32)
    if described["model_type"] == "vit":
        model, size = ViTClassifier(ViTConfig.from_hf(described), 2, dtype), config.task.image_size
        rules, length = sharding.VIT, (size // model.config.patch_size) ** 2 + 1
        task = Task([], [], [], ("0", "1"), ("accuracy",), ("pixel_values",), None)
        pixels = jax.ShapeDtypeStruct((rows, size, size, model.config.channels), jnp.uint8)
        batch, example = {"pixel_values": pixels, "label": label}, (pixels,)
    else:
        length = config.task.max_length if length is None else length
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        batch, example = {"input_ids": tokens, "attention_mask": tokens}, (tokens, tokens)
        if described["model_type"] in decoder.FAMILIES:
            model = Decoder(DecoderConfig.from_hf(described), dtype, dtype)
            rules = sharding.DECODER_TIED if model.config.tied else sharding.DECODER
            task = Task([], [], [], None, ("loss",), INPUTS, None, language=True)
            batch["loss_mask"] = tokens
        else:
            model = EncoderClassifier(EncoderConfig.from_hf(described), 2, dtype)
            rules = sharding.ENCODER
            task = Task([], [], [], ("0", "1"), ("accuracy",), INPUTS, None)
            batch["label"] = label
    if part == "generate" and not isinstance(model, Decoder):
        raise ValueError(f"{config.model.source} is no decoder, and generates nothing: leave generate out of --parts.")
    model = fitted(model, config.model, mesh)
    frozen = jax.eval_shape(model.init, jax.random.key(0), *example)["params"]
    shardings = sharding.param_shardings(frozen, mesh, rules)
    method = from_spec(config.method.to_dict(), config.head_targets)
    trainable = jax.eval_shape(method.init, frozen, jax.random.key(0))
    everywhere = NamedSharding(mesh, P())
    optimizer = make_optimizer(1000, **options_of(config, method))
    state = jax.eval_shape(optimizer.init, trainable)
    own = trained_shardings(trainable, state, shardings)
    trainable, state = jax.tree.map(_as_struct, (trainable, state), own)
    tables = _on(everywhere, jax.eval_shape(lambda: method.tables(frozen)))
    held = {
        "frozen weights": jax.tree.map(_as_struct, frozen, shardings),
        "trained numbers": trainable,
        "the method's tables": tables,
        "batch": _on(NamedSharding(mesh, sharding.BATCH), batch),
    }
    size, attended = sum(leaf.size for leaf in jax.tree.leaves(frozen)), share(model.config.pattern, length)
    divided = mesh.size if sharding.LEAVES in trainable else mesh.shape["tensor"]
    frozen, batch = held["frozen weights"], held["batch"]
    if part == "generate":
        return _generation(model, mesh, frozen, rows, length, size)
    if part == "evaluate":
        function = make_outputs(model, task, method, shardings)
        return Step(function, (trainable, frozen, batch, tables), size, held, attended, divided)
    held["optimizer"] = state
    key = _on(everywhere, jax.eval_shape(jax.random.key_data, jax.random.key(0)))
    function = make_train_step(make_loss(model, task), method, optimizer, shardings, config.train.accumulate)
    return Step(function, (trainable, held["optimizer"], frozen, batch, key, 0, tables), size, held, attended, divided)


def _generation(model, mesh, params, rows: int, columns: int, size: int) -> Step:
    """`NEW_TOKENS` new tokens of each row, with a cache of so many columns."""
    program = generate.Programs(model, mesh, params)
    state = jax.eval_shape(lambda: program.empty(rows, columns))
    by_row = NamedSharding(mesh, generate.ROWS)
    cache = state.cache._replace(
        key=_on(program.by_head, state.cache.key), value=_on(program.by_head, state.cache.value), filled=_on(by_row, state.cache.filled)
    )
    state = state._replace(logits=_on(by_row, state.logits), cache=cache)
    held = _on(by_row, jax.ShapeDtypeStruct((rows,), jnp.int32))
    key = _on(NamedSharding(mesh, P()), jax.eval_shape(jax.random.key_data, jax.random.key(0)))
    arguments = *program.static, NEW_TOKENS, 0.0, 1.0, params, held, key, state
    return Step(generate.write, arguments, size, {"weights": params, "cache": cache, "logits": state.logits}, 1.0, mesh.shape["tensor"])


def _on(sharding, tree):
    return jax.tree.map(lambda x: _as_struct(x, sharding), tree)


def _as_struct(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def device_bytes(tree) -> int:
    """Bytes on each device of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def model_flops(config, mesh, length: int | None = None, part: str = "train") -> float:
    """`matmul_flops` of the config's step, less those that rematerialisation makes twice: what the model itself needs."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.update(remat="none", attention="xla")  # whose products are counted
    step = describe(config, mesh, length, part)
    return matmul_flops(step.function.trace(*step.arguments).jaxpr, step.divided)
