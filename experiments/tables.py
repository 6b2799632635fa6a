"""The paper's tables: what each would cost; then every run of it, and the table filled.

  python -m experiments.tables --table=glue --size=base --dry --workdir=runs/glue     each run's command, steps and device-hours
  python -m experiments.tables --table=glue --size=base --workdir=runs/glue           trains them all; writes runs/glue/table.md
  python -m experiments.tables --table=glue --size=minilm --tasks=sst2 --methods=gpart,lora --limit=1024 --seeds=2 --workdir=runs/quick

Sizes: glue base, large; vision base, large; math a model's name. minilm, small and smollm2 are stand-ins that two CPU cores can train,
and are named so in what is printed. --dry loads neither data nor weights, and estimates with the package libtpu. Stop a run at any time
and start it again: what is finished is kept. The printed commands fill the same folders, perhaps on other machines.
"""

import csv
import importlib.util
import math
import pathlib
import shlex
import subprocess
import sys
from typing import NamedTuple

import ml_collections
from absl import flags

from configs import common, glue, vision
from configs import math as reasoning
from experiments import report
from experiments.command import run_command
from experiments.config import parse_mesh
from experiments.data import HOLDOUT_MINIMUM
from experiments.logger import quiet
from experiments.sweep import make_runs, parse_seeds
from experiments.workdir import local
from experiments.workers import Planned, run_all

# How many examples there are to train on, before any are held out.
SPLITS = {row["task"]: row for row in csv.DictReader((pathlib.Path(__file__).parent / "splits.csv").read_text().splitlines())}
OWN_VALIDATION = ("flowers102", "dtd", "aircraft")  # which hold out none to choose the epoch
BENCHMARKS = {"metamathqa": ("gsm8k", "math"), "gsm8k": ("gsm8k",), "problems": ("problems",)}  # by what was trained on


class Table(NamedTuple):
    models: dict[str, str]  # by size
    stand_in: str  # the size that isn't the paper's
    tasks: tuple[str, ...]
    stand_in_tasks: tuple[str, ...]
    methods: tuple[str, ...]
    mesh: str  # for which steps are estimated: chips of one host that have the memory


TABLES = {
    "glue": Table(glue.MODELS, "minilm", tuple(glue.LORA_EPOCHS), tuple(glue.SMALL), common.METHODS, "data:4"),
    "vision": Table(
        vision.MODELS | {"small": "a small ViT, made here"}, "small", tuple(name for name in vision.DATASETS if name != "folder"),
        tuple(vision.SMALL), common.METHODS, "data:4",
    ),
    "math": Table(
        {size: source for size, (source, _) in reasoning.MODELS.items() if size != "llama32_3b"}, "smollm2", ("metamathqa",), ("gsm8k", "problems"),
        reasoning.METHODS, "data:4,tensor:2",
    ),
}  # fmt: skip


class Row(NamedTuple):
    task: str
    method: str
    runs: list[Planned]  # one a seed
    steps: int  # of each
    command: str  # that trains just these


def rows_of(options) -> list[Row]:
    """The rows that the flags (`options`) ask for, by task, then by method.

    Raises:
      ValueError: a size, task or method that the table doesn't have; too few examples for a batch.
    """
    table = TABLES[options.table]
    _chosen("size", [options.size], table.models)
    tasks = _chosen("tasks", options.tasks, table.stand_in_tasks if options.size == table.stand_in else table.tasks)
    return [_row(options, task, method) for task in tasks for method in _chosen("methods", options.methods, table.methods)]


def _chosen(flag: str, given: list[str], known) -> list[str]:
    """What is given of the known, in their order; all of them where nothing is."""
    if unknown := [word for word in given if word not in known]:
        raise ValueError(f"--{flag}: {unknown[0]!r} is none of {', '.join(known)}.")
    return [word for word in known if word in given or not given]


def _row(options, task: str, method: str) -> Row:
    words = ",".join([options.size, task, method] if options.table == "math" else [task, options.size, method])
    config = {"glue": glue, "vision": vision, "math": reasoning}[options.table].get_config(words)
    more = [f"--config.mesh.{axis}={size}" for axis, size in parse_mesh(options.mesh).items()] if options.mesh else []
    config.mesh.update(parse_mesh(options.mesh) if options.mesh else {})
    if options.data_dir and task == "aircraft":
        config.task.data_dir = str(pathlib.Path(options.data_dir, task))
        more.append(f"--config.task.data_dir={config.task.data_dir}")
    sweeps = [
        f"task.{key}={options.limit}"  # as if swept, so that the folder says it
        for key in ("train_examples", "test_examples")
        if options.limit and key in config.task and options.limit < (config.task[key] or int(SPLITS[config.task.name]["examples"]))
    ]
    runs = make_runs(config, sweeps, parse_seeds(options.seeds), local(options.workdir))
    command = ["python", "-m", "experiments.sweep", f"--config=configs/{options.table}.py:{words}", *more]
    command += [word for sweep in sweeps for word in ("--sweep", sweep)] + [f"--seeds={options.seeds}"]
    command += [f"--population={options.population}"] if options.population > 1 else []
    return Row(task, method, runs, steps_of(runs[0].config), shlex.join([*command, f"--workdir={options.workdir}"]))


def training_examples(config: ml_collections.ConfigDict) -> int:
    """How many examples a run trains on: those published, without those that its task holds out."""
    task, count = config.task, int(SPLITS[config.task.name]["examples"])
    if task.name in BENCHMARKS:
        held = (task.test_examples if task.name == "metamathqa" else 0) + (task.validation_examples or 0)
        return min(task.train_examples or count, count - held)
    count = min(task.train_examples or count, count)
    if task.name in OWN_VALIDATION or not task.holdout:
        return count
    return count - max(round(task.holdout * count), HOLDOUT_MINIMUM if task.name.startswith("glue/") else 0)


def steps_of(config: ml_collections.ConfigDict) -> int:
    """Of a run. A ValueError if its examples don't fill a batch."""
    examples, batch = training_examples(config), config.train.batch_size
    if examples < batch:
        left = f"{config.task.name} {max(0, examples)} examples to train on beside those held out"
        raise ValueError(f"--limit leaves {left}, but a batch has {batch}. Give more.")
    return config.train.epochs * (examples // batch)


def dry_table(options, rows: list[Row]) -> str:
    """Each row's steps, estimate and command, in Markdown; the total; what the estimate is."""
    from launch.cycles import CHIPS  # here, because a worker does without
    from launch.estimate import estimate

    chip, mesh = options.chip, options.mesh or TABLES[options.table].mesh
    configs, found = [row.runs[0].config for row in rows], ["the TPU's compiler is missing: pip install libtpu."] * len(rows)
    if importlib.util.find_spec("libtpu"):
        found = estimate(configs, chip, mesh, local(options.workdir) / "estimates.json")
    chips, clock, hours = math.prod(parse_mesh(mesh).values()), CHIPS[chip].clock, []
    lines = ["| task | method | runs | steps of a run | M cycles a step | device-hours | command |", "|---|---|---:|---:|---:|---:|---|"]
    for row, cycles in zip(rows, found):
        cells = " | "
        if isinstance(cycles, int):
            hours.append(cycles * row.steps * len(row.runs) * chips / clock / 3600)
            cells = f"{cycles / 1e6:,.1f} | {hours[-1]:,.2f}"
        lines.append(f"| {row.task} | {row.method} | {len(row.runs)} | {row.steps:,} | {cells} | `{row.command}` |")
    runs, steps = sum(len(row.runs) for row in rows), sum(row.steps * len(row.runs) for row in rows)
    total = f"{sum(hours):,.1f} device-hours" if hours else "device-hours unknown"
    of = f" for the {len(hours)} of {len(rows)} rows that have an estimate" if 0 < len(hours) < len(rows) else ""
    lines += ["", f"**In all: {runs} runs, {steps:,} steps, {total}{of}.**", ""]
    lines += [f"- No estimate: {reason}" for reason in dict.fromkeys(found) if isinstance(reason, str)]
    if hours:
        longest = "" if options.table == "vision" else " A text counts as the longest allowed: shorter ones take less."
        lines.append(
            f"- Estimated, not measured: the cycles of a training step, compiled ahead of time for {chips} {chip} ({mesh}), times steps, "
            f"runs and chips, at {clock / 1e9:g} GHz (for the clock's source see launch/cycles.py).{longest} Left out: communication "
            "between chips, input, evaluation, answers to benchmarks, start and compilation."
        )
    splits = [SPLITS[name] for name in dict.fromkeys(config.task.name for config in configs)]
    counts = "; ".join(f"{split['task']} {int(split['examples']):,} ({split['source']})" for split in splits)
    lines.append(f"- Examples to train on, before any are held out: {counts}.")
    for task in dict.fromkeys(row.task for row in rows):
        for name in BENCHMARKS.get(task, ()):
            lines.append(f"- Then, of each run on {task}: `python -m experiments.evaluate --workdir=<its folder> --benchmark={name}`.")
        if options.size == "small":
            lines.append(f"- Before: `python -m experiments.train --config=configs/vision.py:{task},pretrain --workdir=runs/{task}/base`.")
    return "\n".join([title(options), "", *lines]) + "\n"


def title(options) -> str:
    """Whose table it is: the paper's, or a stand-in's, which is none of it."""
    table = TABLES[options.table]
    text = f"# The {options.table} table: {table.models[options.size]}"
    if options.size == table.stand_in:
        paper = ", ".join(model for size, model in table.models.items() if size != table.stand_in)
        text += f", a stand-in\n\nIt stands in for the paper's {paper}: none of its figures belongs in the paper's table."
    return text + (f"\n\nA quick try: no more than {options.limit:,} examples of each task." if options.limit else "")


def train_all(options, rows: list[Row]) -> dict[pathlib.Path, str]:
    """Trains what isn't finished, then has benchmarks answered. The folders of what failed, each with its error in a line."""
    failures, workdir = {}, local(options.workdir)
    if options.size == "small":  # which adapts models of our own, made on other classes
        tasks, folder = dict.fromkeys(row.task for row in rows), pathlib.Path("runs")
        failures |= run_all([Planned(vision.get_config(f"{task},pretrain"), folder / task / "base") for task in tasks], 1, folder)
    failures |= run_all([run for row in rows for run in row.runs], options.jobs, workdir, options.population)
    folders = [run.directory / name for row in rows for run in row.runs for name in BENCHMARKS.get(row.task, ())]
    todo = [folder for folder in folders if (folder.parent / "results.json").exists() and not (folder / "results.json").exists()]
    for number, folder in enumerate(todo, 1):
        error = _answer(options, folder)
        failures |= {folder: error} if error else {}
        print(f"[{number}/{len(todo)}] {folder}  {f'failed: {error}' if error else 'answered'}", flush=True)
    return failures


def _answer(options, folder: pathlib.Path) -> str | None:
    """Has a run answer a benchmark, run/benchmark, in a process of its own. The last line of its error, if there was one."""
    command = [sys.executable, "-m", "experiments.evaluate", f"--workdir={folder.parent}", f"--benchmark={folder.name}"]
    command += [f"--limit={options.limit}"] if options.limit else []
    command += [f"--mesh={options.mesh}"] if options.mesh else []
    command += [f"--data_dir={pathlib.Path(options.data_dir, 'math')}"] if options.data_dir and folder.name == "math" else []
    log = folder.with_suffix(".txt")
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    return (log.read_text().strip().splitlines() or [f"code {code}"])[-1] if code else None


def filled(options, rows: list[Row]) -> str:
    """The table of all finished runs of the rows' models in the workdir, beside published figures."""
    models = {row.runs[0].config.model.source for row in rows}
    try:
        table = report.markdown([run for run in report.find_runs(local(options.workdir)) if run.config["model.source"] in models])
    except (ValueError, FileNotFoundError) as error:  # runs that don't go into one table, or none
        table = f"No table: {error}\n"
    return f"{title(options)}\n\n{table}"


def main(_):
    quiet()
    options, path, rows = flags.FLAGS, local(flags.FLAGS.workdir) / "table.md", rows_of(flags.FLAGS)
    if options.dry:
        print(f"\n{dry_table(options, rows)}")
        return
    failures = train_all(options, rows)
    text = filled(options, rows)
    path.write_text(text)
    print(f"\n{text}\n{path}")
    if failures:
        print(f"{len(failures)} failed. The same command tries them again; error.txt, or a benchmark's .txt, has more:")
        print(*(f"{directory}  {error}" for directory, error in failures.items()), sep="\n")
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_enum("table", None, list(TABLES), "Which of the paper's tables.", required=True)
    flags.DEFINE_string("size", None, "; ".join(f"{name}: {', '.join(table.models)}" for name, table in TABLES.items()), required=True)
    flags.DEFINE_string("workdir", None, "Folder for the runs' folders, table.md and estimates.json.", required=True)
    flags.DEFINE_bool("dry", False, "Train nothing: list the runs, and what they would cost.")
    flags.DEFINE_enum("chip", "v5e", ["v5e", "v5p", "v6e"], "Of --dry: for which TPU.")
    flags.DEFINE_string("mesh", None, "As data:4,tensor:2; none: that of a run's config, of --dry a few chips.")
    flags.DEFINE_list("tasks", [], "Some of the table's tasks (of math: what is trained on); none: all.")
    flags.DEFINE_list("methods", [], "Some of the config's methods; none: all.")
    flags.DEFINE_string("seeds", "5", "How many seeds (5: 0 to 4), or which (42,43,44).")
    flags.DEFINE_integer("limit", None, "A quick try: at most so many examples to train on, and problems to answer.", lower_bound=1)
    flags.DEFINE_string("data_dir", None, "Folder of what TFDS doesn't have: aircraft/ and math/ (MATH's files).")
    flags.DEFINE_integer("jobs", 1, "Runs at once, as a sweep's.", lower_bound=1)
    flags.DEFINE_integer("population", 1, "Seeds that are trained as one program, as a sweep's.", lower_bound=1)
    run_command(main)
