import numpy as np
import pytest
import tokenizers

from experiments import data


@pytest.fixture(scope="module")
def task(tiny_model):
    return data.load_task("lexicon", tiny_model, max_length=16)


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


def test_long_texts_are_cut(tiny_model):
    assert max(len(example["input_ids"]) for example in data.load_task("lexicon", tiny_model, 6).train) == 6


def test_collate_pads_to_a_multiple_of_8():
    rows = [{"input_ids": np.arange(1, 4), "label": 1}, {"input_ids": np.arange(1, 10), "label": 0}]
    batch = data.collate(rows, pad=99)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [1, 2, 3] + [99] * 13
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["label"].tolist() == [1, 0]


def test_every_epoch_sees_each_example_at_most_once_in_its_own_order():
    examples = [{"input_ids": np.array([n]), "label": n} for n in range(10)]
    labels = [batch["label"] for batch in data.train_batches(examples, 3, 4, seed=1, pad=0)]
    epochs = np.array(labels).reshape(4, 9)
    assert all(len(set(epoch)) == 9 for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    again = [batch["label"] for batch in data.train_batches(examples, 3, 4, seed=1, pad=0)]
    np.testing.assert_array_equal(labels, again)
    other = [batch["label"] for batch in data.train_batches(examples, 3, 4, seed=2, pad=0)]
    assert not np.array_equal(labels, other)


def test_batches_go_on_from_a_saved_position():
    examples = [{"input_ids": np.array([n]), "label": n} for n in range(10)]
    batches = data.train_batches(examples, 3, 4, seed=1, pad=0)
    for _ in range(5):
        next(batches)
    position = batches.get_state()
    rest = [batch["label"] for batch in batches]
    resumed = data.train_batches(examples, 3, 4, seed=1, pad=0)
    resumed.set_state(position)
    np.testing.assert_array_equal(rest, [batch["label"] for batch in resumed])
    assert len(rest) == 7


def test_a_model_without_a_fast_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json"):
        data.load_task("lexicon", tmp_path, 16)


def test_a_missing_word_list_names_its_package(tiny_model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    with pytest.raises(FileNotFoundError, match="pip install vaderSentiment"):
        data.lexicon(tokenizer)
