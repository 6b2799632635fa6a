import dataclasses
import functools
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpart_jax import sharding
from gpart_jax.models import generate as generate_module
from gpart_jax.models.generate import choose, generate, generate_each
from gpart_jax.models.pretrained_decoder import load_decoder

DATA = pathlib.Path(__file__).parents[1] / "data" / "decoder"
PROMPTS = [[5, 9, 31], [7], [40, 3, 3, 12, 25, 6, 44, 8, 19], [11, 12], [13, 30, 21, 9, 9, 9]]
NEW = 24
MESHES = {
    "one": ({}, 1),
    "data 8": ({"data": 8}, 8),
    "fsdp 8": ({"fsdp": 8}, 8),
    "2 x 2 x 2": ({"data": 2, "fsdp": 2, "tensor": 2}, 8),
}


@functools.cache
def tiny(name, mesh="one"):
    sizes, count = MESHES[mesh]
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    return *load_decoder(DATA / name, mesh=mesh, dtype=jnp.float32), mesh


def run(name, prompts, mesh="one", **options):
    model, params, mesh = tiny(name, mesh)
    options = dict(eos=[], max_new_tokens=NEW, steps=8) | options
    return generate(model, params, prompts, mesh=mesh, **options)


@functools.cache
def uncached(name):
    """The likeliest next tokens of PROMPTS, with the whole sequences, padded on the right, read anew for each."""
    model, params, _ = tiny(name)
    apply = jax.jit(lambda ids, mask: model.apply({"params": params}, ids, mask))
    rows, lengths = np.arange(len(PROMPTS)), np.array([len(prompt) for prompt in PROMPTS])
    ids = np.zeros((len(rows), 40), np.int32)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = prompt
    for ends in (lengths + n for n in range(NEW)):
        logits = np.asarray(apply(ids, np.arange(40) < ends[:, None]))
        ids[rows, ends] = logits[rows, ends - 1].argmax(axis=-1)
    return [row[length : length + NEW].tolist() for row, length in zip(ids, lengths)]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma"])
def test_cached_equals_uncached_alone_and_in_a_batch(name):
    expected = uncached(name)
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS) and all(len(set(ids)) > 2 for ids in expected)
    assert [found.ids for found in run(name, PROMPTS)] == expected
    for prompt, ids in zip(PROMPTS, expected) if name in ("llama", "mistral") else ():
        (alone,) = run(name, [prompt])
        assert alone.ids == ids and alone.ended == "length"


@pytest.mark.parametrize("name, mesh", [*(("llama", mesh) for mesh in list(MESHES)[1:]), ("gemma", "2 x 2 x 2")])
def test_a_mesh_of_eight_gives_the_same(name, mesh):
    assert [found.ids for found in run(name, PROMPTS, mesh)] == uncached(name)


@pytest.mark.parametrize("rows, mesh", [(1, "one"), (2, "one"), (3, "one"), (2, "data 8"), (9, "2 x 2 x 2")])
def test_rows_that_ended_go_to_the_next_prompts_and_nothing_else_changes(rows, mesh):
    wanted, prompts, expected = [3, 24, 1, 17, 9], PROMPTS * 3, uncached("llama") * 3
    model, params, on = tiny("llama", mesh)
    order = []
    for number, found in generate_each(model, params, prompts, eos=[], max_new_tokens=wanted * 3, rows=rows, mesh=on, steps=4):
        order.append(number)
        assert found.ids == expected[number][: (wanted * 3)[number]] and found.ended == "length"
    assert sorted(order) == list(range(15))
    if rows > 1:
        assert order != sorted(order)  # a short one needn't wait for a long one


def test_the_cache_is_as_long_as_the_longest_text_in_it():
    model, params, mesh = tiny("llama")
    model = model.clone(config=dataclasses.replace(model.config, max_positions=1000))
    with mock.patch.object(generate_module, "_resized", wraps=generate_module._resized) as resized:
        found = generate(model, params, PROMPTS[:2], eos=[], max_new_tokens=[300, 30], rows=1, mesh=mesh, steps=50)
    assert [call.args[1] for call in resized.call_args_list] == [256, 384, 128]
    assert len(found[0].ids) == 300 and [one.ids[:NEW] for one in found] == uncached("llama")[:2]
    sizes = [generate_module._columns(needed) for needed in range(1, 9000)]
    assert sorted(set(sizes))[:17] == [128 * n for n in range(1, 17)] + [2304] and len(set(sizes)) < 40
    assert all(needed <= size <= max(128, 1.13 * needed + 128) for needed, size in enumerate(sizes, start=1))


def test_sequences_end_at_their_own_tokens():
    expected = uncached("llama")
    eos = [expected[0][5], expected[2][9]]
    for found, ids in zip(run("llama", PROMPTS, eos=eos), expected):
        first = next((n for n, token in enumerate(ids) if token in eos), NEW)
        assert found.ids == ids[:first] and found.ended == ("length" if first == NEW else "eos")


def letters(ids):
    return "".join(chr(ord("A") + token) for token in ids)


def test_stop_strings_end_where_they_are_complete():
    expected = uncached("llama")
    stop = letters(expected[1][6:9])  # across two looks of the host
    for found, ids in zip(run("llama", PROMPTS, stop=[stop, "no such"], decode=letters), expected):
        at = letters(ids).find(stop)
        assert found.ids == (ids if at < 0 else ids[: at + len(stop)])
        assert found.ended == ("length" if at < 0 else "stop")


def test_the_context_limits_each_prompt():
    prompts = [list(range(3, 43)) + [5] * 20, [7]]  # 60 and 1 of 64
    long, short = run("llama", prompts, max_new_tokens=30)
    assert (len(long.ids), long.ended, len(short.ids)) == (4, "length", 30)
    with pytest.raises(ValueError, match="Prompt 1 has 64 tokens, but the model's context is 64.*Shorten it"):
        run("llama", [[5], [5] * 64])


def test_samples_follow_the_key():
    first, again, other = (run("llama", PROMPTS, temperature=1.0, key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert first == again and first != other
    assert all(found.ids != ids for found, ids in zip(first, uncached("llama")))


def test_a_sample_does_not_depend_on_what_else_is_written():
    options = dict(temperature=1.0, key=jax.random.key(3))
    together = run("llama", PROMPTS, **options)
    assert run("llama", PROMPTS, rows=2, **options) == together == run("llama", PROMPTS, "data 8", **options)


def test_top_p_samples_among_the_likeliest():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    rows, keys = jnp.tile(logits, (4000, 1)), jax.random.split(jax.random.key(0), 4000)

    def shares(temperature, top_p):
        return np.bincount(choose(rows, keys, temperature, top_p), minlength=4) / len(rows)

    np.testing.assert_allclose(shares(1.0, 1.0), [0.1, 0.5, 0.15, 0.25], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.6), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.5), [0, 1, 0, 0])
    np.testing.assert_allclose(shares(0.5, 0.6), [0, 1, 0, 0])  # squared, the likeliest has 0.72
    np.testing.assert_allclose(shares(1e-3, 1.0), [0, 1, 0, 0])
    np.testing.assert_allclose(shares(0.0, 1.0), [0, 1, 0, 0])


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "at least one prompt"),
        ([[5], []], {}, "each at least one token"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens = 0, steps = 8 and rows = None must be positive"),
        ([[5]], {"rows": 0}, "rows = 0 must be positive"),
        ([[5]], {"max_new_tokens": [3, 4]}, "max_new_tokens are 2 numbers for 1 prompts"),
        ([[5]], {"stop": ["x"]}, "Stop strings need `decode`"),
        ([[5]], {"temperature": 1.0}, "temperature = 1.0 must be 0, or positive with a key"),
        ([[5]], {"top_p": 0.0}, r"top_p = 0.0 must be in \(0, 1\]"),
    ],
)
def test_what_is_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        run("llama", prompts, **options)


def test_a_prompt_with_a_token_beyond_the_vocabulary_is_named():
    for beyond in (48, -1):
        with pytest.raises(ValueError, match="Prompt 1 has a token of none of the model's 48"):
            run("llama", [[5], [7, beyond, 3]])
