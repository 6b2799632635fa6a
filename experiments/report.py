"""Finished runs as tables.

python -m experiments.report --workdir=runs/glue                     all finished runs under a folder, in Markdown
python -m experiments.report --workdir=runs/glue --out=docs/glue     and as table.md, table.csv, table.tex, pictures
python -m experiments.report --published                             what others published, and what would fill ours
"""

import collections
import csv
import pathlib
import statistics
from typing import NamedTuple

import rich.console
import rich.table
from absl import flags

from experiments import published
from experiments.command import run_command
from experiments.config import OPERATIONAL, flatten
from experiments.workdir import MEND, local, read_json
from gpart_jax.files import find
from gpart_jax.methods import SIZES

UNITS = {"loss": " (nats a token)"}  # of metrics that aren't shares
RESULTS = {  # what tables need of results.json, and of which type it is
    "method": str, "task": str, "metric": str, "seed": int, "test": int | float, "trained_numbers": int,
    "adapter_bytes": int | None, "test_by_class": dict, "select": str,
}  # fmt: skip
MEASURED = {"forgetting": int | float, "device_memory": int | float, "training_seconds": int | float, "interval": list}  # where it is there
CONFIG = {"model.source": str | None, "method.name": str}
OF_ONE_CELL = {"seed", "method.seed", *OPERATIONAL}  # what its runs may differ in
PROTOCOLS = {"heldout": published.HELD_OUT, "scored": published.SCORED, "last": published.LAST}


class Run(NamedTuple):
    workdir: pathlib.Path
    config: dict  # flat: {"method.d": 23040, ...}
    results: dict


class Row(NamedTuple):
    """The runs of one method at one size and, where they differ in more than their seeds, of one variant."""

    title: str  # gpart, d = 23,040
    method: str
    size: int | None
    variant: dict  # {"method.scheme": "splitmix64"}
    cells: dict[tuple[str, str], list[Run]]  # by task and metric; one run a seed

    @property
    def label(self) -> str:
        """gpart, d = 23,040, scheme = splitmix64"""
        return ", ".join([self.title, *self._shown()])

    @property
    def line(self) -> str:
        """The same without the size."""
        return ", ".join([self.method, *self._shown()])

    def _shown(self) -> list[str]:
        return [f"{field.removeprefix('method.')} = {_plain(value)}" for field, value in self.variant.items()]


def find_runs(workdir: pathlib.Path) -> list[Run]:
    """All finished runs in a folder and the folders below.

    Raises:
      FileNotFoundError: there are none, or one has no config.json.
      ValueError: a file is damaged.
    """
    runs = []
    for path in find(workdir, "results.json"):
        runs.append(Run(path.parent, flatten(read_json(path.parent / "config.json")), read_json(path)))
    if not runs:
        raise FileNotFoundError(f"There is no finished run (no results.json) in {workdir}. Train there first.")
    return runs


def check(runs: list[Run]) -> None:
    """Raises a ValueError if a run's files lack what tables need of them."""
    for workdir, config, results in runs:
        _check(workdir / "config.json", config, CONFIG)
        if size := SIZES.get(config["method.name"]):
            _check(workdir / "config.json", config, {f"method.{size}": int})
        _check(workdir / "results.json", {"test_by_class": {}, "select": "heldout"} | results, RESULTS)
        _check(workdir / "results.json", results, {key: kind for key, kind in MEASURED.items() if key in results})
        ends = {f"interval[{n}]": end for n, end in enumerate(results.get("interval", (0, 0)))}
        _check(workdir / "results.json", ends, dict.fromkeys(("interval[0]", "interval[1]"), int | float))


def _check(path: pathlib.Path, found: dict, needed: dict) -> None:
    for key, kind in needed.items():
        if key not in found or not isinstance(found[key], kind):
            raise ValueError(f"{path} is damaged: {key} is {found.get(key, 'missing')!r}. {MEND}")


def in_units(metric: str, value: float) -> float:
    """A metric's value as tables and pictures have it: in percent, but for those of UNITS."""
    return value if metric in UNITS else 100 * value


def label(method: dict, form: str = "{}, {} = {:,}") -> str:
    """What to call a method: its name and its size."""
    size = SIZES.get(method["name"])
    return form.format(method["name"], size[0], method[size]) if size else method["name"]


def label_of(run: Run) -> str:
    """gpart, d = 23,040"""
    return label(_method(run))


def rows(runs: list[Run]) -> list[Row]:
    """The rows of one model's table, by method, then by size, then by variant.

    A variant names each config field in which two runs of this method differ that have the same size and task.

    Raises:
      ValueError: two runs that differ in nothing else have the same seed.
    """
    comparable, fields = collections.defaultdict(list), collections.defaultdict(set)
    for run in runs:
        comparable[label_of(run), run.results["task"]].append(run)
    for group in comparable.values():
        fields[group[0].results["method"]] |= _differing(group)

    found = {}
    for run in runs:
        name, spec = run.results["method"], _method(run)
        variant = {field: run.config.get(field) for field in sorted(fields[name] - OF_ONE_CELL)}
        row = Row(label(spec), name, spec.get(SIZES.get(name)), variant, collections.defaultdict(list))
        found.setdefault(row.label, row).cells[run.results["task"], run.results["metric"]].append(run)
    for row in found.values():
        for group in row.cells.values():
            group.sort(key=lambda run: run.results["seed"])
            seeds = [run.results["seed"] for run in group]
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"Two runs beside {group[0].workdir} have the same seed (seeds {seeds}). Remove one.")
    return sorted(found.values(), key=lambda row: (row.method, row.size or 0, *map(_order, row.variant.values())))


def by_model(runs: list[Run]) -> dict[str, list[Row]]:
    """The rows of each model.

    Raises:
      ValueError: as `check` and `rows`.
    """
    check(runs)
    models = collections.defaultdict(list)
    for run in runs:
        models[run.config["model.source"] or "trained from nothing"].append(run)
    return {model: rows(models[model]) for model in sorted(models)}


def markdown(runs: list[Run]) -> str:
    """A table for each model: methods as rows, tasks as columns, each beside the published figure where one is known.

    A cell is the median over seeds, with mean, standard deviation (n - 1) and the seeds, in percent.

    Raises:
      ValueError: two runs that differ in nothing else have the same seed.
    """
    tables, notes = _tables(runs)
    texts = []
    for model, (header, *lines) in tables.items():
        ruler = "|---|" + "---:|" * (len(header) - 1)
        header, *lines = [
            "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in (header, *lines)
        ]
        texts.append("\n".join([f"**{model}**", "", header, ruler, *lines]))
    return "\n\n".join([*texts, "\n".join(notes)] if notes else texts) + "\n"


def latex(runs: list[Run]) -> str:
    """The tables of `markdown` for LaTeX's booktabs."""
    tables, notes = _tables(runs)
    texts = []
    for model, (header, *lines) in tables.items():
        header, *lines = [" & ".join(map(_tex, line)) + r" \\" for line in (header, *lines)]
        columns = "l" + "r" * header.count(" & ")
        caption = rf"\caption{{{_tex(' '.join([f'{model}: median over seeds.', *notes]))}}}"
        texts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    caption,
                    rf"\begin{{tabular}}{{{columns}}}",
                    r"\toprule",
                    header,
                    r"\midrule",
                    *lines,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )  # fmt: skip
        )
    return "\n\n".join(texts) + "\n"


def write_csv(runs: list[Run], path: pathlib.Path) -> None:
    """One row a run: its results as plain numbers, and each config field in which any two of the runs differ."""
    fields = sorted(_differing(runs) | {"model.source"})
    lines = [
        {"workdir": run.workdir} | {f"config.{field}": run.config.get(field) for field in fields} | flatten(run.results)
        for run in runs
    ]
    header = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(lines)


def benchmark(runs: list[Run]) -> str:
    """PEFT's benchmark with those of the runs that are of it, as `published.benchmark` has it."""
    return published.benchmark([(label_of(run), run.config, run.results) for run in runs])


def _tables(runs: list[Run]) -> tuple[dict[str, list[list[str]]], list[str]]:
    """Each model's table as lines of cells, the first the header; and the sources of the published figures in them."""
    known, sources, tables, protocols = published.read(), [], {}, set()
    for model, found in by_model(runs).items():
        columns = sorted({column for row in found for column in row.cells})
        titles = [
            (f"{task.removeprefix('glue/')}, {metric}{UNITS.get(metric, ' (%)')}", "published")
            for task, metric in columns
        ]
        lines = [["method", "trained numbers", "adapter bytes", *(title for pair in titles for title in pair)]]
        for row in found:
            mine = [run.results for group in row.cells.values() for run in group]
            sizes = [_range([results[name] for results in mine]) for name in ("trained_numbers", "adapter_bytes")]
            line = [row.label, *sizes]
            for column in columns:
                group = row.cells.get(column, [])
                line += [_cell(group), _published(row, group, column[1], known, sources)]
                protocols |= {_protocol(run.results) for run in group}
            lines.append(line)
        tables[model] = lines
    ours = " or, by row, ".join(sorted(protocols))
    return tables, [f"Ours: {ours}.", *(f"[{number}] {source}" for number, source in enumerate(sources, 1))]


def _protocol(results: dict) -> str:
    """On what a run's epoch was chosen; a run of version 0.1.0 doesn't say, and without held-out examples took the last."""
    chosen = "last" if results.get("validation", 0.0) is None else "heldout"
    chosen = results.get("select", chosen)
    return PROTOCOLS.get(chosen, chosen)


def _method(run: Run) -> dict:
    return {key.removeprefix("method."): value for key, value in run.config.items() if key.startswith("method.")}


def _differing(runs: list[Run]) -> set[str]:
    """The config fields that aren't the same in all runs."""
    first = runs[0].config
    return {
        field for run in runs for field in first.keys() | run.config.keys() if first.get(field) != run.config.get(field)
    }


def _plain(value) -> str:
    return f"{value:,}" if type(value) is int else "default" if value is None else str(value)


def _order(value) -> tuple:
    """Numbers as numbers, before everything else."""
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def _range(values: list[int | None]) -> str:
    """A head's outputs, and with them the trained numbers, differ from task to task."""
    known = [value for value in values if value is not None]  # a run that isn't finished has no adapter
    return "–".join(f"{value:,}" for value in sorted({min(known), max(known)})) if known else ""


def _cell(group: list[Run]) -> str:
    if not group:
        return ""
    metric, seeds = group[0].results["metric"], [str(run.results["seed"]) for run in group]
    values, digits = [in_units(metric, run.results["test"]) for run in group], 3 if metric in UNITS else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return (
        f"{statistics.median(values):.{digits}f} "
        f"(mean {statistics.mean(values):.{digits}f}{spread}; {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)})"
    )


def _published(row: Row, group: list[Run], metric: str, known: list[dict], sources: list[str]) -> str:
    """What is published of the same experiment, each with its protocol and number in `sources`, which grows.

    Where the row is one of several variants, only what names which.
    """
    figures: dict[tuple, list[int]] = {}
    for figure in published.of_run(group[0].config, metric, known) if group else ():
        if row.variant.keys() <= set(figure.named):
            if figure.source not in sources:
                sources.append(figure.source)
            figures.setdefault((figure.value, figure.spread, figure.protocol), []).append(sources.index(figure.source) + 1)
    return "; ".join(
        f"{value:g}{f' ± {spread}' if spread else ''}{f' ({protocol})' if protocol else ''} {numbers}"
        for (value, spread, protocol), numbers in figures.items()
    )


def _tex(text: str) -> str:
    special = {character: "\\" + character for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "±": r"$\pm$", "|": r"\textbar{}", "–": "--"}
    return text.translate(str.maketrans(special))


def print_table(runs: list[Run]) -> None:
    """Prints a row for each run."""
    first = runs[0].results
    table = rich.table.Table(title=f"{first['task']}, seed {first['seed']}, {first['device']}")
    table.add_column("method", no_wrap=True)
    for name in ("trained numbers", "adapter bytes", f"test {first['metric']}", "seconds a step"):
        table.add_column(name, justify="right")
    for run in runs:
        row = run.results
        table.add_row(
            label_of(run), f"{row['trained_numbers']:,}", f"{row['adapter_bytes']:,}",
            f"{100 * row['test']:.1f} %", f"{row['seconds_per_step']:.3f}",
        )  # fmt: skip
    rich.console.Console().print(table)


def write(runs: list[Run], out: pathlib.Path) -> None:
    """Writes table.md, table.tex, table.csv and the pictures of plots.pictures into a folder, made if need be."""
    from experiments import plots  # here, because Matplotlib takes longer than the tables

    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n".join(filter(None, [markdown(runs), benchmark(runs)])))
    (out / "table.tex").write_text(latex(runs))
    write_csv(runs, out / "table.csv")
    for model, found in by_model(runs).items():
        plots.pictures(pathlib.Path(model).name, found, out)


def main(_):
    if flags.FLAGS.published:
        text = published.markdown()
        print(text)
        if flags.FLAGS.out:
            out = local(flags.FLAGS.out)
            out.mkdir(parents=True, exist_ok=True)
            (out / "published.md").write_text(text)
        return
    if flags.FLAGS.workdir is None:
        raise ValueError("Give the folder of the runs, --workdir, or ask for --published.")
    runs = find_runs(local(flags.FLAGS.workdir))
    print(markdown(runs), benchmark(runs), sep="\n")
    if flags.FLAGS.out:
        write(runs, local(flags.FLAGS.out))
        print(f"Tables and pictures: {flags.FLAGS.out}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder that holds the folders of finished runs.")
    flags.DEFINE_bool("published", False, "Print the figures that others published, instead of runs.")
    flags.DEFINE_string("out", None, "Folder for the tables and pictures; none are written without it.")
    run_command(main)
