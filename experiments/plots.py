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

from experiments.report import UNITS, in_units  # noqa: E402
from experiments.workdir import read_json, read_lines  # noqa: E402
from gpart_jax.methods import METHODS, SIZES  # noqa: E402

# Methods take colours in alphabetical order, and those of a user's own begin again; grey is the model without any.
_COLORS = ("#8a5a44", "#d98e04", "#3d405b", "#0b6e4f", "#7d8597", "#c1666b", "#2f6690", "#7b4b94")
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"))  # of a method's variants


def color_of(method: str) -> str:
    """The same in all pictures."""
    if method not in METHODS:
        return "#999999"
    return _COLORS[sorted(METHODS).index(method) % len(_COLORS)]


def pictures(model: str, rows: list, out: pathlib.Path) -> None:
    """Draws what one model's rows (report.Row) have the runs for.

    <metric>-over-d-<task>-<model>.png for each task with a method at two or more d; by-class-<task>-<model>.png for each with more than
    two classes; theta-<model>.png, and of images mistakes-<model>.png, of the median run of the GPart cell with most seeds, and
    then highest d.
    """
    for column in sorted({column for row in rows for column in row.cells}):
        sizes = [(row.line, row.size) for row in rows if SIZES.get(row.method) == "d" and column in row.cells]
        if len(sizes) > len(dict(sizes)):
            task, metric = column
            draw_over_d(rows, column, out / f"{metric}-over-d-{task.replace('/', '-')}-{model}.png")
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


def draw(workdirs: list[pathlib.Path], path: pathlib.Path) -> None:
    """Draws training losses, accuracy against size, and of the first run each test word's rating against its logit."""
    runs = [
        (
            read_json(workdir / "results.json"),
            read_lines(workdir / "metrics.jsonl"),
        )
        for workdir in workdirs
    ]
    figure, (curves, sizes, words) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for results, metrics in runs:
        name, color = results["method"], color_of(results["method"])
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
