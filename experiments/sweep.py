"""Runs a grid of configs with several seeds, each run in its own folder, and prints the table of all runs.

  python -m experiments.sweep --config=configs/glue.py:sst2,minilm --sweep method.d=256,1024,4096 \\
      --sweep optimizer.lr=1e-3,5e-3 --seeds=5 --workdir=runs/glue

Values are Python's, or strings; a list may hold what has commas: --sweep 'method.targets=["a|b", "c"]'. A config file may
bring its own grid, as config.sweep = [("method.d", (256, 1024)), ...]; a key given here replaces the same key there.

--population=5 trains five runs that differ in nothing but seeds and learning rates in one program (experiments/population.py).

Stop it at any time and run it again: finished runs are kept, unfinished ones go on, failed ones (error.txt in their folders)
are tried again. Give other tasks and methods the same workdir, and they join the table.
"""

import ast
import copy
import difflib
import itertools
import pathlib
import re
import sys
import zlib

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments import report
from experiments.command import run_command
from experiments.config import flatten, from_flags, settle_length, settle_rate
from experiments.logger import quiet
from experiments.workdir import local
from experiments.workers import Planned, run_all


def make_runs(
    config: ml_collections.ConfigDict, sweeps: list[str], seeds: list[int], workdir: pathlib.Path
) -> list[Planned]:
    """The runs of a grid, those of one cell that differ in their seed beside each other.

    Args:
      config: the runs' common config; its section `sweep`, where it has one, is [(key, values), ...].
      sweeps: more of them, each as "method.d=256,1024".
      seeds: for each cell of the grid.
      workdir: for the runs' folders.

    Raises:
      ValueError: an unknown key; a value that doesn't fit it; two runs in one folder.
    """
    config = copy.deepcopy(config)
    grid = {}
    if "sweep" in config:
        grid = dict(config.sweep)
        with config.unlocked():
            del config.sweep
    given = [parse_sweep(text) for text in sweeps]
    if len(dict(given)) < len(given):
        raise ValueError(f"--sweep has a key twice: {', '.join(key for key, _ in given)}. Give all its values at once.")
    grid |= dict(given)
    _check_grid(grid, config)

    runs = {}
    for values in itertools.product(*grid.values()):
        cell = copy.deepcopy(config)
        for key, value in zip(grid, values):
            try:
                cell.update_from_flattened_dict({key: value})
            except TypeError as error:
                raise ValueError(f"config.{key} cannot be {value!r}: {error}.") from error
        settle_rate(cell, grid)
        settle_length(cell, grid)
        for seed in seeds:
            cell.seed = seed  # and with it what refers to it, as the partition's in configs/glue.py
            run = Planned(cell.copy_and_resolve_references(), run_directory(cell, workdir, tuple(grid)))
            if run.directory in runs:
                raise ValueError(f"Two runs of the grid would be {run.directory}. Does a key have a value twice?")
            runs[run.directory] = run
    return list(runs.values())


def parse_sweep(text: str) -> tuple[str, list]:
    """ "method.d=256,1024" -> ("method.d", [256, 1024]).

    Raises:
      ValueError: it is anything else, or a value is empty.
    """
    key, equals, written = text.partition("=")
    try:
        values = ast.literal_eval(written.strip())
        values = list(values) if isinstance(values, list | tuple) else [values]
    except (ValueError, SyntaxError):
        values = [_literal(word.strip()) for word in written.split(",")]
        if written.strip().startswith("["):
            raise ValueError(f"--sweep {text}: this is no list as Python has them.") from None
    if not equals or not values or "" in values:
        raise ValueError(f"--sweep {text!r} must be a key of the config and its values, as in method.d=256,1024.")
    return key.strip(), values


def _literal(word: str):
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def _check_grid(grid: dict, config: ml_collections.ConfigDict) -> None:
    known = flatten(config.to_dict())
    for key, values in grid.items():
        if key == "seed":
            raise ValueError("The seed is swept by --seeds.")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(sorted(known))}."
            raise ValueError(f"The config has no key {key!r} to sweep. {hint}")
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"config.sweep must give {key!r} a tuple of values, not {values!r}.")


def run_directory(config: ml_collections.ConfigDict, workdir: pathlib.Path, swept: tuple[str, ...]) -> pathlib.Path:
    """Where a run of this config belongs: workdir/glue-sst2/roberta-base/gpart-d23040/optimizer.lr=0.005/seed42."""
    method, values, form = config.method.to_dict(), flatten(config.to_dict()), "{}-{}{}"
    label = report.label(method, form)
    directory = workdir / config.task.name.replace("/", "-") / pathlib.Path(config.model.source or "fresh").name / label
    for key in swept:
        section, _, name = key.rpartition(".")
        if section != "method" or report.label(method | {name: None}, form) == label:  # the label doesn't show it
            directory /= f"{key}={_in_path(values[key])}"
    return directory / f"seed{config.seed}"


def _in_path(value) -> str:
    """The value, with a checksum where it cannot be written as it is."""
    text = str(value)
    safe = re.sub(r"[^\w.+-]", "-", text)[:60]
    return safe if safe == text else f"{safe}-{zlib.crc32(text.encode()):08x}"


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
    workdir = local(flags.FLAGS.workdir)
    runs = make_runs(from_flags(), flags.FLAGS.sweep, parse_seeds(flags.FLAGS.seeds), workdir)
    failures = run_all(runs, flags.FLAGS.jobs, workdir, flags.FLAGS.population)
    try:
        table = report.markdown(report.find_runs(workdir))
    except (ValueError, FileNotFoundError) as error:  # runs that don't go into one table, or none
        table = f"No table: {error}\n"
    print(f"\n{table}")
    if failures:
        print(f"{len(failures)} of {len(runs)} runs failed. The same command tries them again; error.txt has more:")
        for directory, error in failures.items():
            print(f"{directory}  {error}")
        sys.exit(1)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/glue.py", "What to train: a file of configs/.")
    flags.DEFINE_multi_string(
        "sweep", [], "A key of the config and its values: method.d=256,1024. Several make a grid."
    )
    flags.DEFINE_string("workdir", None, "Directory for the folders of all runs.", required=True)
    flags.DEFINE_string("seeds", "3", "How many seeds (3: 0, 1, 2), or which (42,43,44).")
    flags.DEFINE_integer("jobs", 1, "Runs at once. They share the GPUs; a TPU serves one.", lower_bound=1)
    flags.DEFINE_integer(
        "population", 1, "Runs that differ in seeds or rates alone and are trained as one program.", lower_bound=1
    )
    run_command(main)
