"""Labelled text: what a task's examples are, and how they become batches.

An example is {"text": str, "label": int, "input_ids": int32 (length,)}, with whatever else its task knows of it.
"""

import hashlib
import importlib.util
import pathlib
import re
from typing import NamedTuple

import grain
import numpy as np
import tokenizers


class Task(NamedTuple):
    """A task's three splits (lists of examples), its label names, and the metric that chooses the epoch."""

    train: list[dict]
    validation: list[dict]
    test: list[dict]
    labels: tuple[str, ...]
    metric: str


def lexicon(tokenizer: tokenizers.Tokenizer) -> Task:
    """Is a word positive or negative? The human-rated words of VADER's lexicon (Hutto and Gilbert, ICWSM 2014).

    The 7,340 entries that hold a letter; the label is the sign of the mean rating of ten people, -4 ... 4. A hash of the
    lower-cased word splits them 7 : 1 : 2, so that the split is fixed for ever and no spelling is on both sides.

    Raises:
      FileNotFoundError: the package vaderSentiment isn't installed.
    """
    spec = importlib.util.find_spec("vaderSentiment")
    if spec is None:
        raise FileNotFoundError("The word list comes with a package that is missing. Run: pip install vaderSentiment")
    lines = (pathlib.Path(spec.origin).parent / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    splits = {"train": [], "validation": [], "test": []}
    for line in lines:
        word, rating = line.split("\t")[:2]
        if re.search("[A-Za-z]", word):
            tenth = int.from_bytes(hashlib.sha256(word.lower().encode()).digest()[:8]) % 10
            name = "train" if tenth < 7 else "validation" if tenth == 7 else "test"
            splits[name].append({"text": word, "label": int(float(rating) > 0), "rating": float(rating)})
    for examples in splits.values():
        for example, encoding in zip(examples, tokenizer.encode_batch([e["text"] for e in examples])):
            example["input_ids"] = np.array(encoding.ids, np.int32)
    return Task(**splits, labels=("negative", "positive"), metric="accuracy")


TASKS = {"lexicon": lexicon}


def load_task(name: str, model_dir: pathlib.Path, max_length: int) -> Task:
    """The named task, tokenized by the tokenizer in `model_dir` and cut to `max_length` tokens."""
    if name not in TASKS:
        raise ValueError(f"Unknown task {name!r}. Choose one of {', '.join(TASKS)}.")
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{model_dir} holds no tokenizer.json. Save the model's fast tokenizer beside its weights."
        )
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return TASKS[name](tokenizer)


def train_batches(examples: list[dict], batch_size: int, epochs: int, seed: int, pad: int) -> grain.DatasetIterator:
    """Shuffled batches, anew in each epoch; the incomplete last batch of an epoch is left out."""
    if not 1 <= batch_size <= len(examples):
        raise ValueError(
            f"batch_size = {batch_size} must be between 1 and {len(examples)}, the number of training examples."
        )
    dataset = grain.MapDataset.source(examples).seed(seed).shuffle()
    dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=lambda rows: collate(rows, pad)).repeat(epochs)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def collate(examples: list[dict], pad: int) -> dict[str, np.ndarray]:
    """Stacks examples: input_ids and attention_mask, int32 (batch, length), label (batch,).

    The length is the longest example's, rounded up to a multiple of 8, so that few lengths are compiled.
    """
    length = -(-max(len(example["input_ids"]) for example in examples) // 8) * 8
    input_ids = np.full((len(examples), length), pad, np.int32)
    attention_mask = np.zeros((len(examples), length), np.int32)
    for row, example in enumerate(examples):
        input_ids[row, : len(example["input_ids"])] = example["input_ids"]
        attention_mask[row, : len(example["input_ids"])] = 1
    label = np.array([example["label"] for example in examples])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "label": label}
