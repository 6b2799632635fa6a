"""Texts that share rows, and batches of few lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import train_batches
from experiments.step import make_language_loss, token_weights
from experiments.text import collate, language_task, packed, with_lengths
from gpart_jax import gpart
from gpart_jax.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
    max_positions=64, norm_eps=1e-6, rope_theta=1e4, family="mistral", tied=False, sliding_window=6,
)  # fmt: skip


def texts(sizes):
    random = np.random.default_rng(len(sizes))
    made = [{"input_ids": random.integers(1, 50, size).astype(np.int32), "loss_mask": np.ones(size, np.int32)} for size in sizes]
    for example in made[::2]:
        example["loss_mask"][: len(example["input_ids"]) // 2] = 0  # the beginning isn't learned
    return made


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(0, 5))
def test_every_text_is_in_one_row_whole_and_no_row_is_too_long(sizes, seed):
    task = language_task(texts(sizes), [], [], max_length=40)
    rows = packed(task, seed).train
    found = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["segments"]) == len(row["loss_mask"]) <= 40
        numbers = row["segments"]
        assert numbers[0] == 1 and set(np.diff(numbers)) <= {0, 1}
        for number in range(1, numbers[-1] + 1):
            here = numbers == number
            assert row["loss_mask"][here][0] == 0  # no text predicts another's first token
            found.append((row["input_ids"][here].tolist(), row["loss_mask"][here][1:].tolist()))
    expected = [(example["input_ids"].tolist(), example["loss_mask"][1:].tolist()) for example in task.train]
    assert sorted(found) == sorted(expected)
    assert len(rows) == 1 or sum(map(len, (row["input_ids"] for row in rows))) > 20 * (len(rows) - 1)  # two share one if they can
    again = packed(task, seed).train
    assert all(np.array_equal(one["input_ids"], other["input_ids"]) for one, other in zip(rows, again, strict=True))


def test_packed_texts_have_the_loss_and_the_gradient_that_they_have_alone():
    model, task = Decoder(CONFIG), language_task(texts([5, 17, 30, 9, 22, 3, 1, 12]), [], [], max_length=32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 2), int), jnp.ones((1, 2), int))["params"]
    tuned = gpart(64, 3, targets="(query|out)/kernel", stacked="^layers")
    trainable = jax.tree.map(lambda x: x + 0.1, tuned.init(params, jax.random.key(1)))

    def loss(trainable, batch):
        batch = dict(batch)
        batch["weights"] = token_weights(batch.pop("loss_mask"))
        return make_language_loss(model)(tuned.bind(params, trainable), params, batch)

    found = []
    for examples in (task.train, packed(task, 0).train):
        found.append(jax.jit(jax.value_and_grad(loss))(trainable, task.collate(examples)))
    assert len(packed(task, 0).train) <= len(task.train) / 2
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    np.testing.assert_allclose(found[1][1]["theta"], found[0][1]["theta"], atol=1e-6)


def test_batches_have_the_lengths_that_are_asked_for():
    task = language_task(texts([5, 17, 30, 9, 22, 3, 11, 12]), [], [], max_length=32)
    lengths = lambda task: {batch["input_ids"].shape for batch in train_batches(task, 2, 3, 0)}  # noqa: E731
    assert lengths(with_lengths(task, [20])) == {(2, 20), (2, 32)}
    assert lengths(with_lengths(task, [32])) == lengths(with_lengths(task, [64])) == {(2, 32)}
    assert len(lengths(task)) > 2
    with pytest.raises(ValueError, match=r"config.task.lengths = \(0, 8\) must be whole positive numbers"):
        with_lengths(task, (0, 8))


def test_a_packed_row_is_collated_with_its_segments():
    task = packed(language_task(texts([3, 4]), [], [], max_length=10), 0)
    batch = collate(task.train, 0, 10)
    assert batch["attention_mask"].tolist() in ([[1] * 3 + [2] * 4 + [0]], [[1] * 4 + [2] * 3 + [0]])
