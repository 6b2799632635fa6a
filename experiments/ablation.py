"""One step's length for every d? The hypothesis tested: rates searched for each d and each baseline, then five seeds, on three tasks.

  python -m experiments.ablation --tasks=vader,sst2,fashion --budget=full --workdir=runs/ablation
  python -m experiments.report --workdir=runs/ablation/vader --out=docs/results/vader       its tables and plots
  python -m experiments.ablation --rate_free --workdir=runs/ablation                        the same, and optimizers that need no rate

A search trains one seed with each value, and takes the best on held-out data; the test set chooses nothing. While the best lies at an edge of
the values, another is tried, a factor 2 beyond. The length that is best on the mean of all d is trained with all seeds too, beside each d's
own. Stop it at any time and run it again: finished runs are kept.

--rate_free trains Prodigy and DoG beside the searched length, all with all seeds, for some d and at two lengths of training. They start
from config.optimizer.start, a share of |W0| that isn't searched.
"""

import pathlib
import statistics
from typing import NamedTuple

import ml_collections
from absl import flags

from configs import glue, quickstart, vision
from experiments import report
from experiments.command import run_command
from experiments.config import RATE_FREE
from experiments.logger import quiet
from experiments.sweep import make_runs
from experiments.train import train
from experiments.workdir import local, read_json, write_json
from experiments.workers import Planned, run_all

BASELINES = ("lora", "uni_lora", "vera", "fastfood", "bitfit", "full", "head")
RATE_FREE_SIZES = (256, 4096)  # d at which optimizers without a rate are tried
SHORT = 3  # times shorter is the second training
FURTHER = 3  # values at most that a search tries beyond those given
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of a baseline's rate in its config


class Budget(NamedTuple):
    sizes: tuple[int, ...]  # d
    steps: tuple[float, ...]  # lengths, a factor 2 apart
    seeds: int


BUDGETS = {
    "full": Budget((16, 64, 256, 1024, 4096, 16_384, 65_536), (0.64, 1.28, 2.56, 5.12, 10.24), 5),
    "small": Budget((64, 1024, 16_384), (1.28, 2.56, 5.12), 2),
}


def vader(method: str) -> ml_collections.ConfigDict:
    config = quickstart.get_config(method)
    if "seed" in config.method:
        config.method.seed = config.get_oneway_ref("seed")  # another partition with each seed, as the other tasks have it
    return config


def sst2(method: str) -> ml_collections.ConfigDict:
    config = glue.get_config(f"sst2,minilm,{method}")
    config.task.train_examples, config.task.holdout = 2048, 0.5  # 1,024 are trained on, in 96 steps, and as many choose
    config.task.max_length = 32  # of the test sentences a quarter is cut
    config.model.dropout = 0.0
    if "dropout" in config.method:
        config.method.dropout = 0.0
    config.train.validate_every = 96  # at the end alone
    return config


def fashion(method: str) -> ml_collections.ConfigDict:
    config = vision.get_config(f"fashion_mnist,{method}")
    config.task.train_examples = 4096
    return config


TASKS = {"vader": vader, "sst2": sst2, "fashion": fashion}


class Line(NamedTuple):
    """A method at a size, and the key whose values are searched."""

    config: ml_collections.ConfigDict
    key: str
    values: tuple[float, ...]
    name: str


def lines_of(task: str, budget: Budget) -> list[Line]:
    """GPart at each d by the length of a step, and each baseline by its rate; the head alone by the head's."""
    lines = []
    for d in budget.sizes:
        config = TASKS[task]("gpart")
        config.method.d = d
        lines.append(Line(config, "optimizer.step", budget.steps, f"gpart, d = {d:,}"))
    for method in BASELINES:
        config = TASKS[task](method)
        key = "optimizer.head_lr" if method == "head" else "optimizer.lr"
        rate = config.optimizer[key.rpartition(".")[2]]
        lines.append(Line(config, key, tuple(rate * factor for factor in FACTORS), method))
    return lines


def runs_of(line: Line, values: tuple[float, ...], seeds: int, workdir: pathlib.Path) -> list[Planned]:
    return make_runs(line.config, [f"{line.key}={list(values)}"], list(range(seeds)), workdir)


def results(run: Planned) -> dict:
    return read_json(run.directory / "results.json")


def finish(runs: list[Planned], jobs: int, workdir: pathlib.Path, population: int) -> None:
    """Trains what isn't trained yet of runs, in which one may stand twice.

    Raises:
      ValueError: a run failed; the others are kept.
    """
    if failures := run_all(list({run.directory: run for run in runs}.values()), jobs, workdir, population):
        directory, error = next(iter(failures.items()))
        raise ValueError(f"{len(failures)} runs failed, the first in {directory}: {error}. The same command tries them again.")


def search(lines: list[Line], jobs: int, workdir: pathlib.Path) -> list[dict[float, float]]:
    """Of each line the held-out metric by value, in their order."""
    for further in range(FURTHER + 1):
        runs = [runs_of(line, line.values, 1, workdir) for line in lines]
        finish(sum(runs, []), jobs, workdir, max(len(line.values) for line in lines))
        scores = [{value: results(run)["validation"] for value, run in zip(line.values, own)} for line, own in zip(lines, runs)]
        of_steps = [own for line, own in zip(lines, scores) if line.key == "optimizer.step"]
        more = [_beyond(own) | (_beyond(mean_over(of_steps)) if line.key == "optimizer.step" else set()) for line, own in zip(lines, scores)]
        wider = [line._replace(values=tuple(sorted({*line.values} | values))) for line, values in zip(lines, more)]
        if wider == lines or further == FURTHER:
            return scores
        lines = wider


def _beyond(scores: dict[float, float]) -> set[float]:
    """What to try next: where the best value is the lowest or the highest, one a factor 2 beyond."""
    best, values = max(scores, key=scores.get), sorted(scores)
    return ({best / 2} if best == values[0] else set()) | ({best * 2} if best == values[-1] else set())


def mean_over(scores: list[dict[float, float]]) -> dict[float, float]:
    """The mean over lines, by each value that all of them have."""
    shared = sorted(set.intersection(*map(set, scores)))
    return {value: statistics.mean(of_line[value] for of_line in scores) for value in shared}


def ablate(task: str, budget: Budget, workdir: pathlib.Path, jobs: int) -> dict:
    """Trains what isn't trained yet; what was found, as written to `workdir/found.json`.

    Raises:
      ValueError: a run failed; the others are kept.
    """
    lines = lines_of(task, budget)
    grid = search(lines, jobs, workdir)
    best = [max(scores, key=scores.get) for scores in grid]
    means = mean_over([scores for line, scores in zip(lines, grid) if line.key == "optimizer.step"])
    common = max(means, key=means.get)

    chosen = [runs_of(line, (value,), budget.seeds, workdir) for line, value in zip(lines, best)]
    alike = [runs_of(line, (common,), budget.seeds, workdir) for line in lines if line.key == "optimizer.step"]
    finish(sum(chosen + alike, []), jobs, workdir, budget.seeds)
    found = {"task": task, "common_step": common, "base_norm": results(alike[0][0])["base_norm"], "lines": []}
    for number, (line, value, runs) in enumerate(zip(lines, best, chosen)):
        entry = {
            "name": line.name, "key": line.key, "held_out": grid[number], "chosen": value,
            "trained_numbers": results(runs[0])["trained_numbers"], "test": [results(run)["test"] for run in runs],
        }  # fmt: skip
        if line.key == "optimizer.step":
            entry["test_at_common_step"] = [results(run)["test"] for run in alike[number]]
        found["lines"].append(entry)
    write_json(workdir / "found.json", found)
    return found


def compare_rate_free(found: dict, budget: Budget, workdir: pathlib.Path, jobs: int) -> list[dict]:
    """Optimizers without a rate beside the searched length: an entry for each d and length of training, as written to `workdir/found.json`.

    Args:
      found: of `ablate`, which has the searched lengths of a whole training. Those of a short one are searched here.

    Raises:
      ValueError: as `ablate`.
    """
    make, known, entries = TASKS[found["task"]], {line["name"]: line for line in found["lines"]}, []
    whole = make("gpart").train.epochs
    for epochs in (whole, max(1, whole // SHORT)):
        folder, lines = workdir / f"{epochs}-epochs", []
        for d in RATE_FREE_SIZES:
            config = make("gpart")
            config.method.d, config.train.epochs = d, epochs
            lines.append(Line(config, "optimizer.step", budget.steps, f"gpart, d = {d:,}"))
        free = [[runs_of(line._replace(key="optimizer.name"), (name,), budget.seeds, folder) for name in RATE_FREE] for line in lines]
        finish([run for of_line in free for runs in of_line for run in runs], jobs, folder, budget.seeds)
        if epochs == whole:
            steps, tests = zip(*((known[line.name]["chosen"], known[line.name]["test"]) for line in lines))
        else:
            steps = [max(scores, key=scores.get) for scores in search(lines, jobs, folder)]
            searched = [runs_of(line, (step,), budget.seeds, folder) for line, step in zip(lines, steps)]
            finish(sum(searched, []), jobs, folder, budget.seeds)
            tests = [[results(run)["test"] for run in runs] for runs in searched]
        for line, step, test, of_line in zip(lines, steps, tests, free):
            entry = {"d": line.config.method.d, "epochs": epochs, "step": step, "searched": test}
            entries.append(entry | {name: [results(run)["test"] for run in runs] for name, runs in zip(RATE_FREE, of_line)})
    write_json(workdir / "found.json", entries)
    return entries


def rate_free_markdown(found: list[dict]) -> str:
    """The table of `compare_rate_free`, in per cent; and how often each optimizer is within a standard deviation of the searched length."""
    names = ("searched", *RATE_FREE)
    rows = [["d", "epochs", "step found", *names], ["---:"] * (3 + len(names))]
    for entry in found:
        rows.append([f"{entry['d']:,}", str(entry["epochs"]), f"{entry['step']:g}", *(_spread(entry[name]) for name in names)])
    within = {name: sum(_within(entry["searched"], entry[name]) for entry in found) for name in RATE_FREE}
    verdicts = ", ".join(f"{name} {count} of {len(found)} times" for name, count in within.items())
    return f"{_table(rows)}\n\nWithin one standard deviation of the searched step: {verdicts}.\n"


def markdown(found: dict) -> str:
    """The table of what a search found, in per cent; and whether the common length is within a standard deviation of each d's own."""
    header = "method", "trained numbers", "held out, by value searched", "chosen", "test, all seeds", "test at the common step"
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    within = []
    for line in found["lines"]:
        searched = ", ".join(f"{float(value):g}: {100 * score:.1f}" for value, score in line["held_out"].items())
        row = [line["name"], f"{line['trained_numbers']:,}", searched, f"{line['chosen']:g}", _spread(line["test"])]
        alike = line.get("test_at_common_step")
        if alike:
            within.append(_within(line["test"], alike))
        rows.append([*row, _spread(alike) if alike else ""])
    verdict = f"{sum(within)} of {len(within)} d within one standard deviation of their own best"
    share = f"{found['common_step'] / found['base_norm']:.1%} of |W0| = {found['base_norm']:.1f}"
    return f"{_table(rows)}\n\nThe common step is {found['common_step']:g}, {share}: {verdict}.\n"


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _within(searched: list[float], others: list[float]) -> bool:
    """Whether others' mean is at most one standard deviation of the searched ones' below theirs."""
    return statistics.mean(searched) - statistics.mean(others) <= statistics.stdev(searched)


def _spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def main(_):
    quiet()
    options, workdir = flags.FLAGS, local(flags.FLAGS.workdir)
    for task in options.tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks: {task!r} is none of {', '.join(TASKS)}.")
    for task in options.tasks:
        if task == "fashion":  # a model of our own, made on the first five classes
            train(vision.get_config("fashion_mnist,pretrain"), pathlib.Path("runs/fashion_mnist/base"))
        found = ablate(task, BUDGETS[options.budget], workdir / task, options.jobs)
        print(f"\n{task}\n\n{markdown(found)}", flush=True)
        report.write(report.find_runs(workdir / task), workdir / task / "report")
        if options.rate_free:
            compared = compare_rate_free(found, BUDGETS[options.budget], workdir / "rate_free" / task, options.jobs)
            print(f"\n{task}, optimizers without a rate\n\n{rate_free_markdown(compared)}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("tasks", list(TASKS), "Some of vader, sst2 and fashion.")
    flags.DEFINE_enum("budget", "full", list(BUDGETS), "full: 7 d, 5 values, 5 seeds. small: 3 d, 3 values, 2 seeds.")
    flags.DEFINE_string("workdir", None, "Folder for the runs, those of each task in one of its own.", required=True)
    flags.DEFINE_bool("rate_free", False, "Also try optimizers that need no rate.")
    flags.DEFINE_integer("jobs", 1, "Runs at once.", lower_bound=1)
    run_command(main)
