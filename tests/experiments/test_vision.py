"""Images: what is read of each data set, how they are transformed, what is refused; whole runs from configs/vision.py."""

import io
import json
import pathlib
import unicodedata

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs import vision as config_vision
from experiments import data, images, report
from experiments.tasks import load_task
from experiments.tasks.vision import TFDS_SPLITS
from experiments.train import train
from gpart_jax.models import pretrained

DATA = pathlib.Path(__file__).parents[1] / "data" / "vit"


def encoded(pixels, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, form)
    return buffer.getvalue()


def load(name, directory=None, **options):
    spec = {"name": name, "image_size": 16, "data_dir": None if directory is None else str(directory)} | options
    return load_task(spec, None, seed=0)


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """Every data set of TFDS_SPLITS with 40 made-up examples a split, in TFDS's own features, prepared by TFDS."""
    directory, random = tmp_path_factory.mktemp("tfds_images"), np.random.default_rng(0)

    def example(features, n):
        made = {}
        for name, feature in features.items():
            if isinstance(feature, tfds.features.Image):
                made[name] = encoded(random.integers(0, 256, [side or 20 + n % 3 for side in feature.shape], np.uint8))
            elif isinstance(feature, tfds.features.ClassLabel):
                made[name] = n % feature.num_classes
            elif isinstance(feature, tfds.features.BBoxFeature):
                made[name] = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
            else:
                made[name] = f"{n}.jpg"
        return made

    with pytest.MonkeyPatch.context() as patch:
        for splits in TFDS_SPLITS.values():
            builder = tfds.builder(splits.name, data_dir=directory, file_format="array_record")
            made = {
                split.split("[")[0]: [(n, example(builder.info.features, n)) for n in range(40)]
                for split in splits[1:]
                if split
            }
            patch.setattr(
                type(builder), "_split_generators", lambda self, manager: {k: iter(v) for k, v in made.items()}
            )
            builder.download_and_prepare()
    return directory


# Reading


@pytest.mark.parametrize("name", TFDS_SPLITS)
def test_each_data_set_has_its_splits(name, tfds_dir):
    task, splits = load(name, tfds_dir), TFDS_SPLITS[name]
    available = 32 if "[" in splits.train else 40
    held = 40 if splits.validation else round(0.1 * available)
    assert len(task.validation) == held and len(task.test) == (8 if "[" in splits.test else 40)
    assert len(task.train) == (40 if splits.validation else available - held)
    called = [example["id"] for split in task[:3] for example in split]
    assert len(set(called)) == len(called) and called[0].startswith(f"{name} train")
    assert sorted(example["label"] for example in task.test) == sorted(n["label"] for n in task.test)
    assert task.collate([task.test[0]])["pixel_values"].shape == (1, 16, 16, 3)


def test_held_out_by_seed(tfds_dir):
    def held(seed):
        spec = {"name": "cifar10", "image_size": 16, "data_dir": str(tfds_dir), "holdout": 0.25}
        return [example["id"] for example in load_task(spec, None, seed).validation]

    assert len(held(0)) == 10 and held(0) == held(0) != held(1)
    assert not load("cifar10", tfds_dir, holdout=0).validation


def test_some_classes_are_renumbered(tfds_dir):
    task = load("fashion_mnist", tfds_dir, classes=(9, 1), holdout=0)
    assert task.labels == ("Ankle boot", "Trouser") and task.outputs == 2
    assert sorted(example["label"] for example in task.test) == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match=r"classes = \(1, 10\): fashion_mnist has labels 0 to 9"):
        load("fashion_mnist", tfds_dir, classes=(1, 10))


def test_digits_come_with_a_package():
    task = load("digits")
    assert (len(task.train), len(task.validation), len(task.test)) == (1295, 144, 358)
    assert task.labels == tuple("0123456789")
    with pytest.raises(ValueError, match="leave config.task.data_dir unset"):
        load("digits", "/somewhere")


@pytest.fixture
def aircraft(tmp_path):
    root = tmp_path / "fgvc-aircraft-2013b" / "data"
    (root / "images").mkdir(parents=True)
    (root / "variants.txt").write_text("707-320\nA300 B4\n")
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{number}{n}" for n in range(4)]
        for name in names:
            (root / "images" / f"{name}.jpg").write_bytes(encoded(np.full((20, 30, 3), int(name), np.uint8), "JPEG"))
        lines = [f"{name} {('707-320', 'A300 B4')[n % 2]}" for n, name in enumerate(names)]
        (root / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    return root.parent


def test_aircraft_in_its_published_format(aircraft):
    task = load("aircraft", aircraft)
    assert task.labels == ("707-320", "A300 B4")
    assert [example["label"] for example in task.validation] == [0, 1, 0, 1]
    assert task.collate([task.test[3]])["pixel_values"].max() in range(21, 26)  # JPEG's 23


def test_folders_of_ones_own(tmp_path):
    for split, classes in {"train": "ab", "test": "ab"}.items():
        for label in classes:
            (tmp_path / split / label).mkdir(parents=True)
            for n in range(5):
                (tmp_path / split / label / f"{n}.png").write_bytes(encoded(np.full((8, 8), 10 * n, np.uint8)))
    task = load("folder", tmp_path, holdout=0.2)
    assert (len(task.train), len(task.validation), len(task.test)) == (8, 2, 10)
    for path in (tmp_path / "test" / "b").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="class 'b' has no image in its test split. Add some"):
        load("folder", tmp_path)
    (tmp_path / "test" / "c").mkdir()
    with pytest.raises(ValueError, match="test/c is a class that train/ doesn't have"):
        load("folder", tmp_path)


def put(path, color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path, "PNG")


def small_folder(root):
    for path in ("train/cat/a.png", "train/dog/b.png", "test/cat/c.png", "test/dog/d.png"):
        put(root / path)
    return root


@pytest.mark.parametrize(
    "path, split",
    [
        *[(f"train/cat/x{suffix}", "train") for suffix in (".JPG", ".tif", ".TIFF", ".gif", ".jfif", ".ppm", ".pgm")],
        ("train/cat/2024/may/x.png", "train"),
        *[(f"{name}/cat/x.png", "validation") for name in ("validation", "valid", "val", "dev", "Val")],
    ],
)
def test_a_folders_images_are_read_as_torchvision_does(tmp_path, caplog, path, split):
    put(small_folder(tmp_path) / path)
    if split == "validation":
        put(tmp_path / path.replace("cat", "dog"))
    task = load("folder", tmp_path, holdout=0.0)
    assert [len(part) for part in task[:3]] == ([3, 0, 2] if split == "train" else [2, 2, 2])
    assert task.labels == ("cat", "dog") and not caplog.records


@pytest.mark.parametrize(
    "path, said",
    [
        ("train/cat/._a.png", "1 whose names begin with a dot, such as train/cat/._a.png"),
        ("train/cat/.ipynb_checkpoints/a.png", "1 whose names begin with a dot, such as train/cat/.ipynb_checkpoints"),
        ("test/.git/config", "1 whose names begin with a dot, such as test/.git"),
        ("train/cat/notes.txt", "1 without the ending of an image, such as train/cat/notes.txt"),
        ("train/x.png", "1 beside the classes, such as train/x.png"),
        ("extra/cat/x.png", "1 beside the splits, such as extra"),
    ],
)
def test_what_a_folder_leaves_out_is_counted_in_one_warning(tmp_path, caplog, path, said):
    root = small_folder(tmp_path / ".above")  # a dot above the folder is no reason
    put(root / path)
    task = load("folder", root, holdout=0.0)
    assert [len(part) for part in task[:3]] == [2, 0, 2] and task.labels == ("cat", "dog")
    assert [record.getMessage() for record in caplog.records] == [f"{root}: left out {said}."]


def test_a_link_back_to_a_folder_above_ends(tmp_path):
    (small_folder(tmp_path) / "train" / "cat" / "again").symlink_to(tmp_path / "train" / "cat")
    assert len(load("folder", tmp_path, holdout=0.0).train) == 2


def test_two_folders_for_one_split_are_refused(tmp_path):
    put(small_folder(tmp_path) / "val" / "cat" / "x.png"), put(tmp_path / "validation" / "cat" / "x.png")
    with pytest.raises(ValueError, match="has val/ and validation/ for one split, validation. Keep one"):
        load("folder", tmp_path)


NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("one, other", [(NFC, NFD), (NFD, NFC)])
def test_a_name_is_one_in_both_forms_of_unicode(tmp_path, aircraft, one, other):
    for path in (f"train/{one}/a.png", f"train/{other}/b.png", f"test/{other}/c.png"):
        put(tmp_path / "folder" / path)
    task = load("folder", tmp_path / "folder", holdout=0.0)
    assert task.labels == (NFC,) and [len(part) for part in task[:3]] == [2, 0, 1]
    (aircraft / "data" / "variants.txt").write_text(f"{one}\n")
    for split in ("train", "val", "test"):
        (aircraft / "data" / f"images_variant_{split}.txt").write_text(f"{one} {other}\n")
    put(aircraft / "data" / "images" / f"{other}.jpg")
    task = load("aircraft", aircraft)
    assert task.labels == (NFC,) and task.train[0]["image"]


# What is refused


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="(?s)no oxford_flowers102 in .*download_and_prepare"):
        load("flowers102", tmp_path)
    with pytest.raises(FileNotFoundError, match="set --config.task.data_dir to it"):
        load("aircraft")
    with pytest.raises(FileNotFoundError, match="variants.txt is missing"):
        load("aircraft", tmp_path)
    with pytest.raises(FileNotFoundError, match="no train/<class> folders"):
        load("folder", tmp_path)


def test_a_variant_without_an_image(aircraft):
    (aircraft / "data" / "variants.txt").write_text("707-320\nA300 B4\nSR-20\n")
    with pytest.raises(ValueError, match="class 'SR-20' has no image in its train split"):
        load("aircraft", aircraft)


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_a_corrupt_image_is_named(aircraft, damage):
    task, path = load("aircraft", aircraft), aircraft / "data" / "images" / "21.jpg"
    path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
    with pytest.raises(ValueError, match=r"aircraft test, record 1 \(images/21.jpg\): the image can't be decoded"):
        task.collate([task.test[1]])


def test_a_corrupt_image_stops_training_by_name(aircraft):
    task = load("aircraft", aircraft)
    for name in ("00", "01", "02", "03"):
        (aircraft / "data" / "images" / f"{name}.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"aircraft train, record \d \(images/0\d.jpg\): the image can't be decoded"):
        next(data.train_batches(task, 2, 1, seed=0))


def test_a_missing_image_is_named(aircraft):
    task = load("aircraft", aircraft)
    (aircraft / "data" / "images" / "20.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="20.jpg can't be read"):
        task.test[0]


def test_a_label_out_of_range_is_named(tmp_path, monkeypatch):
    builder = tfds.builder("cifar10", data_dir=tmp_path, file_format="array_record")
    pixels = encoded(np.zeros((32, 32, 3), np.uint8))
    rows = [(n, {"id": f"r{n}", "image": pixels, "label": n}) for n in range(10)]
    monkeypatch.setattr(type(builder), "_split_generators", lambda *_: {"train": iter(rows), "test": iter(rows)})
    builder.download_and_prepare()
    (tmp_path / "cifar10" / "3.0.2" / "label.labels.txt").write_text("\n".join(["a", "b", "c"]))
    features = tmp_path / "cifar10" / "3.0.2" / "features.json"
    features.write_text(features.read_text().replace('"numClasses": "10"', '"numClasses": "3"'))
    task = load("cifar10", tmp_path, holdout=0)
    with pytest.raises(ValueError, match=r"cifar10 test, record \d \(r\d\): the label is \d, but there are 3, from 0"):
        [task.test[n] for n in range(10)]
    with pytest.raises(ValueError, match=r"cifar10 train, record \d: the label is \d, but there are 3"):
        load("cifar10", tmp_path, classes=(0, 1))


def test_text_and_images_do_not_mix(tiny_model, tmp_path):
    config = config_vision.get_config("digits")
    config.model.source = str(tiny_model)
    with pytest.raises(ValueError, match="'digits' gives images, but config.model.source = .* is a model of text"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("imagenet", "no data set 'imagenet'. Choose one of cifar10"),
        ("digits,base", "'base' is neither a size of digits"),
        ("cars,pretrain", "'pretrain' is neither a size of cars .* nor a method"),
    ],
)
def test_unknown_config_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        config_vision.get_config(arguments)


def test_the_recipes_are_those_published():
    config = config_vision.get_config("cars,large")
    assert (config.method.d, config.train.batch_size, config.train.accumulate) == (144_000, 32 * 4, 4)
    assert (config.optimizer.lr, config.optimizer.head_lr, config.optimizer.warmup) == (4e-3, 3e-3, 0.4)
    assert (config.model.dtype, config.train.epochs, config.method.dropout) == ("bfloat16", 20, 0.0)


# Transforms


def test_test_images_are_torchvisions():
    expected = np.load(DATA / "prepared.npz")
    for name in expected:
        mine = images.prepare({"image": (DATA / name).read_bytes(), "id": name}, 32).astype(float)
        assert mine.shape == (32, 32, 3)
        assert np.abs(mine - expected[name]).mean() < 1  # grey levels


RAMP = np.arange(256).reshape(16, 16)
CLEAR_RED = Image.new("P", (16, 16), 1)
CLEAR_RED.putpalette([0, 0, 0, 255, 0, 0])
RED, GREY = np.array([255, 0, 0]), np.array([128, 128, 128])


def in_format(image, form, **options):
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "stored, right",
    [
        (in_format(Image.fromarray(RAMP.astype(np.uint8)), "PNG"), RAMP),
        *[(in_format(Image.fromarray((RAMP * 257).astype(np.uint16)), form), RAMP) for form in ("PNG", "TIFF", "PPM")],
        (in_format(Image.frombytes("I;16B", (16, 16), (RAMP * 257).astype(">u2").tobytes()), "TIFF"), RAMP),
        ((RAMP * 257).astype(np.uint16), RAMP),
        (in_format(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"), RAMP),
        (in_format(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), RAMP),
        (in_format(Image.fromarray(RAMP > 99), "PNG"), (RAMP > 99) * 255),
        (in_format(Image.new("LA", (16, 16), (128, 7)), "PNG"), GREY),
        (in_format(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "PNG"), RED),
        (in_format(CLEAR_RED, "PNG", transparency=bytes([0, 9])), RED),
        (in_format(CLEAR_RED, "GIF", transparency=1), RED),
        (in_format(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"), RED),
        (in_format(CLEAR_RED, "GIF", save_all=True, append_images=[Image.new("L", (16, 16), 7)]), RED),
    ],
)
def test_pictures_of_any_depth_and_mode_are_scaled(stored, right):
    found = np.asarray(images.decode({"image": stored, "id": "x"}))
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - (right[..., None] if right.ndim == 2 else right)).max() <= 1


@pytest.mark.parametrize(
    "stored, said",
    [
        (in_format(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "32-bit integers, and nothing says which"),
        (in_format(Image.fromarray(RAMP.astype(np.float32) - 1), "TIFF"), "its floats are from -1 to 254, not"),
        (in_format(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"), "its floats are from nan to nan"),
        (in_format(Image.fromarray(RAMP.astype(np.uint8)), "TIFF")[:200], "decoded"),
        (in_format(Image.fromarray(RAMP.astype(np.uint8)), "PNG")[:50], "decoded"),
    ],
)
def test_pictures_that_would_be_guessed_are_refused_by_name(stored, said):
    with pytest.raises(ValueError, match=f"x.tif: the image can't be decoded.*{said}" if said != "decoded" else "x.tif: .*decoded"):
        images.decode({"image": stored, "id": "x.tif"})


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_upright(form, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8], upright[8:, :16] = (255, 0, 0), (0, 255, 0)
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # how the camera stored it
    stored = Image.fromarray(upright) if turned is None else Image.fromarray(upright).transpose(Image.Transpose(turned))
    (exif := Image.Exif())[0x0112] = orientation
    found = images.decode({"image": in_format(stored, form, exif=exif, quality=95), "id": "x"})
    assert found.size == (32, 16) and np.abs(np.asarray(found).astype(int) - upright).mean() < 15


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1), st.integers(0, 2**32))
def test_a_random_crop_lies_in_the_image(width, height, crop, seed):
    left, upper, right, lower = images.random_box(width, height, crop, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= upper < lower <= height
    if width == height >= 20:
        assert (right - left + 1) * (lower - upper + 1) >= crop * width * height


def test_crops_reach_everywhere_and_half_are_mirrored():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3))
    example, rng = {"image": ramp, "id": "ramp", "label": 0}, np.random.default_rng(0)
    rows = [images.augment(example, rng, size=16, crop=0.08, flip=True)["pixel_values"][8, :, 0] for _ in range(400)]
    mirrored = [bool(row[0] > row[-1]) for row in rows]
    assert 150 < sum(mirrored) < 250
    assert min(row.min() for row in rows) < 20 and max(row.max() for row in rows) > 230
    assert not any(
        row[0] > row[-1]
        for row in (
            images.augment(example, rng, size=16, crop=0.08, flip=False)["pixel_values"][8, :, 0] for _ in range(50)
        )
    )


def test_training_images_are_reproducible_and_differ_between_epochs(tfds_dir):
    task = load("cifar10", tfds_dir, holdout=0)

    def epochs(seed, **kwargs):
        batches = [batch for batch in data.train_batches(task, 8, 2, seed, **kwargs)]
        return [np.concatenate([b["pixel_values"] for b in half]) for half in (batches[:5], batches[5:])]

    first, second = epochs(0)
    again = epochs(0)
    np.testing.assert_array_equal(first, again[0])
    np.testing.assert_array_equal(second, again[1])
    assert not np.array_equal(np.sort(first, axis=None), np.sort(second, axis=None))
    assert not np.array_equal(first, epochs(1)[0])
    halves = [epochs(0, part=n, parts=2)[0] for n in (0, 1)]
    together = np.stack([half.reshape(5, 4, 16, 16, 3) for half in halves], axis=2).reshape(first.shape)
    np.testing.assert_array_equal(together, first)


def test_processes_that_decode_change_nothing(tfds_dir):
    task = load("cifar10", tfds_dir, holdout=0)
    flags.FLAGS.mark_as_parsed()  # as app.run does; Grain's processes get them
    expected = list(data.train_batches(task, 8, 1, 0))
    batches = data.train_batches(task._replace(workers=2), 8, 1, 0)
    next(batches)
    position = batches.get_state()
    rest = [next(batches)]
    resumed = data.train_batches(task._replace(workers=2), 8, 1, 0)
    resumed.set_state(position)
    for found in (rest, list(resumed)[:1]):
        np.testing.assert_array_equal(found[0]["pixel_values"], expected[1]["pixel_values"])


# Whole runs


def test_pretrain_then_adapt(tmp_path):
    config = config_vision.get_config("digits,pretrain")
    config.model.shape.update(hidden_size=16, num_layers=1, intermediate_size=32)
    config.train.epochs, config.train.batch_size, config.optimizer.lr = 12, 64, 5e-3
    base = train(config, tmp_path / "base")
    assert base["test"] > 0.4 and set(base["test_by_class"]) == set("01234")

    model, params = pretrained.load_vit(tmp_path / "base" / "model", 5, key=jax.random.key(0))
    assert model.config.image_size == 8 and params["classifier"]["kernel"].shape == (16, 5)

    config = config_vision.get_config("digits,gpart")
    config.model.source = str(tmp_path / "base" / "model")
    config.method.d, config.train.epochs = 256, 4
    results = train(config, tmp_path / "gpart")
    assert results["trained_numbers"] == 256 + 16 * 5 + 5
    lines = (tmp_path / "gpart" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 170 and json.loads(lines[0])["id"].startswith("digits test, record")
    with Image.open(tmp_path / "gpart" / "mistakes.png") as picture:
        assert picture.width > 500
    report.write(report.find_runs(tmp_path), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*.png")} >= {"by-class-digits-model.png", "mistakes-model.png"}
