"""Pictures of finished runs, from what lies on disk. report.py finds the runs and has them drawn."""

import collections
import pathlib
import shutil
import statistics

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from scipy.optimize import isotonic_regression  # noqa: E402
from scipy.special import softmax  # noqa: E402
from scipy.stats import norm  # noqa: E402

from experiments.report import UNITS, in_units, label_of  # noqa: E402
from experiments.workdir import read_lines  # noqa: E402
from gpart_jax.methods import METHODS, SIZES  # noqa: E402

# Methods take colours in alphabetical order, and those of a user's own begin again; grey is the model without any.
_COLORS = ("#8a5a44", "#d98e04", "#3d405b", "#0b6e4f", "#7d8597", "#c1666b", "#2f6690", "#7b4b94")
RATES = ("optimizer.lr", "optimizer.step", "optimizer.head_lr")  # what a search of a method's rate varies
STYLES = ("-", "--", ":")  # of a method's runs
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"))  # of a method's variants


def color_of(method: str) -> str:
    """The same in all pictures."""
    if method not in METHODS:
        return "#999999"
    return _COLORS[sorted(METHODS).index(method) % len(_COLORS)]


def pictures(model: str, rows: list, out: pathlib.Path) -> None:
    """Draws what one model's rows (report.Row) have the runs for.

    <metric>-over-d-<task>-<model>.png for each task with a method at two or more d, and <metric>-over-numbers-... with all methods at
    the numbers they train; <metric>-over-rate-... for each whose rate was searched at two or more d; by-class-<task>-<model>.png for
    each with more than two classes; theta-<model>.png, and of images mistakes-<model>.png, of the median run of the GPart cell with
    most seeds, and then highest d. Of rates that were searched all but over-rate show the one that held-out data chose.
    """
    for column in sorted({column for row in rows for column in row.cells}):
        task, metric = column
        name = f"{task.replace('/', '-')}-{model}.png"
        chosen = choose_rates(rows, column)
        sizes = [(row.line, row.size) for row in chosen if SIZES.get(row.method) == "d"]
        if len(sizes) > len(dict(sizes)):
            draw_over_d(chosen, column, out / f"{metric}-over-d-{name}")
            draw_over_numbers(chosen, column, out / f"{metric}-over-numbers-{name}")
        if lines := searched_steps(rows, column):
            draw_over_rate(lines, column, out / f"{metric}-over-rate-{name}")
        runs = [run for row in rows for run in row.cells.get(column, [])]
        if all(len(run.results.get("test_by_class", ())) > 2 for run in runs):
            draw_by_class(rows, column, out / f"by-class-{column[0].replace('/', '-')}-{model}.png")
    cells = [(row, group) for row in rows if row.method == "gpart" for group in row.cells.values()]
    groups = [cell for cell in cells if "problems" not in cell[1][0].results]  # answers lie in a folder of the run's
    if groups:
        row, group = max(groups, key=lambda pair: (len(pair[1]), pair[0].size))
        draw_theta(_median_run(group), row.label, out / f"theta-{model}.png")
        mistakes = _median_run(group).workdir / "mistakes.png"
        if mistakes.is_file():
            shutil.copy(mistakes, out / f"mistakes-{model}.png")


def choose_rates(rows: list, column: tuple[str, str]) -> list:
    """The rows with runs of this column; of those that differ in their rates alone, the best on held-out data with their first seed.

    Their labels leave the rates out. A search trains one seed with each value and the chosen one with more, so that the first is common.
    """
    best, found = max if column[1] not in UNITS else min, []  # of a loss less is better
    for group in _of_one_search(rows, column):
        scores = [_first_score(row, column) for row in group]
        found += group if None in scores else [_without_rates(group[scores.index(best(scores))])]
    return found


def _of_one_search(rows: list, column: tuple[str, str]) -> list[list]:
    """The rows with runs of this column, those together that differ in their rates alone."""
    groups: dict[str, list] = collections.defaultdict(list)
    for row in rows:
        if column in row.cells:
            groups[_without_rates(row).label].append(row)
    return list(groups.values())


def _without_rates(row):
    return row._replace(variant={field: value for field, value in row.variant.items() if field not in RATES})


def _first_score(row, column: tuple[str, str]) -> float | None:
    """The first seed's best on held-out data."""
    return row.cells[column][0].results.get("validation")


def searched_steps(rows: list, column: tuple[str, str]) -> dict[int, list[tuple[float, float, float]]]:
    """By d, of each length of a step that GPart was trained with: theta's rate, the length, and the first seed's held-out metric.

    Empty unless there are two d with two lengths each that differ in these alone.
    """
    found = {}
    for group in _of_one_search([row for row in rows if row.method == "gpart"], column):
        points = [
            (row.cells[column][0].results["learning_rate"], row.variant["optimizer.step"], _first_score(row, column))
            for row in group
            if row.variant.get("optimizer.step") and _first_score(row, column) is not None
        ]
        if len(points) > 1:
            found[group[0].size] = sorted(points)
    return found if len(found) > 1 else {}


def draw_over_d(rows: list, column: tuple[str, str], path: pathlib.Path) -> None:
    """Draws a task's metric over d: a line for each method and variant with several d, dashed lines for all other rows.

    Args:
      rows: of one model (report.Row).
      column: task and metric.
      path: of the PNG.
    """
    lines, ends = {}, []
    for row in rows:
        if column in row.cells:
            lines.setdefault(row.line if SIZES.get(row.method) == "d" else row.label, []).append(row)
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    variants: dict[str, int] = collections.Counter()
    for line, points in lines.items():
        method, color = points[0].method, color_of(points[0].method)
        values = [[in_units(column[1], run.results["test"]) for run in row.cells[column]] for row in points]
        medians = [statistics.median(seeds) for seeds in values]
        if len(points) > 1:
            below = [median - min(seeds) for median, seeds in zip(medians, values)]
            above = [max(seeds) - median for median, seeds in zip(medians, values)]
            marker, sign = MARKERS[variants[method] % len(MARKERS)]
            variants[method] += 1
            axes.errorbar([row.size for row in points], medians, [below, above], color=color, marker=marker, capsize=4)
            ends.append((medians[-1], f"{sign} {line}", color))
        else:
            axes.axhline(medians[0], color=color, linestyle="--", linewidth=1)
            numbers = points[0].cells[column][0].results["trained_numbers"]
            ends.append((medians[0], f"{points[0].label}\n({numbers:,} numbers)", color))
    ticks = sorted({row.size for points in lines.values() if len(points) > 1 for row in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{d:,}" for d in ticks], rotation=30, ha="right", rotation_mode="anchor")
    axes.minorticks_off()
    task, metric = column
    axes.set(
        xlabel="d",
        ylabel=f"test {metric}{UNITS.get(metric, ' (%)')}",
        title=f"{task}: median over seeds, bars from lowest to highest",
    )
    _tidy(axes)
    _label_ends(axes, ends)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_over_numbers(rows: list, column: tuple[str, str], path: pathlib.Path) -> None:
    """Draws a task's metric over how many numbers are trained, the head's with them: means, with bars of one standard deviation.

    Args:
      rows: of one model (report.Row), as `choose_rates` leaves them.
      column: task and metric.
      path: of the PNG.
    """
    lines = collections.defaultdict(list)
    for row in rows:
        runs = row.cells[column]
        values = [in_units(column[1], run.results["test"]) for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        lines[row.line].append((runs[0].results["trained_numbers"], statistics.mean(values), spread, row))
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for line, points in lines.items():
        at, means, spreads, members = zip(*sorted(points, key=lambda point: point[0]))
        color = color_of(members[0].method)
        axes.errorbar(at, means, spreads, color=color, marker="o", capsize=3, linewidth=1.2)
        axes.annotate(line, (at[-1], means[-1]), xytext=(6, 5), textcoords="offset points", color=color, fontsize=9)
    seeds = sorted({len(row.cells[column]) for row in rows})
    task, metric = column
    axes.set(
        xscale="log", xlabel="trained numbers, with the head's", ylabel=f"test {metric}{UNITS.get(metric, ' (%)')}",
        title=f"{task}: mean of {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds, bars of one standard deviation",
    )  # fmt: skip
    axes.margins(x=0.12)
    _tidy(axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_over_rate(lines: dict[int, list[tuple[float, float, float]]], column: tuple[str, str], path: pathlib.Path) -> None:
    """Draws GPart's metric on held-out data over theta's rate, beside it over the length of a step in weight space: a line for each d.

    Args:
      lines: of `searched_steps`.
      column: task and metric.
      path: of the PNG.
    """
    task, metric = column
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    colors = plt.cm.viridis(np.linspace(0, 0.9, len(lines)))
    for axes, which, label in zip(panels, (0, 1), ("theta's learning rate", "length of a step in weight space: rate x √d")):
        for color, (d, points) in zip(colors, sorted(lines.items())):
            values = [in_units(metric, point[2]) for point in points]
            axes.plot([point[which] for point in points], values, "o-", color=color, label=f"d = {d:,}")
        axes.set(xscale="log", xlabel=label)
        _tidy(axes)
    panels[1].set_xticks(ticks := sorted({step for points in lines.values() for _, step, _ in points}), [f"{step:g}" for step in ticks])
    panels[1].minorticks_off()
    panels[0].set_ylabel(f"{metric} on held-out data{UNITS.get(metric, ' (%)')}")
    panels[1].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{task}, one seed: a rate for each d, one length for all")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label_ends(axes, ends: list[tuple[float, str, str]]) -> None:
    """Writes each (height, text, color) to the right of the axes, as near to its height as the other texts allow."""
    ends = sorted(ends)
    low, high = axes.get_ylim()
    tall = np.array([0.05 * (high - low) * (1 + text.count("\n")) for _, text, _ in ends])
    stacked = np.cumsum(tall) - tall / 2  # the middles, if all stood on one another
    middles = isotonic_regression([height for height, _, _ in ends] - stacked).x + stacked
    for (height, text, color), middle in zip(ends, middles):
        axes.annotate(
            text, (1, height), (1.04, middle), axes.get_yaxis_transform(), color=color, va="center", fontsize=9,
            arrowprops=dict(arrowstyle="-", color=color, linewidth=0.7, relpos=(0, 0.5)), annotation_clip=False,
        )  # fmt: skip


def draw_theta(run, title: str, path: pathlib.Path) -> None:
    """Draws the histogram of a GPart run's theta, with the normal curve of the same mean and standard deviation."""
    theta = load_file(run.workdir / "adapter.safetensors")["theta"].astype(np.float64)
    mean, deviation = theta.mean(), theta.std()
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    axes.hist(theta, bins=min(60, max(10, len(theta) // 50)), density=True, color=color_of("gpart"), alpha=0.5)
    at = np.linspace(theta.min(), theta.max(), 300)
    axes.plot(at, norm.pdf(at, mean, deviation), color="black", linewidth=1.2)
    axes.annotate(
        f"normal curve\nmean {mean:.2g}\nsd {deviation:.3g}",
        (0.97, 0.95),
        xycoords="axes fraction",
        ha="right",
        va="top",
    )
    length = f"‖theta‖ = {np.linalg.norm(theta):.3g}"
    if run.config.get("method.isometric", True):
        length += ": how far the adapted weights moved"
    axes.set(xlabel="an entry of theta", ylabel="density", title=f"{title}, seed {run.results['seed']}\n{length}")
    _tidy(axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_mistakes(task, logits: np.ndarray, path: pathlib.Path, columns: int = 8, rows: int = 4) -> None:
    """Draws wrongly predicted test images: those that the model was surest of, of every class in turn.

    Args:
      task: of images (data.Task).
      logits: (examples, outputs) of its test split.
      path: of the PNG.
    """
    labels = np.array([example["label"] for example in task.test])
    predicted, sure = logits.argmax(-1), softmax(logits, axis=-1).max(-1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")]
    place = {n: np.count_nonzero(labels[wrong[:k]] == labels[n]) for k, n in enumerate(wrong.tolist())}
    chosen = sorted(place, key=place.get)[: columns * rows]  # the first of each class, then the second
    figure, panels = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.9 * rows), layout="constrained")
    for axes in panels.flat:
        axes.axis("off")
    pixels = task.collate([task.test[n] for n in chosen])["pixel_values"] if chosen else []
    for axes, n, image in zip(panels.flat, chosen, pixels):
        axes.imshow(image)
        axes.set_title(f"{task.labels[labels[n]]}\nnot {task.labels[predicted[n]]}, {100 * sure[n]:.0f} %", fontsize=7)
    figure.suptitle(f"{len(wrong):,} of {len(labels):,} test images are wrong; the surest of each class")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_by_class(rows: list, column: tuple[str, str], path: pathlib.Path) -> None:
    """Draws each class's accuracy as dots, one for each row (report.Row): the median run's.

    Args:
      rows: of one model, with runs of this column.
      column: task and metric.
      path: of the PNG.
    """
    found = {row.label: _median_run(row.cells[column]).results["test_by_class"] for row in rows if column in row.cells}
    classes = sorted({name for values in found.values() for name in values})
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.28 * len(classes)), layout="constrained")
    for number, (title, values) in enumerate(found.items()):
        at = [classes.index(name) for name in values]
        color, marker = plt.cm.tab10(number % 10), MARKERS[number // 10 % len(MARKERS)][0]
        axes.plot([100 * value for value in values.values()], at, marker, color=color, label=title, alpha=0.8)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="right of the class's test images (%)", title=f"{column[0]}, of each method the median run")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    _tidy(axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _median_run(group: list):
    return sorted(group, key=lambda run: run.results["test"])[(len(group) - 1) // 2]


def _tidy(axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw(runs: list, path: pathlib.Path) -> None:
    """Draws runs' (report.Run) training losses, accuracy against size, and of the first each test word's rating against its logit."""
    figure, (curves, sizes, words) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    ends, seen = [], collections.Counter()
    for run in runs:
        results, name = run.results, label_of(run)
        color, style = color_of(results["method"]), STYLES[seen[results["method"]] % len(STYLES)]
        seen[results["method"]] += 1
        points = [(row["step"], row["loss"]) for row in read_lines(run.workdir / "metrics.jsonl") if "loss" in row]
        curves.plot(*zip(*points), style, color=color)
        ends.append((points[-1][1], name, color))
        sizes.plot(results["adapter_bytes"], 100 * results["test"], "o", color=color, markersize=10)
        sizes.annotate(
            f"{name}\n{results['trained_numbers']:,} numbers",
            (results["adapter_bytes"], 100 * results["test"]),
            xytext=(0, 12), textcoords="offset points", color=color, ha="center",
        )  # fmt: skip
    metric = runs[0].results["metric"]
    curves.set(xlabel="step", ylabel="training loss", title="While training")
    _label_ends(curves, ends)
    sizes.set(xlabel="adapter on disk (bytes)", ylabel=f"test {metric} (%)", title="For its size", xscale="log")
    sizes.margins(x=0.3, y=0.3)
    _draw_words(words, runs[0].workdir, runs[0].results)
    for axes in (curves, sizes, words):
        _tidy(axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_words(axes, workdir: pathlib.Path, results: dict) -> None:
    rows = read_lines(workdir / "predictions.jsonl")
    rating = np.array([row["rating"] for row in rows])
    margin = np.array([row["logits"][1] - row["logits"][0] for row in rows])
    right = np.array([row["label"] == row["prediction"] for row in rows])
    axes.scatter(rating[right], margin[right], s=9, alpha=0.35, color=color_of(results["method"]), linewidths=0)
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
