"""Continuations of prompts: rows under jit, with the keys and values of what was read in a cache that is as long as need be.

As many prompts are continued at a time as there are rows. The host looks at the new tokens every few steps; a row whose text has
ended goes to the next prompt, while the others go on. Each row's first token lies in the cache's first column.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpart_jax import sharding
from gpart_jax.models.decoder import Cache, Decoder
from gpart_jax.targets import PyTree

COLUMNS = 64  # prompts are read in multiples of this: few lengths are compiled
ROWS = P(("data", "fsdp"))


class Continuation(NamedTuple):
    ids: list[int]  # without the end-of-sequence token; with all tokens of a stop string
    ended: str  # "eos", "stop": by a stop string, or "length"


def generate(model: Decoder, params: PyTree, prompts: Sequence[Sequence[int]], **options: Any) -> list[Continuation]:
    """Continues each prompt until an end: greedily, or by sampling. Arguments and errors are those of `generate_each`."""
    found = dict(generate_each(model, params, prompts, **options))
    return [found[number] for number in range(len(prompts))]


def generate_each(
    model: Decoder,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    eos: Sequence[int],
    max_new_tokens: int | Sequence[int],
    rows: int | None = None,
    mesh: Mesh | None = None,
    stop: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    steps: int = 32,
) -> Iterator[tuple[int, Continuation]]:
    """Continues prompts, and gives each one's number and continuation as soon as it has ended.

    What a prompt gets doesn't depend on the others, nor on `rows`.

    Args:
      params: adapted already.
      prompts: of at least one token each.
      eos: tokens that end a sequence.
      max_new_tokens: for each prompt, or one number for all; fewer where the context ends before.
      rows: prompts that are continued at a time. None: all.
      mesh: that of params, whose rows are shared out over "data" and "fsdp". None: the first device.
      stop: strings that end a sequence; they need `decode`, the text of token ids.
      temperature: 0 takes the likeliest token.
      top_p: samples among the likeliest tokens, as few as have so much probability together (arXiv 1904.09751).
      key: draws samples.
      steps: tokens between looks of the host.

    Raises:
      ValueError: no prompts, an empty one, one that leaves no room in the context or has a token beyond the vocabulary, or options
        that don't fit together.
    """
    context, lengths = model.config.max_positions, [len(prompt) for prompt in prompts]
    wanted = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if not lengths or min(lengths) < 1:
        raise ValueError(
            "Give at least one prompt, and each at least one token, such as the beginning of the sequence."
        )
    if max(lengths) >= context:
        raise ValueError(
            f"Prompt {lengths.index(max(lengths))} has {max(lengths)} tokens, but the model's context is {context}, the "
            "continuation included. Shorten it."
        )
    vocab_size = model.config.vocab_size
    if bad := [number for number, prompt in enumerate(prompts) if not 0 <= min(prompt) <= max(prompt) < vocab_size]:
        raise ValueError(f"Prompt {bad[0]} has a token of none of the model's {vocab_size} (0 to {vocab_size - 1}).")
    if len(wanted) != len(prompts):
        raise ValueError(f"max_new_tokens are {len(wanted)} numbers for {len(prompts)} prompts. Give one for each, or one for all.")
    if min(wanted) < 1 or steps < 1 or (rows is not None and rows < 1):
        raise ValueError(f"max_new_tokens = {max_new_tokens}, steps = {steps} and rows = {rows} must be positive.")
    if stop and decode is None:
        raise ValueError("Stop strings need `decode`, the text of token ids.")
    if temperature < 0 or not 0 < top_p <= 1 or (temperature and key is None):
        raise ValueError(
            f"temperature = {temperature} must be 0, or positive with a key; top_p = {top_p} must be in (0, 1]."
        )
    room = [min(most, context - length) for most, length in zip(wanted, lengths)]
    return _each(model, params, prompts, room, eos, rows, mesh, stop, decode, temperature, top_p, key, steps)


def _each(model, params, prompts, room, eos, rows, mesh, stop, decode, temperature, top_p, key, steps):
    mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    of_shard = -(-min(rows or len(prompts), len(prompts)) // shards)
    rows = of_shard * shards
    run = Programs(model, mesh, params)
    key = sharding.replicate(jax.random.key_data(jax.random.key(0) if key is None else key), mesh)

    waiting = collections.deque(range(len(prompts)))
    held = np.full(rows, -1)  # which prompt is in a row
    found: dict[int, list[int]] = {}
    state = run.empty(rows, _columns(max(map(len, prompts[:rows])) + steps))
    while waiting or (held >= 0).any():
        new = []
        for row in sorted(np.flatnonzero(held < 0), key=lambda row: row % of_shard):  # as many for each shard
            if waiting:
                held[row] = number = waiting.popleft()
                found[number] = []
                new.append(row)
        longest = max(len(prompts[number]) + len(written) for number, written in found.items())
        state = run.resized(state, _columns(longest + steps))
        if new:
            ids, lengths, places = _reading(prompts, held, new, of_shard, shards, model.config.max_positions)
            state = run.read(params, ids, lengths, places, state)
        tokens, state = run.write(steps, temperature, top_p, params, held, key, state)
        for place, written in enumerate(np.asarray(tokens).tolist()):
            number = int(held[place])
            if number < 0:
                continue
            before = found[number]
            found[number], ended = _end(before + written, len(before), room[number], eos, stop, decode)
            if ended:
                held[place] = -1
                yield number, Continuation(found.pop(number), ended)


def _reading(prompts, held, new, of_shard, shards, context):
    """ids (count, width), lengths and places (count,), for each shard its own part: prompts for its `new` rows, and the rows."""
    own = [[row for row in new if row // of_shard == shard] for shard in range(shards)]
    count = min(of_shard, 1 << (max(map(len, own)) - 1).bit_length())  # few numbers of rows are compiled
    width = min(-(-max(len(prompts[held[row]]) for row in new) // COLUMNS) * COLUMNS, context)
    ids = np.zeros((shards, count, width), np.int32)
    lengths, places = np.zeros((shards, count), np.int32), np.full((shards, count), of_shard)  # which is no row
    for shard, mine in enumerate(own):
        for n, row in enumerate(mine):
            prompt = prompts[held[row]]
            ids[shard, n, : len(prompt)] = prompt
            lengths[shard, n], places[shard, n] = len(prompt), row % of_shard
    return ids.reshape(-1, width), lengths.reshape(-1), places.reshape(-1)


def _columns(needed: int) -> int:
    """A cache's columns: the next multiple of 128, from 2,048 on of 256, from 4,096 on of 512, ...: few are compiled."""
    block = max(128, (1 << needed.bit_length()) // 16)
    return -(-needed // block) * block


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


class _State(NamedTuple):
    logits: jax.Array  # float32 (rows, vocab_size), of each row's next token
    cache: Cache


class Programs:
    """What is compiled for a model on a mesh. "data" and "fsdp" divide the rows, "tensor" the heads."""

    def __init__(self, model: Decoder, mesh: Mesh, params: PyTree):
        everywhere = NamedSharding(mesh, P())
        placed = jax.tree.map(lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else everywhere, params)
        leaves, tree = jax.tree.flatten(placed)
        self.static = model, mesh, tree, tuple(leaves)
        self._model, self._mesh = model, mesh
        heads = None if model.config.num_kv_heads % mesh.shape["tensor"] else "tensor"
        self.by_head = NamedSharding(mesh, P(None, *ROWS, None, heads))  # of the cache

    def empty(self, rows: int, columns: int) -> _State:
        return _empty(self._model, self.by_head, rows, columns)

    def resized(self, state: _State, columns: int) -> _State:
        return state if state.cache.key.shape[2] == columns else _resized(self.by_head, columns, state)

    def read(self, params: PyTree, ids: np.ndarray, lengths: np.ndarray, places: np.ndarray, state: _State) -> _State:
        arrays = sharding.place((ids, lengths, places), NamedSharding(self._mesh, ROWS))
        return _read(*self.static, params, *arrays, state)

    def write(
        self, steps: int, temperature: float, top_p: float, params: PyTree, held: np.ndarray, key: jax.Array, state: _State
    ) -> tuple[jax.Array, _State]:
        held = sharding.place(held.astype(np.int32), NamedSharding(self._mesh, ROWS))
        return write(*self.static, steps, temperature, top_p, params, held, key, state)


def _on_rows(function, model, mesh, tree, leaves, params, arrays, key):
    """function(apply, arrays, key) on each shard of rows; apply(ids, mask, cache) is the model there."""
    shardings = jax.tree.unflatten(tree, leaves)
    gather = sharding.gatherer(shardings)
    by_row = jax.tree.map(lambda _: ROWS, arrays)
    cache = by_row.state.cache._replace(key=P(None, *ROWS), value=P(None, *ROWS))
    by_row = by_row._replace(state=by_row.state._replace(cache=cache))

    def local(params, arrays, key):
        outside = gather({name: part for name, part in params.items() if name != "layers"})

        def apply(ids, mask, cache):
            layers = {"layers": params["layers"]}
            return model.apply({"params": outside | layers}, ids, mask, gather, cache)

        return function(apply, arrays, key)

    return jax.shard_map(
        local, mesh=mesh, in_specs=(sharding.fsdp_specs(shardings), by_row, P()), out_specs=(ROWS, by_row.state),
        axis_names={"data", "fsdp"}, check_vma=False,
    )(params, arrays, key)  # fmt: skip


class _Reading(NamedTuple):
    ids: jax.Array  # int (count, width)
    lengths: jax.Array  # int (count,)
    places: jax.Array  # int (count,): rows
    state: _State


class _Writing(NamedTuple):
    held: jax.Array  # int (rows,): the prompt's number, or -1
    state: _State


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(model, by_head, rows, columns):
    state = _State(jnp.zeros((rows, model.config.vocab_size)), Cache.empty(model.config, rows, columns, model.dtype))
    return _placed(by_head, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _resized(by_head, columns, state):
    more = max(0, columns - state.cache.key.shape[2])

    def fit(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))[:, :, :columns]

    cache = state.cache._replace(key=fit(state.cache.key), value=fit(state.cache.value))
    return _placed(by_head, state._replace(cache=cache))


def _placed(by_head, state):
    key, value = (jax.lax.with_sharding_constraint(array, by_head) for array in state.cache[:2])
    return state._replace(cache=state.cache._replace(key=key, value=value))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames=("state",))
def _read(model, mesh, tree, leaves, params, ids, lengths, places, state):
    """The state with prompts read into some of its rows."""

    def read(apply, reading, key):
        ids, lengths, places, (logits, cache) = reading
        count, width = ids.shape
        own = Cache.empty(model.config, count, width, model.dtype)
        next_logits, own = apply(ids, jnp.arange(width) < lengths[:, None], own)
        width = min(width, cache.key.shape[2])

        def put(old, new):
            return old.at[:, places, :width].set(new[:, :, :width], mode="drop")

        filled = cache.filled.at[places].set(lengths, mode="drop")
        cache = Cache(put(cache.key, own.key), put(cache.value, own.value), filled)
        return lengths, _State(logits.at[places].set(next_logits, mode="drop"), cache)

    return _on_rows(read, model, mesh, tree, leaves, params, _Reading(ids, lengths, places, state), None)[1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6), donate_argnames=("state",))
def write(
    model: Decoder,
    mesh: Mesh,
    tree: Any,
    leaves: tuple[NamedSharding, ...],
    steps: int,
    temperature: float,
    top_p: float,
    params: PyTree,
    held: jax.Array,
    key: jax.Array,
    state: _State,
) -> tuple[jax.Array, _State]:
    """(new tokens, int (rows, steps) on every device; the state after them)"""

    def on_shard(apply, writing, key):
        held, state = writing

        def step(state, _):
            def draw(number, place):
                return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), number), place)

            token = choose(state.logits, jax.vmap(draw)(held, state.cache.filled), temperature, top_p)
            return _State(*apply(token[:, None], held[:, None] >= 0, state.cache)), token

        state, tokens = jax.lax.scan(step, state, length=steps)
        return tokens.T, state

    tokens, state = _on_rows(on_shard, model, mesh, tree, leaves, params, _Writing(held, state), key)
    return jax.lax.with_sharding_constraint(tokens, NamedSharding(mesh, P())), state


def choose(logits: jax.Array, keys: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """A token for each row of logits (rows, vocab_size), int (rows,), each with a key of its own: see `generate_each`."""
    if temperature == 0:
        return logits.argmax(axis=-1)
    logits = logits / temperature
    if top_p < 1:
        ordered = jnp.sort(logits, descending=True)
        share = jax.nn.softmax(ordered)
        likely = jnp.cumsum(share, axis=-1) - share < top_p  # the likelier ones don't yet have so much
        least = jnp.where(likely, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits)
