"""Labelled images: how they are cropped, flipped and resized, with Pillow and NumPy, and become batches.

An example is {"image": the bytes of a file or uint8 (height, width[, 3]), "label": int, "id": what to call it}, and once it
is transformed {"pixel_values": uint8 (size, size, 3), ...}. The model normalises them.
"""

import functools
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from experiments.data import Task

RATIOS = (3 / 4, 4 / 3)  # of a random crop's width and height


def image_task(
    train: Sequence[dict],
    validation: Sequence[dict],
    test: Sequence[dict],
    *,
    labels: tuple[str, ...],
    image_size: int,
    crop: float,
    flip: bool,
    workers: int,
) -> Task:
    """A task of images, of which accuracy is the metric; see `augment` and `prepare`."""
    train_transform = functools.partial(augment, size=image_size, crop=crop, flip=flip)
    collated = functools.partial(collate, size=image_size)
    return Task(
        train, validation, test, labels, ("accuracy",), ("pixel_values",), collated, train_transform, workers=workers
    )


def augment(example: dict, rng: np.random.Generator, *, size: int, crop: float, flip: bool) -> dict:
    """The example as training sees it this time: a random resized crop, mirrored or not, as torchvision's transforms.

    Args:
      example: with an "image".
      rng: what is drawn is a function of its state alone.
      size: of the result, in pixels.
      crop: the smallest share of the image's area that a crop has (0.08 in the recipe), in (0, 1].
      flip: whether half of all images are mirrored.
    """
    image = decode(example)
    image = image.crop(random_box(*image.size, crop, rng)).resize((size, size), Image.Resampling.BILINEAR)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return example | {"pixel_values": np.asarray(image)}


def random_box(width: int, height: int, crop: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) of a crop of at least `crop` of the area, its ratio of width to height within RATIOS."""
    for _ in range(10):
        area = width * height * rng.uniform(crop, 1)
        ratio = math.exp(rng.uniform(*map(math.log, RATIOS)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, upper = rng.integers(width - across + 1), rng.integers(height - down + 1)
            return left, upper, left + across, upper + down
    across, down = (
        min(width, round(height * RATIOS[1])),
        min(height, round(width / RATIOS[0])),
    )  # the largest in the middle
    left, upper = (width - across) // 2, (height - down) // 2
    return left, upper, left + across, upper + down


def prepare(example: dict, size: int) -> np.ndarray:
    """The example as it is tested: the shorter side resized to `size`, the square in the middle; uint8 (size, size, 3)."""
    image = decode(example)
    shorter = min(image.size)
    image = image.resize([int(size * side / shorter) for side in image.size], Image.Resampling.BILINEAR)
    left, upper = (round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, upper, left + size, upper + size)))


def decode(example: dict) -> Image.Image:
    """The image in RGB, upright as its EXIF has it: grey ones too, of more than eight bits scaled, of several frames the first.

    What is transparent has the colour that is stored there, as in torchvision. Floats are of 0 to 1, or else of 0 to 255.

    Raises:
      ValueError: it can't be decoded, or nothing says what is white in it; the message names the record.
    """
    stored = example["image"]
    try:
        if isinstance(stored, np.ndarray):
            image, white = Image.fromarray(stored), 2**16 - 1
        else:
            image = Image.open(io.BytesIO(stored))
            image, white = ImageOps.exif_transpose(image), _white(image)
        if image.mode.startswith(("I", "F")):
            image = _in_eight_bits(image, white)
        return image.convert("RGBA" if "transparency" in image.info else image.mode).convert("RGB")
    except Exception as error:  # Pillow has a type for each kind of damage
        raise ValueError(
            f"{example['id']}: the image can't be decoded ({error}). Replace this record or prepare the data again."
        ) from error


def _white(image: Image.Image) -> int | None:
    """The number that is white in an opened image of integers of more than eight bits; None: nothing says it."""
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        return None
    bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] if image.format == "TIFF" else 16
    return 2**bits - 1


def _in_eight_bits(image: Image.Image, white: int | None) -> Image.Image:
    """A grey image of integers or floats, whose `convert` would cut them off at 255."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 255):  # nan neither
            raise ValueError(f"its floats are from {values.min():g} to {values.max():g}, not 0 to 1 or 0 to 255")
        white = 1 if values.max() <= 1 else 255
    if white is None:
        raise ValueError("it has 32-bit integers, and nothing says which of them is white: save it with 8 or 16 bits")
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def collate(examples: list[dict], size: int) -> dict[str, np.ndarray]:
    """Stacks examples: pixel_values uint8 (batch, size, size, 3), as `augment` made them or else by `prepare`; label int32."""
    pixels = [x["pixel_values"] if "pixel_values" in x else prepare(x, size) for x in examples]
    return {"pixel_values": np.stack(pixels), "label": np.array([example["label"] for example in examples], np.int32)}
