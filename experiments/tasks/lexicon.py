"""Is a word positive or negative? A task from a package alone."""

import hashlib
import importlib.util
import pathlib
import re

import tokenizers

from experiments.data import Task
from experiments.text import encode, text_task


def load_lexicon(
    tokenizer: tokenizers.Tokenizer, *, pad: int, max_length: int, seed: int, train_examples: int | None = None
) -> Task:
    """The human-rated words of VADER's lexicon (Hutto and Gilbert, ICWSM 2014).

    The 7,340 entries that hold a letter; the label is the sign of the mean rating of ten people, -4 ... 4. A hash of the
    lower-cased word splits them 7 : 1 : 2, so that the split is fixed for ever and no spelling is on both sides.

    Args:
      tokenizer, pad, max_length: of the model, as for `load_glue`.
      train_examples: only the first so many of the words to train on; None means all.

    Raises:
      FileNotFoundError: the package vaderSentiment isn't installed.
      ValueError: train_examples out of range.
    """
    del seed
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
    if train_examples is not None and not 1 <= train_examples <= len(splits["train"]):
        raise ValueError(f"train_examples = {train_examples} must be between 1 and {len(splits['train'])}, all words.")
    splits["train"] = splits["train"][:train_examples]
    for name, examples in splits.items():
        encode(tokenizer, examples, max_length, f"lexicon {name}")
    labels = ("negative", "positive")
    return text_task(**splits, labels=labels, metrics=("accuracy",), pad=pad, max_length=max_length)
