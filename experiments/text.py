"""Labelled text: how a task's texts become batches of tokens.

An example is {"text": str or (str, str), "label": int or float, "input_ids": int32 (length,)}, with "token_type_ids" where
the tokenizer tells the two texts of a pair apart by them, and with whatever else its task knows of it.
"""

import bisect
import functools
import logging
from collections.abc import Sequence

import numpy as np
import tokenizers

from experiments.data import Task

logger = logging.getLogger(__name__)

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # of batches; each is compiled once
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
BESIDE = ("token_type_ids", "loss_mask")  # of each token


def text_task(
    train: list[dict],
    validation: list[dict],
    test: list[dict],
    *,
    labels: tuple[str, ...] | None,
    metrics: tuple[str, ...],
    pad: int,
    max_length: int,
) -> Task:
    """A task of encoded examples. `pad` is the id of the padding token."""
    collated = functools.partial(collate, pad=pad, max_length=max_length)
    return Task(train, validation, test, labels, metrics, INPUTS, collated, size=_tokens, max_length=max_length)


def language_task(train: list[dict], validation: list[dict], test: list[dict], *, max_length: int) -> Task:
    """A task of texts to learn, with a loss_mask, by whose loss it is validated and tested."""
    collated = functools.partial(collate, pad=0, max_length=max_length)  # what pads is masked
    inputs = ("input_ids", "attention_mask", "loss_mask")
    sizes = dict(size=_tokens, max_length=max_length, bucketed=True)
    return Task(train, validation, test, None, ("loss",), inputs, collated, language=True, **sizes)


def _tokens(example: dict) -> int:
    return len(example["input_ids"])


def with_lengths(task: Task, lengths: Sequence[int]) -> Task:
    """The task with batches of these lengths in tokens alone, and of max_length.

    Raises:
      ValueError: lengths that aren't whole positive numbers.
    """
    if not all(isinstance(length, int) and length > 0 for length in lengths):
        raise ValueError(f"config.task.lengths = {tuple(lengths)} must be whole positive numbers, such as (512, 2048).")
    return task._replace(collate=functools.partial(task.collate, lengths=tuple(sorted(lengths))))


def packed(task: Task, seed: int) -> Task:
    """The task with its training texts packed into rows of at most max_length tokens, which `segments` tells apart.

    Each text goes into the fullest row that has room, in an order drawn from the seed. The loss of a token is what it is alone:
    texts don't see one another, positions begin anew, and no text's first token is predicted.
    """
    rows: list[list[dict]] = []
    rooms: list[tuple[int, int]] = []  # what is left in each row that isn't full, and its number; sorted
    for number in np.random.default_rng(seed).permutation(len(task.train)):
        example, size = task.train[number], _tokens(task.train[number])
        at = bisect.bisect_left(rooms, (size, 0))
        left, row = rooms.pop(at) if at < len(rooms) else (task.max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        if left > size:
            bisect.insort(rooms, (left - size, row))
    return task._replace(train=[_join(row) for row in rows])


def _join(examples: list[dict]) -> dict:
    masks = [np.append(np.int32(0), example["loss_mask"][1:]) for example in examples]
    segments = [np.full(_tokens(example), number, np.int32) for number, example in enumerate(examples, start=1)]
    ids = [example["input_ids"] for example in examples]
    return {"input_ids": np.concatenate(ids), "loss_mask": np.concatenate(masks), "segments": np.concatenate(segments)}


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


def collate(examples: list[dict], pad: int, max_length: int, lengths: Sequence[int] = LENGTHS) -> dict[str, np.ndarray]:
    """Stacks examples: input_ids, attention_mask (token_type_ids, loss_mask), int32 (batch, length); label (batch,).

    The length is the longest example's, rounded up to one of `lengths`, so that few are compiled. The attention mask of a packed row
    says of which text a token is.
    """
    length = padded_length(max(len(example["input_ids"]) for example in examples), max_length, lengths)
    batch = {"input_ids": np.full((len(examples), length), pad, np.int32)}
    batch["attention_mask"] = np.zeros((len(examples), length), np.int32)
    for name in BESIDE:
        if name in examples[0]:
            batch[name] = np.zeros((len(examples), length), np.int32)
    for row, example in enumerate(examples):
        real = len(example["input_ids"])
        batch["attention_mask"][row, :real] = example.get("segments", 1)
        for name in batch.keys() & example.keys():
            batch[name][row, :real] = example[name]
    if "label" not in examples[0]:
        return batch
    label = np.array([example["label"] for example in examples])
    return batch | {"label": label.astype(np.float32 if label.dtype.kind == "f" else np.int32)}


def padded_length(longest: int, max_length: int, lengths: Sequence[int] = LENGTHS) -> int:
    """The smallest of the ascending lengths that holds `longest` tokens, but never more than max_length."""
    at = bisect.bisect_left(lengths, longest)
    return min(lengths[at], max_length) if at < len(lengths) else max_length
