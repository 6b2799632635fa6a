"""Continuations of prompts: batches under jit, with the keys and values of what was read kept in a preallocated cache.

Prompts of different lengths are padded on the left, so that all continue in the same column. The host looks at the new
tokens only every few steps, for the ends that are known by their text.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpart_jax import sharding
from gpart_jax.models.decoder import Cache, Decoder
from gpart_jax.targets import PyTree

COLUMNS = 64  # prompts are padded to a multiple of this: few lengths are compiled


class Continuation(NamedTuple):
    ids: list[int]  # without the end-of-sequence token; with all tokens of a stop string
    ended: str  # "eos", "stop": by a stop string, or "length"


def generate(
    model: Decoder,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    eos: Sequence[int],
    max_new_tokens: int,
    mesh: Mesh | None = None,
    stop: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    steps: int = 32,
) -> list[Continuation]:
    """Continues each prompt until an end: greedily, or by sampling.

    What a prompt gets doesn't depend on the others, if nothing is sampled.

    Args:
      params: adapted already.
      prompts: of at least one token each; one batch.
      eos: tokens that end a sequence.
      max_new_tokens: for each prompt; fewer where the context ends before.
      mesh: that of params, whose rows are shared out over "data" and "fsdp". None: the first device.
      stop: strings that end a sequence; they need `decode`, the text of token ids.
      temperature: 0 takes the likeliest token.
      top_p: samples among the likeliest tokens, as few as have so much probability together (arXiv 1904.09751).
      key: draws samples.
      steps: tokens between looks of the host.

    Raises:
      ValueError: no prompts, an empty one, one that leaves no room in the context, or options that don't fit together.
    """
    context, lengths = model.config.max_positions, [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise ValueError(
            "Give at least one prompt, and each at least one token, such as the beginning of the sequence."
        )
    if max(lengths) >= context:
        raise ValueError(
            f"Prompt {lengths.index(max(lengths))} has {max(lengths)} tokens, but the model's context is {context}, the "
            "continuation included. Shorten it."
        )
    if max_new_tokens < 1 or steps < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens} and steps = {steps} must be positive.")
    if stop and decode is None:
        raise ValueError("Stop strings need `decode`, the text of token ids.")
    if temperature < 0 or not 0 < top_p <= 1 or (temperature and key is None):
        raise ValueError(
            f"temperature = {temperature} must be 0, or positive with a key; top_p = {top_p} must be in (0, 1]."
        )

    mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    room = [min(max_new_tokens, context - length) for length in lengths]
    width = min(-(-max(lengths) // COLUMNS) * COLUMNS, context)
    columns = width + -(-max(room) // steps) * steps
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-len(prompts) // shards) * shards
    ids, mask = np.zeros((rows, width), np.int32), np.zeros((rows, columns), np.int32)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]  # rows that fill up the mesh repeat the last
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) : width] = 1
    ids, mask = sharding.place((ids, mask), NamedSharding(mesh, sharding.BATCH))
    key = sharding.replicate(jax.random.key_data(jax.random.key(0) if key is None else key), mesh)

    logits, cache = _read(model, mesh, params, ids, mask)
    found: list[list[int]] = [[] for _ in prompts]
    ended = ["" for _ in prompts]
    while "" in ended:
        new, logits, mask, cache = _write(model, mesh, steps, temperature, top_p, params, logits, mask, cache, key)
        for row, tokens in enumerate(np.asarray(new)[: len(prompts)].tolist()):
            if not ended[row]:
                found[row], ended[row] = _end(found[row] + tokens, len(found[row]), room[row], eos, stop, decode)
    return [Continuation(ids, reason) for ids, reason in zip(found, ended)]


def _end(tokens: list[int], old: int, room: int, eos, stop, decode) -> tuple[list[int], str]:
    """(tokens up to their first end, how they ended or ""), where the first `old` tokens held none."""
    tokens, ended = tokens[:room], "length" if len(tokens) >= room else ""
    for count in range(old, len(tokens)):
        if tokens[count] in eos:
            tokens, ended = tokens[:count], "eos"
            break

    def stops(tokens):
        text = decode(tokens) if stop else ""
        return any(string in text for string in stop)

    if stops(tokens):
        count = next(count for count in range(old + 1, len(tokens) + 1) if stops(tokens[:count]))
        tokens, ended = tokens[:count], "stop"
    return tokens, ended


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(model: Decoder, mesh: Mesh, params, ids, mask):
    """(logits of the token after each prompt, float32 (rows, vocab_size); a cache of as many columns as the mask has)"""
    config, (rows, columns) = model.config, mask.shape
    heads = None if config.num_kv_heads % mesh.shape["tensor"] else "tensor"
    placement = NamedSharding(mesh, P(None, ("data", "fsdp"), None, heads))
    cache = Cache.empty(config, rows, columns, model.dtype)
    key, value = (jax.lax.with_sharding_constraint(array, placement) for array in (cache.key, cache.value))
    return model.apply({"params": params}, ids, mask, cache=Cache(key, value, cache.filled))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnames=("mask", "cache"))
def _write(model: Decoder, mesh: Mesh, steps, temperature, top_p, params, logits, mask, cache, key):
    """(new tokens, int (rows, steps) on every device; the next token's logits; mask; cache)"""

    def step(state, _):
        logits, mask, cache = state
        draw = jax.random.fold_in(jax.random.wrap_key_data(key), cache.filled)
        token = choose(logits, draw, temperature, top_p)
        mask = mask.at[:, cache.filled].set(1)
        logits, cache = model.apply({"params": params}, token[:, None], mask, cache=cache)
        return (logits, mask, cache), token

    (logits, mask, cache), tokens = jax.lax.scan(step, (logits, mask, cache), length=steps)
    return jax.lax.with_sharding_constraint(tokens.T, NamedSharding(mesh, P())), logits, mask, cache


def choose(logits: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """A token for each row of logits (rows, vocab_size), int (rows,): see `generate`."""
    if temperature == 0:
        return logits.argmax(axis=-1)
    logits = logits / temperature
    if top_p < 1:
        ordered = jnp.sort(logits, descending=True)
        share = jax.nn.softmax(ordered)
        likely = jnp.cumsum(share, axis=-1) - share < top_p  # the likelier ones don't yet have so much
        least = jnp.where(likely, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits)
