"""Runs one config with several seeds, one after another, each in its own folder, and prints the table of all runs.

  python -m experiments.sweep --config=configs/glue.py:rte,minilm --seeds=3 --workdir=runs/glue

Stop it at any time and run it again: finished runs are kept, and an unfinished one goes on. Give other tasks and methods the
same workdir, and they join the table.
"""

import pathlib

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from experiments import report
from experiments.logger import quiet
from experiments.train import train


def run_directory(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Where a run of this config belongs: workdir/glue-sst2/roberta-base/gpart-d23040/seed42."""
    source = pathlib.Path(config.model.source).name
    return (
        workdir
        / config.task.name.replace("/", "-")
        / source
        / report.label(config.method, "{}-{}{}")
        / f"seed{config.seed}"
    )


def parse_seeds(text: str) -> list[int]:
    """ "3" means 0, 1, 2; "42,43" and "42," mean just these.

    Raises:
      ValueError: anything else.
    """
    try:
        if "," in text:
            seeds = [int(word) for word in text.split(",") if word.strip()]
        else:
            seeds = list(range(int(text)))
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={text!r} must be how many (3) or which (42,43,44).")
    return seeds


def main(_):
    quiet()
    workdir = pathlib.Path(flags.FLAGS.workdir)
    config = flags.FLAGS.config
    for seed in parse_seeds(flags.FLAGS.seeds):
        config.seed = seed  # and with it what refers to it, as the partition's in configs/glue.py
        directory = run_directory(config, workdir)
        print(f"\n{directory}")
        train(config, directory)
    print("\n" + report.markdown(report.find_runs(workdir)))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/glue.py", "What to train: a file of configs/.")
    flags.DEFINE_string("workdir", None, "Directory for the folders of all runs.", required=True)
    flags.DEFINE_string("seeds", "3", "How many seeds (3: 0, 1, 2), or which (42,43,44).")
    app.run(main)
