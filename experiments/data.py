"""Labelled text: what a task's examples are, and how they become batches.

An example is {"text": str or (str, str), "label": int or float, "input_ids": int32 (length,)}, with "token_type_ids" where
the tokenizer tells the two texts of a pair apart by them, and with whatever else its task knows of it.
"""

import bisect
import logging
from typing import NamedTuple

import grain
import numpy as np
import tokenizers
from sklearn.model_selection import train_test_split

logger = logging.getLogger(__name__)

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # of batches, in tokens; each is compiled once
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
HOLDOUT_MINIMUM = 300


class Task(NamedTuple):
    """A task's three splits (lists of examples) and what is known of them."""

    train: list[dict]
    validation: list[dict]  # empty: there is none, and the last epoch is tested
    test: list[dict]
    labels: tuple[str, ...] | None  # None: a regression
    metrics: tuple[str, ...]  # of evaluate.METRICS; the first one chooses the epoch
    max_length: int  # tokens of the longest example allowed

    @property
    def outputs(self) -> int:
        """How many numbers a model has to give for an example."""
        return 1 if self.labels is None else len(self.labels)


def encode(tokenizer: tokenizers.Tokenizer, examples: list[dict], max_length: int, name: str) -> None:
    """Adds input_ids, and token_type_ids where there are any, to each example of the split `name`.

    What is longer than `max_length` tokens is cut at its end (of a pair, the longer text is), and counted in a warning.
    """
    if not examples:
        return
    texts = [example["text"] for example in examples]
    special = tokenizer.num_special_tokens_to_add(not isinstance(texts[0], str))
    if max_length <= special:
        raise ValueError(f"max_length = {max_length} leaves no room beside the {special} special tokens.")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    cut = 0
    for example, encoding in zip(examples, tokenizer.encode_batch(texts)):
        example["input_ids"] = np.array(encoding.ids, np.int32)
        if any(encoding.type_ids):
            example["token_type_ids"] = np.array(encoding.type_ids, np.int32)
        cut += bool(encoding.overflowing)
    if cut:
        logger.warning("%s: %d of %d texts are longer than %d tokens and were cut.", name, cut, len(texts), max_length)


def hold_out(examples: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Splits off a validation set of that share, and of at least 300 examples; none where share is 0.

    It is stratified: both parts get the labels in the same shares (of scores, the labels rounded to whole numbers).

    Args:
      examples: all that may be trained on.
      share: in [0, 1). The authors' recipes have 0.15 to 0.2.
      seed: of the draw.

    Raises:
      ValueError: a share outside [0, 1), or so few examples that none are left to train on.
    """
    if not 0 <= share < 1:
        raise ValueError(f"holdout = {share} is a share of the training examples; it must be in [0, 1).")
    if not share:
        return examples, []
    count = max(HOLDOUT_MINIMUM, round(share * len(examples)))
    if count >= len(examples):
        raise ValueError(
            f"holdout = {share} holds out at least {count} examples, but there are {len(examples)}. "
            f"Set it to 0 to train on all and test the last epoch."
        )
    strata = [round(example["label"]) for example in examples]
    train, validation = train_test_split(examples, test_size=count, random_state=seed, stratify=strata)
    return train, validation


def train_batches(
    task: Task,
    batch_size: int,
    epochs: int,
    seed: int,
    pad: int,
    *,
    part: int = 0,
    parts: int = 1,
) -> grain.DatasetIterator:
    """Shuffled batches of the training split, anew in each epoch; the incomplete last batch of an epoch is left out.

    Args:
      task: its examples.
      batch_size: of all processes together.
      epochs: how often each example may come.
      seed: of the order.
      pad: the id of the padding token.
      part, parts: which of how many equal parts of every batch to give, all of the same length in tokens. What a whole
        batch holds doesn't depend on their number.

    Returns:
      An iterator of `collate`'s batches, whose position can be saved.

    Raises:
      ValueError: a batch size that is no multiple of the parts, or larger than the split.
    """
    if not 1 <= batch_size <= len(task.train):
        raise ValueError(
            f"batch_size = {batch_size} must be between 1 and {len(task.train)}, the number of training examples."
        )
    if batch_size % parts:
        raise ValueError(f"batch_size = {batch_size} must be a multiple of {parts}, the parts it is divided into.")

    def own_part(rows):
        return {name: array[part::parts] for name, array in collate(rows, pad, task.max_length).items()}

    dataset = grain.MapDataset.source(task.train).seed(seed).shuffle()
    dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=own_part).repeat(epochs)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def collate(examples: list[dict], pad: int, max_length: int) -> dict[str, np.ndarray]:
    """Stacks examples: input_ids, attention_mask (and token_type_ids), int32 (batch, length); label (batch,).

    The length is the longest example's, rounded up to one of LENGTHS, so that few lengths are compiled.
    """
    length = padded_length(max(len(example["input_ids"]) for example in examples), max_length)
    batch = {"input_ids": np.full((len(examples), length), pad, np.int32)}
    batch["attention_mask"] = np.zeros((len(examples), length), np.int32)
    if "token_type_ids" in examples[0]:
        batch["token_type_ids"] = np.zeros((len(examples), length), np.int32)
    for row, example in enumerate(examples):
        real = len(example["input_ids"])
        batch["attention_mask"][row, :real] = 1
        for name in batch.keys() & example.keys():
            batch[name][row, :real] = example[name]
    label = np.array([example["label"] for example in examples])
    return batch | {"label": label.astype(np.float32 if label.dtype.kind == "f" else np.int32)}


def padded_length(longest: int, max_length: int) -> int:
    """The smallest of LENGTHS that holds `longest` tokens, but never more than max_length."""
    at = bisect.bisect_left(LENGTHS, longest)
    return min(LENGTHS[at], max_length) if at < len(LENGTHS) else max_length
