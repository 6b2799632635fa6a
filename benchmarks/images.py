"""Does the input keep up? Training images a second of the pipeline alone, against what the model trains on a second.

  python -m benchmarks.images --config=configs/vision.py:cars,base --batch=8

The images are JPEGs of 500 x 375 pixels, made here, in memory: reading a disk is not in it. The model has random weights.
"""

import io
import statistics
import time

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from PIL import Image

from benchmarks.glue_step import draw
from experiments.abstract import describe
from experiments.command import run_command
from experiments.config import from_flags
from experiments.data import train_batches
from experiments.images import image_task
from gpart_jax import sharding
from gpart_jax.methods import from_spec

EXAMPLES = 256


def make_jpegs() -> list[dict]:
    """Smooth noise, which compresses to about as many bytes as a photograph does."""
    random, made = np.random.default_rng(0), []
    for number in range(EXAMPLES):
        coarse = Image.fromarray(random.integers(0, 256, (38, 50, 3), np.uint8)).resize((500, 375), Image.BICUBIC)
        grain = np.asarray(coarse) + random.normal(0, 8, (375, 500, 3))
        buffer = io.BytesIO()
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        made.append({"image": buffer.getvalue(), "label": number % 2, "id": f"image {number}"})
    return made


def pipeline_rates(task, batch_size: int, seconds: float) -> list[float]:
    """Images a second, of each of five parts of the time; what fills the buffers first isn't counted."""
    batches = train_batches(task, batch_size, 10**6, 0)
    for _ in range(1 + 16 // batch_size * 8):
        next(batches)
    rates = []
    for _ in range(5):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 5:
            count += len(next(batches)["label"])
        rates.append(count / (time.perf_counter() - start))
    return rates


def model_rates(config, steps: int) -> list[float]:
    """Images a second that the training step takes, of each step."""
    step, arguments, *_ = describe(config, sharding.make_mesh())
    compiled = step.lower(*arguments).compile()
    method = from_spec(config.method.to_dict(), config.head_targets)
    tables = sharding.replicate(method.tables(arguments[2]), jax.tree.leaves(arguments[2])[0].sharding.mesh)
    trainable, state, *rest = draw(arguments)
    rates = []
    for number in range(steps + 1):
        start = time.perf_counter()
        trainable, state, numbers = compiled(trainable, state, *rest, number, tables)
        numbers["loss"].block_until_ready()
        rates.append(config.train.batch_size / (time.perf_counter() - start))
    return rates[1:]


def show(name: str, rates: list[float]) -> None:
    print(
        f"{name}: {statistics.median(rates):,.1f} images a second (median; {min(rates):,.1f} to {max(rates):,.1f})",
        flush=True,
    )


def main(_):
    config, batch = from_flags(), flags.FLAGS.batch
    if batch is not None:
        config.train.batch_size, config.train.accumulate = batch, 1
    examples = make_jpegs()
    options = dict(labels=("0", "1"), image_size=config.task.image_size, crop=config.task.crop, flip=config.task.flip)
    print(f"{np.mean([len(example['image']) for example in examples]) / 1000:.0f} kB an image")
    found = {}
    for workers in flags.FLAGS.workers:
        task = image_task(examples, [], [], **options, workers=int(workers))
        name = f"pipeline, {workers} processes" if int(workers) else "pipeline, threads"
        found[name] = pipeline_rates(task, min(EXAMPLES, config.train.batch_size), flags.FLAGS.seconds)
        show(name, found[name])
    device = jax.devices()[0].device_kind
    trained = model_rates(config, flags.FLAGS.steps)
    show(
        f"{config.model.source}, {config.method.name}, {config.model.dtype}, batch {config.train.batch_size}, {device}",
        trained,
    )
    for name, rates in found.items():
        print(f"{name}: {statistics.median(rates) / statistics.median(trained):,.1f} x the model's rate")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/vision.py:cars,base", "A config of configs/vision.py.")
    flags.DEFINE_integer("batch", None, "Images of a batch; none: the config's.", lower_bound=1)
    flags.DEFINE_list("workers", ["0", "2"], "How many processes decode, each in turn; 0: threads.")
    flags.DEFINE_float("seconds", 10, "How long each pipeline is timed.", lower_bound=0.1)
    flags.DEFINE_integer("steps", 5, "How many steps the model is timed for.", lower_bound=1)
    run_command(main)
