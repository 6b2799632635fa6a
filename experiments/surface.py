"""The training loss on the plane through a base model and what two runs made of it.

python -m experiments.surface --runs=runs/gpart,runs/lora --out=surface.png
python -m experiments.surface --runs=runs/glue --out=surface.png    the GPart run of the highest d there, and a LoRA run

The axes are distances in the space of all weights. The origin is the base model, W0, with the head that the first run drew; the first
run's model, its head too, lies to the right of it, and the second's in the upper half.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from absl import app, flags, logging
from matplotlib import pyplot as plt

from experiments import report
from experiments.build import build
from experiments.command import run_command
from experiments.logger import quiet
from experiments.plots import color_of
from experiments.step import make_loss
from experiments.workdir import changes, local, read_config
from gpart_jax import load_adapter
from gpart_jax.targets import named_leaves, replace_leaves

MARGIN = 0.35  # around the three models, of the plane's longer side


class Plane(NamedTuple):
    """Through a base model and two others: at (x, y) lies base + x * across + y * up, at that distance from the base."""

    across: dict[str, jax.Array]  # by path, float32, where any of the models differ; of length 1
    up: dict[str, jax.Array]  # likewise, orthogonal to `across`
    at: np.ndarray  # (2, 2): where the two models lie, [[x, 0], [x, y]] with y > 0

    @property
    def degrees(self) -> float:
        """The angle between the ways to the two models."""
        return float(np.degrees(np.arctan2(self.at[1, 1], self.at[1, 0])))


def make_plane(params, adapters: list[pathlib.Path]) -> Plane:
    """The plane through a base model and two adapted ones.

    Args:
      params: of the base model.
      adapters: the two files.

    Raises:
      ValueError: the three lie on one line.
    """
    base, ways = dict(named_leaves(params)), []
    for path in adapters:
        method, trainable = load_adapter(path).on(params)
        adapted = dict(named_leaves(jax.jit(method.apply)(params, trainable, None, method.tables(params))))
        ways.append({name: jnp.float32(leaf) - jnp.float32(base[name]) for name, leaf in adapted.items()})
    moved = [name for name in base if any(np.any(way[name]) for way in ways)]
    first, second = ({name: way[name] for name in moved} for way in ways)
    x = _dot(first, first) ** 0.5
    if not x:
        raise ValueError(f"{adapters[0]} leaves the base model as it is: there is no plane.")
    across = jax.tree.map(lambda leaf: leaf / x, first)
    along = _dot(across, second)
    rest = jax.tree.map(lambda leaf, unit: leaf - along * unit, second, across)
    y = _dot(rest, rest) ** 0.5
    if y < 1e-4 * x:
        raise ValueError(f"{' and '.join(map(str, adapters))} lie on one line with the base model: there is no plane.")
    return Plane(across, jax.tree.map(lambda leaf: leaf / y, rest), np.array([[x, 0.0], [along, y]]))


def _dot(one: dict[str, jax.Array], other: dict[str, jax.Array]) -> float:
    return float(sum(np.float64(jnp.vdot(one[name], other[name])) for name in one))


def losses(plane: Plane, loss: Callable, params, batch: dict, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """The loss of one batch at each (x, y), float32 (ys, xs). Shows its progress."""

    @jax.jit
    def row(params, plane, batch, y):
        base = dict(named_leaves(params))

        def point(x):
            there = {name: (base[name] + x * plane.across[name] + y * up).astype(base[name].dtype) for name, up in plane.up.items()}
            return loss(lambda part, layer=None: part, replace_leaves(params, there), batch)

        return jax.lax.map(point, jnp.asarray(xs, jnp.float32))

    return np.stack([np.asarray(row(params, plane, batch, y)) for y in rich.progress.track(ys, f"{len(ys)} rows")])


def choose(runs: list[report.Run]) -> list[report.Run]:
    """The GPart run of the highest d that has a LoRA run of the same model and task beside it, and that one.

    Raises:
      ValueError: there is no such pair.
    """
    theirs = {_experiment(run): run for run in runs if run.results["method"] == "lora"}
    mine = [run for run in runs if run.results["method"] == "gpart" and _experiment(run) in theirs]
    if not mine:
        raise ValueError("No GPart run has a LoRA run of the same model and task beside it. Name two runs: --runs=a,b")
    best = max(mine, key=lambda run: run.config["method.d"])
    return [best, theirs[_experiment(best)]]


def _experiment(run: report.Run) -> tuple[str, str]:
    return run.config["model.source"], run.results["task"]


class Surface(NamedTuple):
    plane: Plane
    xs: np.ndarray
    ys: np.ndarray
    losses: np.ndarray  # float32 (ys, xs)
    known: np.ndarray  # (3,): the losses of the base model and of the two runs


def surface(runs: list[report.Run], points: int, examples: int) -> Surface:
    """The loss on the plane of two runs, of training examples evenly spaced over those that aren't held out.

    Args:
      runs: of one model and task.
      points: along each side of the grid.
      examples: how many the loss is the mean of, at most.

    Raises:
      ValueError: the runs are of different models or tasks, or `make_plane`'s.
    """
    if len({_experiment(run) for run in runs}) > 1:
        folders = " and ".join(str(run.workdir) for run in runs)
        raise ValueError(f"{folders} are of different models or tasks: their losses can't be compared.")
    experiment = build(read_config(runs[0].workdir))
    model, params, task, *_ = experiment
    origin = experiment.origin(("train",))
    for run in runs:
        for change in changes(run.workdir, origin):
            logging.warning("The run in %s began with another: %s.", run.workdir, change)
    chosen = np.linspace(0, len(task.train) - 1, min(examples, len(task.train))).astype(int)
    batch, loss = task.collate([task.train[row] for row in chosen]), make_loss(model, task)
    plane = make_plane(params, [run.workdir / "adapter.safetensors" for run in runs])
    corners = np.concatenate([[[0.0, 0.0]], plane.at])
    low, high = corners.min(0), corners.max(0)
    margin = MARGIN * (high - low).max()
    xs, ys = (np.linspace(low[axis] - margin, high[axis] + margin, points) for axis in (0, 1))
    known = [losses(plane, loss, params, batch, corner[:1], corner[1:])[0, 0] for corner in corners]
    return Surface(plane, xs, ys, losses(plane, loss, params, batch, xs, ys), np.array(known))


def draw(runs: list[report.Run], found: Surface, path: pathlib.Path) -> None:
    """Draws the loss in color and contours, with the three models as stars, and the grid's lowest point as a cross."""
    figure, axes = plt.subplots(figsize=(8.5, 6.5), layout="constrained")
    levels = np.linspace(found.losses.min(), 1.1 * found.known.max(), 22)
    filled = axes.contourf(found.xs, found.ys, found.losses, levels, cmap="viridis", extend="max")
    axes.contour(found.xs, found.ys, found.losses, levels, colors="white", linewidths=0.4, alpha=0.5)
    names = ["W0", *(f"{report.label_of(run)}, seed {run.results['seed']}" for run in runs)]
    colors = ["white", *(color_of(run.results["method"]) for run in runs)]
    for name, (x, y), value, color in zip(names, [(0.0, 0.0), *found.plane.at], found.known, colors):
        axes.plot(x, y, "*", color=color, markeredgecolor="white", markersize=17)
        axes.annotate(f"{name}\nloss {value:.3f}", (x, y), xytext=(9, 7), textcoords="offset points", color="white", fontsize=10)
    row, column = np.unravel_index(found.losses.argmin(), found.losses.shape)
    axes.plot(found.xs[column], found.ys[row], "x", color="white", markersize=9)
    distance, title = "distance in weight space", f"{runs[0].results['task']}: the plane through the base model and two runs"
    axes.set(xlabel=distance, ylabel=distance, aspect="equal")
    axes.set_title(f"{title}, whose ways make an angle of {found.plane.degrees:.0f}°\n(cross: the lowest, {found.losses.min():.3f})", fontsize=11)
    figure.colorbar(filled, ax=axes, label="training loss", format="%.2f")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(_):
    quiet()
    options = flags.FLAGS
    runs = [run for folder in options.runs for run in report.find_runs(local(folder))]
    report.check(runs)
    if len(options.runs) == 1:
        runs = choose(runs)
    if len(runs) != 2:
        raise app.UsageError(
            f"--runs takes two finished runs, or one folder to choose them from, not {len(runs)} runs."
        )
    found = surface(runs, options.points, options.examples)
    draw(runs, found, local(options.out))
    for name, value, (x, y) in zip(("W0", *(run.workdir for run in runs)), found.known, ((0.0, 0.0), *found.plane.at)):
        print(f"{name}: loss {value:.4f}, at ({x:.3f}, {y:.3f})")
    print(f"The angle between the two ways: {found.plane.degrees:.1f} degrees. {options.out}")


if __name__ == "__main__":
    flags.DEFINE_list("runs", None, "Two finished runs, or one folder to choose them from.", required=True)
    flags.DEFINE_string("out", None, "The PNG to write.", required=True)
    flags.DEFINE_integer("points", 41, "Along each side of the grid.", lower_bound=2)
    flags.DEFINE_integer("examples", 256, "How many training examples the loss is the mean of.", lower_bound=1)
    run_command(main)
