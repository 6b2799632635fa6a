"""The image data sets of the paper's vision table, two small ones that run anywhere, and folders of one's own.

Most come through TFDS, whose name and splits are an entry of TFDS_SPLITS: to add a data set, add one. Where there is no
validation split, `holdout` of the training examples choose the epoch.
"""

import collections
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import sklearn.datasets
import tensorflow_datasets as tfds

from experiments.data import Task
from experiments.images import image_task
from experiments.tasks.prepared import open_prepared
from gpart_jax import files

logger = logging.getLogger(__name__)


class Splits(NamedTuple):
    """Where a data set's three parts are in TFDS."""

    name: str
    train: str
    validation: str | None
    test: str


TFDS_SPLITS = {
    "cifar10": Splits("cifar10", "train", None, "test"),
    "cifar100": Splits("cifar100", "train", None, "test"),
    "flowers102": Splits("oxford_flowers102", "train", "validation", "test"),
    # These two have one split. Their order in TFDS is shuffled, and fixed: a fifth of it is our test set.
    "eurosat": Splits("eurosat/rgb", "train[:80%]", None, "train[80%:]"),
    "resisc45": Splits("resisc45", "train[:80%]", None, "train[80%:]"),
    "pets": Splits("oxford_iiit_pet", "train", None, "test"),
    "cars": Splits("cars196", "train", None, "test"),
    "dtd": Splits("dtd", "train", "validation", "test"),  # the first of its ten divisions
    "fashion_mnist": Splits("fashion_mnist", "train", None, "test"),
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif")  # torchvision's, and two
FOLDERS = {  # what people call the folder of a split, as Hugging Face's datasets knows it
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class Images(Sequence):
    """Examples that are read when they are asked for. `labels` are the names; `keep` maps a stored label to the task's."""

    def __init__(
        self, read: Callable[[int], dict], rows: np.ndarray, name: str, labels: int, keep: dict[int, int] | None
    ):
        self._read, self._rows, self._name, self._labels, self._keep = read, rows, name, labels, keep

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict:
        row = int(self._rows[number])
        record = self._read(row)
        label, called = int(record["label"]), f"{self._name}, record {row}"
        if record.get("id"):
            called += f" ({record['id']})"
        check_label(label, self._labels, called)
        return {"image": record["image"], "label": label if self._keep is None else self._keep[label], "id": called}


def check_label(label: int, count: int, called: str) -> None:
    if not 0 <= label < count:
        raise ValueError(
            f"{called}: the label is {label}, but there are {count}, from 0. Correct or remove this record."
        )


class Stored(NamedTuple):
    """A split before rows are chosen: `read(row)` -> {"image", "label", "id"}, how many rows, all labels when asked."""

    read: Callable[[int], dict]
    count: int
    labels: Callable[[], np.ndarray]


def load_vision(
    name: str,
    *,
    seed: int,
    image_size: int,
    holdout: float = 0.1,
    crop: float = 0.08,
    flip: bool = True,
    classes: Sequence[int] | None = None,
    train_examples: int | None = None,
    data_dir: str | None = None,
    workers: int = 0,
) -> Task:
    """One data set.

    Args:
      name: a key of SOURCES.
      seed: of the held-out split.
      image_size: of what the model sees, in pixels.
      holdout: share of the training examples that chooses the epoch where there is no validation split; in [0, 1).
      crop, flip: as in `images.augment`.
      classes: only these labels, by number, renumbered in this order; None means all.
      train_examples: only the first so many, before any are held out; None means all.
      data_dir: where TFDS keeps its data sets (None: $TFDS_DATA_DIR or ~/tensorflow_datasets); of "aircraft" and
        "folder", the folder itself.
      workers: processes that decode training images; 0 means threads.

    Raises:
      FileNotFoundError: the data isn't there.
      ValueError: data that can't be read, a label out of range, a class without an image; the message names the record.
    """
    train, validation, test, labels = SOURCES[name](name, data_dir)
    if classes is not None and not all(0 <= n < len(labels) for n in classes):
        raise ValueError(f"config.task.classes = {tuple(classes)}: {name} has labels 0 to {len(labels) - 1}.")
    keep = None if classes is None else {number: n for n, number in enumerate(classes)}

    def rows_of(part: Stored, split: str) -> np.ndarray:
        if keep is None:
            return np.arange(part.count)
        stored = part.labels()
        for row in np.flatnonzero((stored < 0) | (stored >= len(labels))):
            check_label(int(stored[row]), len(labels), f"{name} {split}, record {row}")
        return np.flatnonzero(np.isin(stored, list(keep)))

    rows = {"train": rows_of(train, "train"), "test": rows_of(test, "test")}
    if train_examples is not None:
        if not 1 <= train_examples <= len(rows["train"]):
            raise ValueError(
                f"train_examples = {train_examples} must be between 1 and {len(rows['train'])}, all there are."
            )
        rows["train"] = rows["train"][:train_examples]
    if validation is None:
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout = {holdout} is a share of the training examples; it must be in [0, 1).")
        shuffled = np.random.default_rng(seed).permutation(rows["train"])
        held = round(holdout * len(shuffled))
        rows |= {"validation": np.sort(shuffled[:held]), "train": np.sort(shuffled[held:])}
        validation, held_of = train, "train"
    else:
        rows["validation"], held_of = rows_of(validation, "validation"), "validation"
    splits = {
        split: Images(part.read, rows[split], f"{name} {stored}", len(labels), keep)
        for split, part, stored in (
            ("train", train, "train"),
            ("validation", validation, held_of),
            ("test", test, "test"),
        )
    }
    named = tuple(labels) if keep is None else tuple(labels[number] for number in classes)
    return image_task(**splits, labels=named, image_size=image_size, crop=crop, flip=flip, workers=workers)


def _from_tfds(name: str, data_dir: str | None):
    splits = TFDS_SPLITS[name]
    builder, where, command = open_prepared(splits.name, data_dir)
    features = builder.info.features
    # The bytes of images stay as they are until one is needed, in the thread or process that needs it.
    skip = {
        key: tfds.decode.SkipDecoding() for key, value in features.items() if isinstance(value, tfds.features.Image)
    }
    name_of = next((key for key in ("file_name", "filename", "id") if key in features), None)

    again = f"Bring that folder back, or remove it and prepare it again:\n  {command}"

    def part(split: str | None) -> Stored | None:
        if split is None:
            return None
        try:
            source = builder.as_data_source(split=split, decoders=skip)
        except Exception as error:  # TFDS, array_record and the file system have a type for each
            raise ValueError(
                f"The {split} split of {splits.name} in {where} can't be read ({error}). {again}"
            ) from error

        def read(row: int) -> dict:
            try:
                record = source[row]
            except Exception as error:
                raise ValueError(f"{splits.name} {split}, record {row}, in {where}: {error}. {again}") from error
            called = record[name_of].decode("utf-8", "replace") if name_of else None
            return {"image": record["image"], "label": record["label"], "id": called}

        def labels() -> np.ndarray:
            return np.array([record["label"] for record in source.__getitems__(range(len(source)))])

        return Stored(read, len(source), labels)

    return *map(part, splits[1:]), features["label"].names


def _from_digits(name: str, data_dir: str | None):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; of each ten in their order, two are for testing."""
    if data_dir is not None:
        raise ValueError("digits come with scikit-learn: leave config.task.data_dir unset.")
    digits = sklearn.datasets.load_digits()
    images = (digits.images * (255 / 16)).astype(np.uint8)

    def part(rows: np.ndarray) -> Stored:
        return Stored(
            lambda n: {"image": images[rows[n]], "label": digits.target[rows[n]]},
            len(rows),
            lambda: digits.target[rows],
        )

    tenth = np.arange(len(images)) % 10
    return part(np.flatnonzero(tenth < 8)), None, part(np.flatnonzero(tenth >= 8)), [str(n) for n in range(10)]


def _from_aircraft(name: str, data_dir: str | None):
    """FGVC-Aircraft (arXiv 1306.5151) by variant, from its published archive: data/images, data/images_variant_train.txt ..."""
    root = _folder(name, data_dir)
    root = root / "data" if (root / "data").is_dir() else root
    labels = _lines(root / "variants.txt")
    stored = {files.same(path.name): path for path in (root / "images").glob("*.jpg")}

    def part(split: str) -> Stored:
        listed = [line.split(" ", 1) for line in _lines(root / f"images_variant_{split}.txt")]
        for number, (image, *variant) in enumerate(listed, 1):
            if variant == [] or variant[0] not in labels:
                raise ValueError(
                    f"{root}/images_variant_{split}.txt, line {number}: {image} has no variant of variants.txt. Correct it."
                )
        paths = [stored.get(f"{image}.jpg", root / "images" / f"{image}.jpg") for image, _ in listed]
        return _files(split, paths, [labels.index(variant) for _, variant in listed], labels, root)

    return *map(part, ("train", "val", "test")), labels


def _from_folder(name: str, data_dir: str | None):
    """Images of one's own: train/<class>/*.jpg, test/<class>/*.jpg, and validation/<class>/*.jpg if there is one.

    As in torchvision, folders below a class belong to it. What is left out is counted in a warning.
    """
    root, left_out = _folder(name, data_dir), collections.defaultdict(list)
    splits = _splits(root, left_out)
    found = {split: _classes(folder, left_out) for split, folder in splits.items()}
    if left_out:
        counted = [f"{len(paths)} {why}, such as {paths[0].relative_to(root)}" for why, paths in left_out.items()]
        logger.warning("%s: left out %s.", root, "; ".join(counted))
    if not found.get("train"):
        raise FileNotFoundError(f"{root} has no train/<class> folders. Make one for each class, with its images.")
    labels = sorted(found["train"])

    def part(split: str) -> Stored:
        if other := found.get(split, {}).keys() - set(labels):
            raise ValueError(f"{splits[split] / min(other)} is a class that train/ doesn't have. Add or remove it.")
        paths = [found.get(split, {}).get(label, []) for label in labels]
        numbers = np.repeat(np.arange(len(labels)), list(map(len, paths)))
        return _files(split, list(itertools.chain(*paths)), numbers, labels, root)

    return part("train"), part("validation") if "validation" in found else None, part("test"), labels


def _splits(root: pathlib.Path, left_out: dict[str, list[pathlib.Path]]) -> dict[str, pathlib.Path]:
    """The folder of each split that is there; notes the other folders and images beside them."""
    split_of, found = {name: split for split, names in FOLDERS.items() for name in names}, {}
    for path in sorted(root.iterdir()):
        split = split_of.get(path.name.lower()) if path.is_dir() else None
        if split in found:
            raise ValueError(f"{root} has {found[split].name}/ and {path.name}/ for one split, {split}. Keep one of them.")
        if split:
            found[split] = path
        elif not files.hidden(path.name) and (path.is_dir() or path.suffix.lower() in SUFFIXES):
            left_out["beside the splits"].append(path)
    return found


def _classes(folder: pathlib.Path, left_out: dict[str, list[pathlib.Path]]) -> dict[str, list[pathlib.Path]]:
    """The images of each class in order, also of those in folders below; notes what isn't read."""
    found = collections.defaultdict(list)
    for path in sorted(folder.iterdir()):
        if files.hidden(path.name):
            left_out["whose names begin with a dot"].append(path)
        elif path.is_dir():
            found[files.same(path.name)] += _images(path, left_out)
        else:
            left_out["beside the classes"].append(path)
    return {label: sorted(paths, key=lambda path: [files.same(part) for part in path.parts]) for label, paths in found.items()}


def _images(folder: pathlib.Path, left_out: dict[str, list[pathlib.Path]]) -> list[pathlib.Path]:
    found, seen = [], set()  # a link may lead back to a folder above it

    def fail(error: OSError):
        raise error

    for at, below, names in os.walk(folder, onerror=fail, followlinks=True):
        below[:] = [] if (real := os.path.realpath(at)) in seen else below
        for name in () if real in seen else names + [name for name in below if files.hidden(name)]:
            path = pathlib.Path(at) / name
            if files.hidden(name):
                left_out["whose names begin with a dot"].append(path)
            elif path.suffix.lower() not in SUFFIXES:
                left_out["without the ending of an image"].append(path)
            else:
                found.append(path)
        below[:] = [name for name in below if not files.hidden(name)]
        seen.add(real)
    return found


def _files(
    split: str, paths: Sequence[pathlib.Path], numbers: Sequence[int], labels: list[str], root: pathlib.Path
) -> Stored:
    for number in sorted(set(range(len(labels))) - set(numbers)):
        raise ValueError(
            f"{root}: class {labels[number]!r} has no image in its {split} split. Add some, or remove the class."
        )

    def read(row: int) -> dict:
        called = str(paths[row].relative_to(root))
        try:
            return {"image": paths[row].read_bytes(), "label": numbers[row], "id": called}
        except OSError as error:
            raise FileNotFoundError(
                f"{paths[row]} can't be read ({error}). Copy it again, or take it off its list."
            ) from error

    return Stored(read, len(paths), lambda: np.array(numbers))


def _folder(name: str, data_dir: str | None) -> pathlib.Path:
    folder = None if data_dir is None else pathlib.Path(data_dir).expanduser()
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(f"{name} is read from a folder: set --config.task.data_dir to it, not to {data_dir!r}.")
    return folder


def _lines(path: pathlib.Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Unpack the published archive again.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Unpack the published archive again.") from error
    return [files.same(line.strip()) for line in text.splitlines() if line.strip()]


SOURCES = dict.fromkeys(TFDS_SPLITS, _from_tfds) | {
    "digits": _from_digits,
    "aircraft": _from_aircraft,
    "folder": _from_folder,
}
