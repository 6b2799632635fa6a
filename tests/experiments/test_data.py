import re

import ml_collections
import numpy as np
import pytest
import tokenizers

from experiments import data, loop, text
from experiments.build import check_ids
from experiments.tasks import load_task
from experiments.tasks.lexicon import load_lexicon
from experiments.text import text_task
from gpart_jax.models.encoder import EncoderConfig

LEXICON = {"name": "lexicon", "max_length": 16}


@pytest.fixture(scope="module")
def task(tiny_model):
    return load_task(LEXICON, tiny_model, seed=0)


def test_the_lexicons_split_is_fixed_and_no_word_is_on_two_sides(task):
    assert [len(split) for split in task[:3]] == [5145, 695, 1500]
    words = [{example["text"].lower() for example in split} for split in task[:3]]
    assert not (words[0] & words[1] or words[0] & words[2] or words[1] & words[2])
    assert [task.test[n]["text"] for n in (0, 700, -1)] == ["(o:", "heroizes", "yeees"]
    assert sum(len(split) for split in task[:3]) == 7340


def test_labels_are_the_sign_of_the_rating(task):
    for example in task.train:
        assert example["label"] == (example["rating"] > 0)
    by_word = {example["text"]: example["label"] for split in task[:3] for example in split}
    assert by_word["wonderful"] == 1 and by_word["awful"] == 0


def test_long_texts_are_cut_and_counted(tiny_model, caplog):
    task = load_task(LEXICON | {"max_length": 6}, tiny_model, seed=0)
    assert max(len(example["input_ids"]) for example in task.train) == 6
    assert re.search(r"lexicon train: \d+ of 5145 texts are longer than 6 tokens and were cut", caplog.text)


def test_of_a_pair_the_longer_text_is_cut(tiny_model):
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    examples = [{"text": ("abcdefgh", "ab"), "label": 0}]
    text.encode(tokenizer, examples, 9, "pairs")
    first, second = ["a", "##b", "##c", "##d"], ["a", "##b"]
    tokens = [tokenizer.id_to_token(n) for n in examples[0]["input_ids"]]
    assert tokens == ["[CLS]", *first, "[SEP]", *second, "[SEP]"]
    assert examples[0]["token_type_ids"].tolist() == [0] * 6 + [1] * 3


def test_a_length_without_room_for_a_token_is_refused(tiny_model):
    with pytest.raises(ValueError, match="max_length = 2 leaves no room beside the 2 special tokens"):
        load_task(LEXICON | {"max_length": 2}, tiny_model, seed=0)


@pytest.mark.parametrize(
    "longest, max_length, padded", [(1, 64, 8), (8, 64, 8), (9, 64, 16), (33, 64, 48), (49, 50, 50), (513, 600, 600)]
)
def test_batches_come_in_few_lengths(longest, max_length, padded):
    assert text.padded_length(longest, max_length) == padded


def test_collate_pads():
    rows = [{"input_ids": np.arange(1, 4), "label": 1}, {"input_ids": np.arange(1, 10), "label": 0}]
    batch = text.collate(rows, 99, 64)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [1, 2, 3] + [99] * 13
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["label"].tolist() == [1, 0] and batch["label"].dtype == np.int32
    assert "token_type_ids" not in batch


def test_collate_keeps_token_types_and_scores():
    rows = [{"input_ids": np.arange(1, 4), "token_type_ids": np.array([0, 1, 1]), "label": 2.5}] * 2
    batch = text.collate(rows, 99, 64)
    assert batch["token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0, 0, 0]] * 2
    assert batch["label"].tolist() == [2.5, 2.5] and batch["label"].dtype == np.float32


def numbered(count):
    examples = [{"input_ids": np.arange(1 + n % 12), "label": n} for n in range(count)]
    return text.text_task(examples, [], [], labels=("none",), metrics=("accuracy",), pad=0, max_length=16)


def test_every_epoch_sees_each_example_at_most_once_in_its_own_order():
    labels = [batch["label"] for batch in data.train_batches(numbered(10), 3, 4, seed=1)]
    epochs = np.array(labels).reshape(4, 9)
    assert all(len(set(epoch)) == 9 for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    again = [batch["label"] for batch in data.train_batches(numbered(10), 3, 4, seed=1)]
    np.testing.assert_array_equal(labels, again)
    other = [batch["label"] for batch in data.train_batches(numbered(10), 3, 4, seed=2)]
    assert not np.array_equal(labels, other)


def test_batches_go_on_from_a_saved_position():
    batches = data.train_batches(numbered(10), 3, 4, seed=1)
    for _ in range(5):
        next(batches)
    position = batches.get_state()
    rest = [batch["label"] for batch in batches]
    resumed = data.train_batches(numbered(10), 3, 4, seed=1)
    resumed.set_state(position)
    np.testing.assert_array_equal(rest, [batch["label"] for batch in resumed])
    assert len(rest) == 7


@pytest.mark.parametrize("examples, batch_size, steps", [(10, 3, 7), (10, 3, 9), (5, 5, 2), (30, 4, 1)])
def test_a_training_of_so_many_steps_has_as_many_batches(examples, batch_size, steps):
    task, options = numbered(examples), ml_collections.ConfigDict({"epochs": None, "steps": steps, "batch_size": batch_size})
    schedule = loop.Schedule.from_options(options, task)
    batches = data.train_batches(task, batch_size, schedule.epochs, 3)
    assert (schedule.total, schedule.epoch) == (steps, examples // batch_size) and schedule.validation(steps) == schedule.epochs
    assert 0 <= len(list(batches)) - steps < schedule.epoch  # to the end of the last epoch, at most


def test_processes_share_each_batch():
    whole = list(data.train_batches(numbered(50), 12, 2, seed=1))
    parts = [list(data.train_batches(numbered(50), 12, 2, 1, part=n, parts=3)) for n in range(3)]
    assert len(whole) == len(parts[0]) == 8
    for batch, *shares in zip(whole, *parts):
        for name, array in batch.items():
            together = np.stack([share[name] for share in shares], axis=1).reshape(array.shape)
            np.testing.assert_array_equal(together, array)


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="batch_size = 10 must be a multiple of 4, the parts"):
        data.train_batches(numbered(50), 10, 1, 0, part=0, parts=4)


@pytest.mark.parametrize("share, count", [(0.15, 300), (0.2, 400)])
def test_hold_out_is_stratified_and_by_seed(share, count):
    examples = [{"label": int(n % 4 == 0), "n": n} for n in range(2000)]
    train, validation = data.hold_out(examples, share, 7)
    assert len(validation) == count and sorted(e["n"] for e in train + validation) == list(range(2000))
    assert sum(e["label"] for e in validation) == count // 4
    assert data.hold_out(examples, share, 7) == (train, validation)
    assert data.hold_out(examples, share, 8)[1] != validation


def test_hold_out_stratifies_scores():
    examples = [{"label": n % 26 / 5, "n": n} for n in range(2600)]
    _, validation = data.hold_out(examples, 0.2, 0)
    assert np.bincount([round(e["label"]) for e in validation]).tolist() == [60, 100, 100, 100, 100, 60]


def test_hold_out_nothing_or_too_much():
    examples = [{"label": n % 2} for n in range(300)]
    assert data.hold_out(examples, 0.0, 0) == (examples, [])
    with pytest.raises(ValueError, match="holds out at least 300 examples, but there are 300. Set it to 0"):
        data.hold_out(examples, 0.2, 0)
    with pytest.raises(ValueError, match="holdout = 1 is a share"):
        data.hold_out(examples, 1, 0)


def test_a_model_without_a_fast_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json"):
        load_task(LEXICON, tmp_path, seed=0)


def test_an_unknown_task_option_is_named(tiny_model):
    with pytest.raises(ValueError, match="Task 'lexicon' .*unexpected keyword argument 'holdout'"):
        load_task(LEXICON | {"holdout": 0.1}, tiny_model, seed=0)


def test_a_missing_word_list_names_its_package(tiny_model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    with pytest.raises(FileNotFoundError, match="pip install vaderSentiment"):
        load_lexicon(tokenizer, pad=0, max_length=16, seed=0)


@pytest.mark.parametrize("field, ids, words", [
    ("input_ids", [1, 40], "Example 1 of test, 'b', has input_ids up to 40, but here has vocab_size 40"),
    ("token_type_ids", [0, 2], "token_type_ids up to 2, but here has type_vocab_size 2"), ("input_ids", [-1, 3], "input_ids up to 3"),
])  # fmt: skip
def test_ids_that_the_model_has_no_embedding_of_are_named(field, ids, words):
    sound = {"text": "a", "input_ids": np.array([39, 0]), "token_type_ids": np.array([0, 1])}
    task = text_task([sound], [], [sound, sound | {"text": "b", field: np.array(ids)}], labels=None, metrics=(), pad=0, max_length=8)
    shape = EncoderConfig(40, 16, 1, 2, 32, 16)
    check_ids(task._replace(test=[sound]), shape, "here")
    with pytest.raises(ValueError, match=words):
        check_ids(task, shape, "here")
