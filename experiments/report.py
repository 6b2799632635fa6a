"""Finished runs as a table and a picture."""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import rich.console  # noqa: E402
import rich.table  # noqa: E402

COLORS = {"gpart": "#0b6e4f", "lora": "#c1666b", "head": "#7d8597", "full": "#3d405b"}


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
