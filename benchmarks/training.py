"""Whole trainings of a recipe: the test score, seconds a step, and seconds in all, loading and compiling included.

  python -m benchmarks.training --recipe=quickstart --methods=gpart,lora,head
  python -m benchmarks.training --recipe=sst2 --data_dir=../shared/tfds

`quickstart` is configs/quickstart.py; `sst2` is configs/glue.py:sst2,minilm, for which TFDS's glue/sst2 must be prepared. With
--made_up its examples are made here, so that nothing is needed: its score then means nothing.
"""

import pathlib
import tempfile
import time

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from tensorflow_datasets.text.glue import Glue

from benchmarks.measure import Table, save
from configs import glue, quickstart
from experiments.command import run_command
from experiments.logger import quiet
from experiments.train import train

RECIPES = {
    "quickstart": quickstart.get_config,
    "sst2": lambda method: glue.get_config(f"sst2,minilm,{method}"),
}


class MadeUpGlue(Glue, skip_registration=True):
    """TFDS's GLUE with 64 sentences of SST-2 that are made here: good where the label is 1, else bad."""

    name = "glue"

    def _split_generators(self, dl_manager):
        return {"train": self._sentences(64), "validation": self._sentences(16), "test": self._sentences(16)}

    def _sentences(self, count):
        random = np.random.default_rng(count)
        for n in range(count):
            words = [("bad", "good")[n % 2], *random.choice(["film", "plot", "cast", "scene"], 3)]
            yield n, {"sentence": " ".join(words), "label": n % 2, "idx": n}


def main(_):
    quiet()
    options = flags.FLAGS
    columns = "method", "trained numbers", "test", "best epoch", "steps", "seconds a step", "seconds in all"
    table, results = Table(*columns), {}
    with tempfile.TemporaryDirectory() as folder:
        if options.made_up:
            tfds.disable_progress_bar()
            MadeUpGlue(config="sst2", data_dir=f"{folder}/tfds", file_format="array_record").download_and_prepare()
        for method in options.methods:
            config = RECIPES[options.recipe](method)
            config.seed = options.seed
            if options.epochs:
                config.train.epochs = options.epochs
            with config.unlocked():
                if options.examples or options.made_up:
                    config.task.train_examples = options.examples or 64
                if options.made_up or options.data_dir:
                    config.task.data_dir = f"{folder}/tfds" if options.made_up else options.data_dir
            start = time.perf_counter()
            found = results[method] = train(config, pathlib.Path(folder) / method, jax.devices()[:1])
            seconds = time.perf_counter() - start
            table.add(method, f"{found['trained_numbers']:,}", f"{found['metric']} {found['test']:.4f}", found["best_epoch"],
                      f"{found['steps']:,}", f"{found['seconds_per_step']:.4f}", f"{seconds:.1f}")  # fmt: skip
            save(table, results=results)


if __name__ == "__main__":
    flags.DEFINE_enum("recipe", "quickstart", list(RECIPES), "What is trained.")
    flags.DEFINE_list("methods", ["gpart"], "Methods of the recipe, one after another.")
    flags.DEFINE_integer("seed", 42, "Of the runs.")
    flags.DEFINE_integer("epochs", None, "None: the recipe's.", lower_bound=1)
    flags.DEFINE_integer("examples", None, "To train on, the first so many; none: all.", lower_bound=1)
    flags.DEFINE_string("data_dir", None, "Where TFDS keeps glue/sst2; none: TFDS_DATA_DIR or ~/tensorflow_datasets.")
    flags.DEFINE_bool("made_up", False, "Make glue/sst2 up.")
    run_command(main)
