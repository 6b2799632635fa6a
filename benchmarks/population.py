"""Several runs as one population against the same runs one after another, in one process: seconds, and their ratio.

  python -m benchmarks.population --config=configs/quickstart.py --config.train.epochs=1 --members=5

Both take in everything: loading, compiling, training, testing. Members differ in their seeds. The population goes first, into
a cold process.
"""

import copy
import json
import pathlib
import statistics
import tempfile
import time

from absl import flags
from ml_collections import config_flags

from benchmarks.measure import Table, save
from experiments.command import run_command
from experiments.config import from_flags
from experiments.logger import quiet
from experiments.population import train_population
from experiments.train import train


def main(_):
    quiet()
    configs = []
    for seed in range(flags.FLAGS.members):
        config = copy.deepcopy(from_flags())
        config.seed = seed
        if flags.FLAGS.examples:
            with config.unlocked():
                config.task.train_examples = flags.FLAGS.examples
        configs.append(config.copy_and_resolve_references())
    with tempfile.TemporaryDirectory() as folder:
        together, alone = (
            [pathlib.Path(folder) / name / str(c.seed) for c in configs] for name in ("together", "alone")
        )
        start = time.perf_counter()
        train_population(configs, together)
        middle = time.perf_counter()
        for config, workdir in zip(configs, alone):
            train(config, workdir)
        seconds = {"together": middle - start, "one after another": time.perf_counter() - middle}
        table = Table(f"{len(configs)} runs", "seconds", "over one after another", "a step of one, s", "test")
        for (name, total), workdirs in zip(seconds.items(), (together, alone)):
            results = [json.loads((workdir / "results.json").read_text()) for workdir in workdirs]
            step = statistics.median(result["seconds_per_step"] for result in results)
            tests = ", ".join(f"{result['test']:.4f}" for result in results)
            table.add(name, f"{total:.1f}", f"{total / seconds['one after another']:.2f}", f"{step:.4f}", tests)
    save(table, seconds=seconds)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What to train: a file of configs/.")
    flags.DEFINE_integer("members", 5, "How many runs.", lower_bound=2)
    flags.DEFINE_integer("examples", None, "To train on, the first so many; none: all.", lower_bound=1)
    run_command(main)
