"""The test loss around what two runs learned: a plane through weight space for each, on one scale.

python -m experiments.surface --runs=runs/gpart,runs/lora --out=surface.png
python -m experiments.surface --runs=runs/glue --out=surface.png    the GPart run of the highest d there, and a LoRA run

Each plane has two random directions, orthonormal in what the run trained; its head stays as it was trained. The axes
are distances in weight space. With a method that is linear in what it trains, as GPart, these are true all along the
axes; with others, as LoRA, whose two factors are multiplied, at the edge only, and the axes say so.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from absl import app, flags, logging
from jax.flatten_util import ravel_pytree
from matplotlib import pyplot as plt

from experiments import report
from experiments.build import build
from experiments.command import run_command
from experiments.logger import quiet
from experiments.plots import color_of
from experiments.step import make_loss
from experiments.workdir import changes, local, read_config
from gpart_jax import load_adapter
from gpart_jax.targets import named_leaves


class Plane(NamedTuple):
    """Around what a run trained, its head apart: at (x, y), trained + x * directions[0] + y * directions[1]."""

    adapt: Callable  # adapt(params, numbers) -> the adapted model
    trained: jax.Array  # (n,)
    directions: jax.Array  # (2, n), of such length that x = radius lies at that distance in weight space
    halfway: float  # the distance in weight space of x = radius / 2, divided by radius: 0.5 if the method is linear


def make_plane(params, adapter: pathlib.Path, radius: float, seed: int = 0) -> Plane:
    """Two random directions around an adapter, orthonormal but for their scale.

    Args:
      params: the frozen model.
      adapter: the file of a run.
      radius: half the plane's width, as a distance in weight space.
      seed: of the directions.

    Raises:
      ValueError: the run trained its head alone.
    """
    method, trainable = load_adapter(adapter).on(params)
    trained, unravel = ravel_pytree({name: part for name, part in trainable.items() if name not in ("head", "given")})
    if not trained.size:
        raise ValueError(f"{adapter} is a head alone, which stays as it is here. Choose a run of another method.")

    tables = method.tables(params)

    def adapt(params, numbers):
        return method.apply(params, trainable | unravel(numbers), None, tables)

    @jax.jit
    def distance(params, step):
        return weight_distance(adapt(params, trained + step), adapt(params, trained))

    random = np.random.default_rng(seed).normal(size=(trained.size, 2))
    directions = np.linalg.qr(random)[0].T.astype(np.float32)
    scales = np.ones(2)
    for axis, direction in enumerate(directions):
        for _ in range(30):  # the distance grows between linearly and quadratically, so that a root's step converges
            scales[axis] *= np.sqrt(radius / distance(params, radius * scales[axis] * direction))
    directions = jnp.asarray(scales[:, None] * directions, jnp.float32)
    return Plane(adapt, trained, directions, float(distance(params, radius / 2 * directions[0])) / radius)


def moved(params, adapter: pathlib.Path) -> float:
    """The distance in weight space that an adapter moves a model, its head apart."""
    method, trainable = load_adapter(adapter).on(params)
    adapted = jax.jit(method.apply)(params, trainable, None, method.tables(params))
    heads, pairs = trainable.get("head", {}), zip(named_leaves(adapted), named_leaves(params))
    both = {path: (new, old) for (path, new), (_, old) in pairs if path not in heads}
    return float(weight_distance(*zip(*both.values())))


def weight_distance(one, other) -> jax.Array:
    """The Euclidean distance between two models' weights."""
    parts = jax.tree.map(lambda a, b: jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(), one, other)
    return jnp.sqrt(sum(jax.tree.leaves(parts)))


def losses(plane: Plane, loss: Callable, params, batch: dict, at: np.ndarray, title: str) -> np.ndarray:
    """The loss of one batch at each (x, y) of at x at, float32 (points, points), rows being y. Shows its progress."""

    @jax.jit
    def row(plane_numbers, params, batch, y):
        trained, (across, up) = plane_numbers

        def point(x):
            return loss(lambda frozen: plane.adapt(frozen, trained + x * across + y * up), params, batch)

        return jax.lax.map(point, jnp.asarray(at, jnp.float32))

    numbers = (plane.trained, plane.directions)
    return np.stack([np.asarray(row(numbers, params, batch, y)) for y in rich.progress.track(at, title)])


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
    run: report.Run
    plane: Plane
    losses: np.ndarray  # float32 (points, points); rows are y


def surfaces(runs: list[report.Run], radius: float | None, points: int, examples: int) -> tuple[float, list[Surface]]:
    """The radius, and the losses around each run on so many test examples, evenly spaced over the test split.

    Args:
      runs: of one model and task.
      radius: half the planes' width, in weight space; None: as far as the first run moved its weights.
      points: along each side of the grid.
      examples: how many the loss is the mean of, at most.

    Raises:
      ValueError: the runs are of different models or tasks.
    """
    if len({_experiment(run) for run in runs}) > 1:
        folders = " and ".join(str(run.workdir) for run in runs)
        raise ValueError(f"{folders} are of different models or tasks: their losses can't be compared.")
    experiment = build(read_config(runs[0].workdir))
    model, params, task, *_ = experiment
    origin = experiment.origin(("test",))
    for run in runs:
        for change in changes(run.workdir, origin):
            logging.warning("The run in %s began with another: %s.", run.workdir, change)
    chosen = np.linspace(0, len(task.test) - 1, min(examples, len(task.test))).astype(int)
    batch = task.collate([task.test[row] for row in chosen])
    radius = radius or moved(params, runs[0].workdir / "adapter.safetensors")
    at, found = np.linspace(-radius, radius, points), []
    for run in runs:
        plane = make_plane(params, run.workdir / "adapter.safetensors", radius)
        values = losses(plane, make_loss(model, task), params, batch, at, f"{run.results['method']}, {points} rows")
        found.append(Surface(run, plane, values))
    return radius, found


def draw(radius: float, found: list[Surface], path: pathlib.Path) -> None:
    """Draws surfaces side by side, with the same colors and contours."""
    figure, panels = plt.subplots(1, len(found), figsize=(12.5, 6), layout="constrained", sharey=True)
    every = np.stack([surface.losses for surface in found])
    levels = np.linspace(every.min(), every.max(), 16)
    for axes, (run, plane, values) in zip(panels, found):
        at = np.linspace(-radius, radius, len(values))
        filled = axes.contourf(at, at, values, levels, cmap="viridis")
        axes.contour(at, at, values, levels, colors="white", linewidths=0.4, alpha=0.6)
        axes.plot(0, 0, "*", color="white", markeredgecolor=color_of(run.results["method"]), markersize=16)
        x = "distance in weight space"
        if abs(plane.halfway - 0.5) > 0.005:
            x += f", at the edge only\n(half-way there it is {plane.halfway * radius:.3g}, not {radius / 2:.3g})"
        axes.set(title=f"{report.rows([run])[0].label}, seed {run.results['seed']}", xlabel=x, aspect="equal")
    panels[0].set_ylabel("distance in weight space")
    figure.colorbar(filled, ax=panels, label=f"test loss, {found[0].run.results['task']}", format="%.2f", shrink=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(_):
    quiet()
    runs = [run for folder in flags.FLAGS.runs for run in report.find_runs(local(folder))]
    report.check(runs)
    if len(flags.FLAGS.runs) == 1:
        runs = choose(runs)
    if len(runs) != 2:
        raise app.UsageError(
            f"--runs takes two finished runs, or one folder to choose them from, not {len(runs)} runs."
        )
    draw(*surfaces(runs, flags.FLAGS.radius, flags.FLAGS.points, flags.FLAGS.examples), local(flags.FLAGS.out))


if __name__ == "__main__":
    flags.DEFINE_list("runs", None, "Two finished runs, or one folder to choose them from.", required=True)
    flags.DEFINE_string("out", None, "The PNG to write.", required=True)
    flags.DEFINE_float("radius", None, "Half the planes' width, in weight space; else as far as the first run moved.")
    flags.DEFINE_integer("points", 21, "Along each side of the grid.", lower_bound=2)
    flags.DEFINE_integer("examples", 256, "How many test examples the loss is the mean of.", lower_bound=1)
    run_command(main)
