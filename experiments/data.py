"""What a task is, and how its training examples become batches: for text and for images alike."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grain
import numpy as np
from sklearn.model_selection import train_test_split

HOLDOUT_MINIMUM = 300


class Task(NamedTuple):
    """A task's three splits (sequences of examples, each a dict with a "label") and what is known of them."""

    train: Sequence[dict]
    validation: Sequence[dict]  # empty: there is none, and the last epoch is tested
    test: Sequence[dict]
    labels: tuple[str, ...] | None  # None: a regression
    metrics: tuple[str, ...]  # of metrics.METRICS; the first one chooses the epoch
    inputs: tuple[str, ...]  # what of a batch the model is given, where it is there
    collate: Callable[[list[dict]], dict[str, np.ndarray]]  # examples -> batch
    augment: Callable[[dict, np.random.Generator], dict] | None = None  # an example as training sees it this time
    size: Callable[[dict], int] | None = None  # examples of like size are evaluated together
    max_length: int | None = None  # of text: tokens of the longest example allowed
    bucketed: bool = False  # whether examples of like size are trained on together
    other_text: Sequence[dict] = ()  # of a decoder: windows of a text whose loss tells what training made it forget
    workers: int = 0  # processes that make the training batches; 0: threads of this one
    language: bool = False  # whether the examples are texts to be learned, and so scored by their loss

    @property
    def better(self) -> int:
        """1 where more of the first metric is better, else -1."""
        return -1 if self.language else 1

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for an example; of a text to learn its loss, and the tokens that this is of."""
        return 2 if self.language else 1 if self.labels is None else len(self.labels)


def fingerprint(examples: Sequence[dict]) -> str:
    """How many examples, and a digest of all that is learned of them: "5145 examples, 0f3c...". Reads each, in several threads.

    Arrays, images as they are stored, and labels count; what an example is called doesn't, nor where it lies.
    """

    def digest(rows: range) -> bytes:
        found = hashlib.sha256()
        for row in rows:
            example = examples[row]
            for name in sorted(example):
                value = example[name]
                if isinstance(value, np.ndarray):
                    found.update(f"{name}{value.dtype}{value.shape}".encode() + value.tobytes())
                elif isinstance(value, bytes):
                    found.update(f"{name}{len(value)}:".encode() + value)
                elif name == "label":
                    found.update(f"{name}{float(value)}".encode())
        return found.digest()

    spans = [range(start, min(start + 256, len(examples))) for start in range(0, len(examples), 256)]
    with ThreadPoolExecutor(8) as pool:
        whole = hashlib.sha256(b"".join(pool.map(digest, spans)))
    return f"{len(examples)} examples, {whole.hexdigest()[:16]}"


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
    task: Task, batch_size: int, epochs: int, seed: int, *, part: int = 0, parts: int = 1
) -> grain.DatasetIterator:
    """Shuffled batches of the training split, anew in each epoch; the incomplete last batch of an epoch is left out.

    Args:
      task: its examples.
      batch_size: of all processes together.
      epochs: how often each example may come.
      seed: of the order, and with epoch and place of what `task.augment` draws.
      part, parts: which of how many equal parts of every batch to give, text of the same length in tokens. What a whole
        batch holds doesn't depend on their number.

    Returns:
      An iterator of `task.collate`'s batches, whose position can be saved; with "row", each example's place in the whole batch.

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
        batch = task.collate([task.train[row] for row in rows])  # of all, whose longest sets the length
        return {name: array[part::parts] for name, array in (batch | {"row": np.arange(len(rows), dtype=np.int32)}).items()}

    def own_part_augmented(rows_and_seeds):  # reads and decodes no more than its own
        seeded = [(task.train[row], np.random.default_rng(seed)) for row, seed in rows_and_seeds[part::parts]]
        batch = task.collate([task.augment(example, rng) for example, rng in seeded])
        return batch | {"row": np.arange(len(rows_and_seeds), dtype=np.int32)[part::parts]}

    if task.bucketed:
        buckets = Buckets([task.size(example) for example in task.train], batch_size, seed)
        steps = epochs * (len(task.train) // batch_size)
        dataset = grain.MapDataset.range(steps).map(lambda step: own_part(buckets.rows(step)))
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
    dataset = grain.MapDataset.range(len(task.train)).seed(seed).shuffle()
    if task.augment:
        dataset = dataset.random_map(lambda row, rng: (row, rng.integers(2**63, size=2)))
    batch_fn = own_part_augmented if task.augment else own_part
    dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=batch_fn).repeat(epochs)
    # Tokens are put together by one thread, images decoded by several: Pillow lets them run at once.
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=8 if task.augment else 1, prefetch_buffer_size=8))
    if task.workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=task.workers))
    return iter(batches)


class Buckets:
    """Which examples are in which batch, where those of like size are to be together: less padding, as random an order.

    An epoch's examples are shuffled, sorted by size within spans of WINDOW batches, cut into batches, and the batches
    shuffled. It is a function of the seed and the epoch alone.
    """

    WINDOW = 32

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int):
        self._sizes, self._batch_size, self._seed = np.array(sizes), batch_size, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def rows(self, step: int) -> np.ndarray:
        """The rows of the batch of a step, counted from 0 over all epochs."""
        epoch, batch = divmod(step, len(self._sizes) // self._batch_size)
        return self._epoch(epoch)[batch]

    def _make_epoch(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self._seed, epoch])
        count = len(self._sizes) // self._batch_size
        rows = random.permutation(len(self._sizes))[: count * self._batch_size]
        span = self.WINDOW * self._batch_size
        spans = [rows[start : start + span] for start in range(0, len(rows), span)]
        ordered = np.concatenate([part[np.argsort(self._sizes[part], kind="stable")] for part in spans])
        return random.permutation(ordered.reshape(count, self._batch_size))
