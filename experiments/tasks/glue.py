"""GLUE (Wang et al., arXiv 1804.07461) through TFDS: the six tasks of the paper's natural-language table.

As in the authors' recipes, a part of the training split is held out to choose the epoch, and GLUE's validation split, whose
labels are public, is the test set. An example is {"text": sentence or (first, second), "label", "idx", "input_ids", ...}.
"""

import tensorflow_datasets as tfds
import tokenizers

from experiments.data import Task, hold_out
from experiments.tasks.prepared import Prepared, open_prepared
from experiments.text import encode, text_task

FIELDS = {  # the texts of an example, in the order in which the model reads them
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}
METRICS = {  # GLUE's; the first one chooses the epoch
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "stsb": ("pearson", "spearman"),
}
SCORES = (0.0, 5.0)  # the range of STS-B's labels


def load_glue(
    name: str,
    tokenizer: tokenizers.Tokenizer,
    *,
    pad: int,
    seed: int,
    max_length: int,
    holdout: float,
    train_examples: int | None = None,
    data_dir: str | None = None,
) -> Task:
    """One GLUE task. STS-B is a regression (labels None), the others are classifications.

    Args:
      name: a key of FIELDS.
      tokenizer: of the model.
      pad: the id of the model's padding token.
      seed: of the held-out split.
      max_length: in tokens, special ones counted. Longer texts are cut; of a pair, the longer one first.
      holdout: share of the training examples that chooses the epoch, as in `data.hold_out`; 0 tests the last epoch.
      train_examples: only the first so many of GLUE's training examples, before any are held out; None means all.
      data_dir: where TFDS keeps its data sets; None means $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      FileNotFoundError: the data isn't there; the message has the command that gets it.
      ValueError: data that cannot be read, an empty text, a label out of range.
    """
    prepared = open_prepared(f"glue/{name}", data_dir, "tensorflow_datasets.text.glue")
    label = prepared.builder.info.features["label"]
    labels = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else None
    train, test = (_read(prepared, split, name, labels) for split in ("train", "validation"))
    if train_examples is not None and not 1 <= train_examples <= len(train):
        raise ValueError(f"train_examples = {train_examples} must be between 1 and {len(train)}, all of glue/{name}.")
    train, validation = hold_out(train[:train_examples], holdout, seed)
    for split, examples in {"train": train, "validation": validation, "test": test}.items():
        encode(tokenizer, examples, max_length, f"glue/{name} {split}")
    return text_task(train, validation, test, labels=labels, metrics=METRICS[name], pad=pad, max_length=max_length)


def _read(prepared: Prepared, split: str, name: str, labels: tuple[str, ...] | None) -> list[dict]:
    """The checked examples of a split, in GLUE's own order (TFDS shuffles them when it prepares them)."""
    try:
        source = prepared.builder.as_data_source(split=split)
        rows = source.__getitems__(range(len(source)))
    except Exception as error:  # TFDS, array_record and the file system have a type for each
        raise ValueError(
            f"The {split} split of glue/{name} in {prepared.where} cannot be read ({error}). Remove that folder and prepare it "
            f"again:\n  {prepared.command}"
        ) from error

    examples = []
    for row in sorted(rows, key=lambda row: row["idx"]):
        at = f"glue/{name} {split}, idx {row['idx']}, in {prepared.where}"
        texts = tuple(row[field].decode("utf-8", "replace") for field in FIELDS[name])
        for field, text in zip(FIELDS[name], texts):
            if not text.strip():
                raise ValueError(f"{at}: {field} is empty. Correct or remove this example.")
        if labels is None:
            label, valid = float(row["label"]), SCORES[0] <= row["label"] <= SCORES[1]
            expected = f"a score from {SCORES[0]} to {SCORES[1]}"
        else:
            label, valid = int(row["label"]), 0 <= row["label"] < len(labels)
            expected = f"one of {', '.join(f'{n} ({name})' for n, name in enumerate(labels))}"
        if not valid:
            raise ValueError(f"{at}: the label is {label}, but should be {expected}. Correct or remove this example.")
        examples.append({"text": texts[0] if len(texts) == 1 else texts, "label": label, "idx": int(row["idx"])})
    return examples
