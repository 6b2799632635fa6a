"""Finished runs as tables and a picture.

python -m experiments.report --workdir=runs/glue     all finished runs under a folder: a Markdown table for each model
"""

import collections
import json
import pathlib
import statistics
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import rich.console  # noqa: E402
import rich.table  # noqa: E402
from absl import app, flags  # noqa: E402

from experiments.checkpoint import flatten  # noqa: E402

COLORS = {"gpart": "#0b6e4f", "lora": "#c1666b", "head": "#7d8597", "full": "#3d405b"}
PUBLISHED = pathlib.Path(__file__).parent / "published.json"
FREE = {"seed", "method.seed", "task.data_dir"}  # what the runs of one cell may differ in


class Run(NamedTuple):
    workdir: pathlib.Path
    config: dict  # flat: {"method.d": 23040, ...}
    results: dict


def find_runs(workdir: pathlib.Path) -> list[Run]:
    """All finished runs in a folder and the folders below.

    Raises:
      FileNotFoundError: there are none.
    """
    runs = []
    for path in sorted(workdir.rglob("results.json")):
        config = flatten(json.loads((path.parent / "config.json").read_text()))
        runs.append(Run(path.parent, config, json.loads(path.read_text())))
    if not runs:
        raise FileNotFoundError(f"There is no finished run (no results.json) in {workdir}. Train there first.")
    return runs


def label(method: dict, form: str = "{}, {} = {:,}") -> str:
    """What to call a method: its name and its size."""
    size = {"gpart": "d", "lora": "rank"}.get(method["name"])
    return form.format(method["name"], size[0], method[size]) if size else method["name"]


def markdown(runs: list[Run]) -> str:
    """A table for each model: methods as rows, tasks as columns, each beside the published figure where one is known.

    A cell is the median over seeds, with mean, standard deviation (n - 1) and the seeds, in percent.

    Raises:
      ValueError: two runs of a cell differ in more than their seeds, or have the same seed.
    """
    published, sources, tables = json.loads(PUBLISHED.read_text()), [], []
    for model in sorted({run.config["model.source"] for run in runs}):
        cells = collections.defaultdict(list)
        for run in runs:
            if run.config["model.source"] == model:
                spec = {key.removeprefix("method."): value for key, value in run.config.items() if "method." in key}
                cells[label(spec), (run.results["task"], run.results["metric"])].append(run)
        rows, columns = sorted({row for row, _ in cells}), sorted({column for _, column in cells})
        lines = [f"**{model}**", ""]
        lines.append(
            "| method |"
            + "".join(f" {task.removeprefix('glue/')}, {metric} (%) | published |" for task, metric in columns)
        )
        lines.append("|---|" + "---:|---:|" * len(columns))
        for row in rows:
            line = f"| {row} |"
            for column in columns:
                group = cells.get((row, column), [])
                known = _published(group, published)
                if known and known["source"] not in sources:
                    sources.append(known["source"])
                theirs = f"{100 * known['test']:.1f} [{sources.index(known['source']) + 1}]" if known else ""
                line += f" {_cell(group)} | {theirs} |"
            lines.append(line)
        tables.append("\n".join(lines))
    notes = "\n".join(f"[{number}] {source}" for number, source in enumerate(sources, 1))
    return "\n\n".join([*tables, notes] if notes else tables) + "\n"


def _cell(group: list[Run]) -> str:
    if not group:
        return ""
    first, seeds = group[0], sorted(run.results["seed"] for run in group)
    for run in group[1:]:
        for key in sorted((first.config.keys() | run.config.keys()) - FREE):
            mine, other = run.config.get(key), first.config.get(key)
            if mine != other:
                raise ValueError(
                    f"{run.workdir} and {first.workdir} would share a cell, but config.{key} is {mine!r} in one and "
                    f"{other!r} in the other. Report them from different folders."
                )
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"Two runs beside {first.workdir} have the same seed (seeds {seeds}). Remove one.")
    values = [100 * run.results["test"] for run in group]
    median, mean = statistics.median(values), statistics.mean(values)
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return (
        f"{median:.1f} (mean {mean:.1f}{spread}; {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))})"
    )


def _published(group: list[Run], published: list[dict]) -> dict | None:
    for known in published:
        if group and known["config"].items() <= group[0].config.items():
            return known
    return None


def print_table(results: list[dict]) -> None:
    """Prints a row for each run."""
    table = rich.table.Table(title=f"{results[0]['task']}, seed {results[0]['seed']}, {results[0]['device']}")
    table.add_column("method")
    for name in ("trained numbers", "adapter bytes", f"test {results[0]['metric']}", "seconds a step"):
        table.add_column(name, justify="right")
    for row in results:
        table.add_row(
            row["method"], f"{row['trained_numbers']:,}", f"{row['adapter_bytes']:,}",
            f"{100 * row['test']:.1f} %", f"{row['seconds_per_step']:.3f}",
        )  # fmt: skip
    rich.console.Console().print(table)


def draw(workdirs: list[pathlib.Path], path: pathlib.Path) -> None:
    """Draws training losses, accuracy against size, and (for the first run) each test word's rating against its logit."""
    runs = [
        (
            json.loads((workdir / "results.json").read_text()),
            [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()],
        )
        for workdir in workdirs
    ]
    figure, (curves, sizes, words) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for results, metrics in runs:
        name, color = results["method"], COLORS[results["method"]]
        points = [(row["step"], row["loss"]) for row in metrics if "loss" in row]
        curves.plot(*zip(*points), "-", color=color)
        curves.annotate(name, points[-1], xytext=(6, 0), textcoords="offset points", color=color, va="center")
        sizes.plot(results["adapter_bytes"], 100 * results["test"], "o", color=color, markersize=10)
        sizes.annotate(
            f"{name}\n{results['trained_numbers']:,} numbers",
            (results["adapter_bytes"], 100 * results["test"]),
            xytext=(0, 12), textcoords="offset points", color=color, ha="center",
        )  # fmt: skip
    metric = runs[0][0]["metric"]
    curves.set(xlabel="step", ylabel="training loss", title="While training")
    curves.margins(x=0.12)
    sizes.set(xlabel="adapter on disk (bytes)", ylabel=f"test {metric} (%)", title="For its size", xscale="log")
    sizes.margins(x=0.3, y=0.3)
    _draw_words(words, workdirs[0], runs[0][0])
    for axes in (curves, sizes, words):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_words(axes, workdir: pathlib.Path, results: dict) -> None:
    rows = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    rating = np.array([row["rating"] for row in rows])
    margin = np.array([row["logits"][1] - row["logits"][0] for row in rows])
    right = np.array([row["label"] == row["prediction"] for row in rows])
    axes.scatter(rating[right], margin[right], s=9, alpha=0.35, color=COLORS[results["method"]], linewidths=0)
    axes.scatter(rating[~right], margin[~right], s=9, alpha=0.7, color="#c44536", linewidths=0)
    axes.axhline(0, color="black", linewidth=0.7)
    axes.axvline(0, color="black", linewidth=0.7)
    wrong = np.where(right, 0, margin)
    for row in (margin.argmax(), margin.argmin(), wrong.argmax(), wrong.argmin()):
        axes.annotate(
            rows[row]["text"], (rating[row], margin[row]), fontsize=8, xytext=(4, 3), textcoords="offset points"
        )
    axes.set(
        xlabel="people's mean rating (its sign is the label)",
        ylabel="logit of positive minus negative",
        title=f"{len(rows):,} test words, {results['method']}: {np.count_nonzero(~right)} wrong (red)",
    )


def main(_):
    print(markdown(find_runs(pathlib.Path(flags.FLAGS.workdir))))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder that holds the folders of finished runs.", required=True)
    app.run(main)
