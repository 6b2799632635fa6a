"""Trains one method on one task; run the same command again to go on from the last checkpoint.

  python -m experiments.train --config=configs/quickstart.py --config.method.d=1024 --workdir=runs/d1024

Several processes, each with the variables of experiments/processes.py set, make one run: see launch/.

The workdir then holds: config.json; origin.json (what its data and model were); checkpoints/ (what is trained, its optimizer, the
data position, the RNG; never the frozen model); metrics.jsonl and tensorboard/; adapter.safetensors (of the best epoch); results.json; predictions.jsonl;
of images mistakes.png; with config.train.export the adapted model, whole.
"""

import json
import pathlib
import statistics
from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_flags

from experiments import data, loop, metrics, processes
from experiments.build import Experiment, build
from experiments.command import run_command
from experiments.config import RATE_FREE, check_config, from_flags
from experiments.evaluate import forgetting, predict
from experiments.flops import matmul_flops
from experiments.logger import Logger, quiet
from experiments.optimizer import make_optimizer, options_of
from experiments.processes import barrier, is_writer
from experiments.step import make_loss, make_outputs, make_train_step, trained_shardings
from experiments.workdir import claim_workdir, clear_disk_errors, keep_origin, local, read_json, read_lines, write_json
from gpart_jax import base_norm, load_adapter, save_adapter, sharding
from gpart_jax.interop import huggingface
from gpart_jax.methods import Method, from_spec, trained_numbers


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path, devices: Sequence | None = None) -> dict:
    """Trains to the end, or goes on where an earlier run in `workdir` stopped.

    Args:
      config: as those of configs/.
      workdir: on a disk that all processes share, where there are several.
      devices: to make config.mesh of; all of every process by default.

    Returns:
      The results, as written to `workdir/results.json`.

    Raises:
      ValueError: a config with missing or unknown keys or values; a workdir that belongs to another config, other data or another
        model, or is in use.
      FloatingPointError: the loss or its gradient is no longer finite, unless config.train.nonfinite is "skip".
      OSError: the disk is full, or the workdir can't be written to.
      SystemExit: after a checkpoint was saved because of SIGTERM (code 143) or Ctrl-C (130).
    """
    check_config(config)
    processes.cache_programs(config.train.get("compiled"))
    method = from_spec(config.method.to_dict(), config.head_targets)
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    sharding.check_batch("config.train.batch_size", config.train.batch_size, mesh, config.train.accumulate)
    with clear_disk_errors(workdir), claim_workdir(config, workdir):
        return _train(config, workdir, method, mesh)


def _train(config: ml_collections.ConfigDict, workdir: pathlib.Path, method: Method, mesh: jax.sharding.Mesh) -> dict:
    barrier("claim_workdir")
    if (workdir / "results.json").exists():
        print(f"{workdir} is finished; see its results.json.")
        return read_json(workdir / "results.json")

    experiment = build(config, mesh)
    keep_origin(workdir, experiment.origin())
    task, schedule = experiment.task, loop.Schedule.from_options(config.train, experiment.task)
    options = options_of(config, method, experiment.params)
    optimizer = make_optimizer(schedule.total, **options)
    part, parts = sharding.data_part(mesh)
    batches = data.train_batches(
        task, config.train.batch_size, schedule.epochs, config.seed, part=part, parts=parts
    )
    engine = Alone(config, experiment, method, optimizer, mesh)
    state = sharding.fetch(loop.initial_state(config, method, optimizer, experiment.params))
    member = loop.Member(config, workdir, experiment, options, batches, state)

    def finish_member(member, number, logger, step, poll):
        finish(member, method, schedule, step, lambda *arguments: engine.score(number, *arguments, poll), logger, mesh)

    loop.run([member], engine, schedule, finish_member, config.method.name)
    return read_json(workdir / "results.json")


class Alone:
    """A `loop.Engine` of one run, whose batches are divided over the mesh."""

    def __init__(self, config, experiment: Experiment, method: Method, optimizer, mesh):
        model, params, task, rules, _ = experiment
        self._mesh, self._config, self._experiment = mesh, config, experiment
        self._shardings = sharding.param_shardings(params, mesh, rules)
        self._frozen = sharding.place(params, self._shardings)
        self._tables = sharding.replicate(method.tables(params), mesh)
        self._step = make_train_step(make_loss(model, task), method, optimizer, self._shardings, config.train.accumulate)
        self._outputs = make_outputs(model, task, method, self._shardings)
        self.parts = sharding.data_part(mesh)[1]
        # Without rematerialisation and with plain attention, whose products are counted: what the model itself needs.
        plain = make_loss(model.clone(remat="none", attention="xla"), task)
        self._plain = make_train_step(plain, method, optimizer, self._shardings, config.train.accumulate)
        self._flops: dict[tuple, float] = {}

    def place(self, states):
        (state,) = states
        own = trained_shardings(state["trainable"], state["optimizer"], self._shardings)
        self._shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state["trainable"], state["optimizer"]))
        places = dict(zip(("trainable", "optimizer"), own), key=NamedSharding(self._mesh, P()))
        return {name: sharding.place(state[name], place) for name, place in places.items()}

    def step(self, trained, batches, number):
        (batch,) = batches
        trainable, optimizer, numbers = self._step(
            trained["trainable"], trained["optimizer"], self._frozen, sharding.global_batch(batch, self._mesh),
            trained["key"], number, self._tables,
        )  # fmt: skip
        return trained | {"trainable": trainable, "optimizer": optimizer}, numbers

    def flops(self, batches):
        (batch,) = batches
        shapes = tuple(sorted((name, x.shape) for name, x in batch.items()))
        if shapes not in self._flops:
            frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._frozen)
            whole = {name: jax.ShapeDtypeStruct((self.parts * len(x), *x.shape[1:]), x.dtype) for name, x in batch.items()}
            key = jax.eval_shape(jax.random.key_data, jax.random.key(0))
            jaxpr = self._plain.trace(*self._shapes, frozen, whole, key, 0, self._tables).jaxpr
            divided = self._mesh.size if sharding.LEAVES in self._shapes[0] else self._mesh.shape["tensor"]
            self._flops[shapes] = matmul_flops(jaxpr, divided)
        return self._flops[shapes]

    def trainable(self, trained, number):
        return trained["trainable"]

    def optimizer(self, trained, number):
        return trained["optimizer"]

    def score(self, number, examples, trainable, poll):
        task = self._experiment.task
        trainable = sharding.place(trainable, sharding.of_trained(trainable, self._shardings))
        of_batch = lambda batch: self._outputs(trainable, self._frozen, batch, self._tables)
        logits = predict(task, of_batch, self._mesh, examples, self._config.train.eval_batch_size, poll)
        return metrics.score(task, examples, logits), logits


def finish(
    member: loop.Member, method: Method, schedule: loop.Schedule, step: int, score: Callable, logger: Logger, mesh, **more
) -> None:
    """Saves the best validation's adapter, tests it as it lies on disk, and writes predictions.jsonl and results.json."""
    config, workdir, experiment, best = member.config, member.workdir, member.experiment, member.state["best"]
    task, adapter = experiment.task, workdir / "adapter.safetensors"
    save_adapter(adapter, method, best["trainable"], experiment.params, drawn=experiment.drawn)
    _, loaded = load_adapter(adapter).on(experiment.params)
    scores, logits = score(task.test, loaded)
    shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    best_step = min(int(best["epoch"]) * schedule.every, step)
    best_epoch = best_step / schedule.epoch
    best_epoch = round(best_epoch, 2) if best_step % schedule.epoch else int(best_epoch)
    logger.say(f"test {shown} with the adapter of epoch {best_epoch}: {adapter}")
    if task.other_text:
        after = score(task.other_text, loaded)[0]["loss"]
        more |= forgetting(experiment, mesh, config.train.eval_batch_size, after)
        logger.say(f"forgetting {more['forgetting']:.4f}: {config.task.forgetting} has {after:.4f} nats a token")
    if config.train.get("export"):
        adapted = load_adapter(adapter).merge(experiment.params).params  # or an error where they aren't finite
        huggingface.export(
            workdir / "model", experiment.model, adapted, labels=task.labels, base=config.model.source or None, overwrite=True
        )
        logger.say(f"the adapted model, as a Hugging Face directory: {workdir / 'model'}")
    if not is_writer():
        barrier("results")
        return
    write_predictions(workdir / "predictions.jsonl", task, task.test, logits)
    rows = read_lines(workdir / "metrics.jsonl")
    memory = [row["device_memory"] for row in rows if "device_memory" in row]
    more |= {"test_by_class": metrics.by_class(task, task.test, logits)} if task.labels else {}
    if task.augment:
        from experiments.plots import draw_mistakes  # here, because Matplotlib is a fifth of a run's start

        draw_mistakes(task, logits, workdir / "mistakes.png")
    select = config.train.get("select", "heldout")
    if select == "scored":
        more["test_by_protocol"] = by_protocol(rows, task) | {"scored": scores[task.metrics[0]]}
    results = {
        "method": config.method.name,
        "task": config.task.name,
        "seed": config.seed,
        "metric": task.metrics[0],
        "test": scores[task.metrics[0]],
        "test_scores": scores,
        "validation": task.better * float(best["score"]) if task.validation and select == "heldout" else None,
        "select": select if task.validation or select != "heldout" else "last",
        "best_epoch": best_epoch,
        "steps": step,
        "learning_rate": None if member.optimizer.get("name") in RATE_FREE else member.optimizer["lr"],
        **({"base_norm": base_norm(experiment.params, method.options["targets"])} if method.isometric else {}),
        "trained_numbers": trained_numbers(best["trainable"]),
        "adapter_bytes": adapter.stat().st_size,
        # The median leaves out the laps in which a step was compiled.
        "seconds_per_step": statistics.median(row["seconds_per_step"] for row in rows if "seconds_per_step" in row),
        "training_seconds": training_seconds(rows),
        **({"device_memory": max(memory)} if memory else {}),
        "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        **more,
    }
    write_json(workdir / "results.json", results)
    barrier("results")


def by_protocol(rows: list[dict], task: data.Task) -> dict[str, float]:
    """The test's first metric at the last validation, and at the best by held-out examples, from a log that has all of them."""
    found = {row["step"]: row for row in rows if f"test_{task.metrics[0]}" in row}
    held = {row["step"]: row[f"validation_{task.metrics[0]}"] for row in rows if f"validation_{task.metrics[0]}" in row}
    steps = {"last": max(found)}
    if held:
        steps["heldout"] = max(sorted(held), key=lambda step: task.better * held[step])
    return {protocol: found[step][f"test_{task.metrics[0]}"] for protocol, step in steps.items()}


def training_seconds(rows: list[dict]) -> float:
    """What all steps of a log took, with compiling, without what came between them; of a lap that was cut short its share counts."""
    laps = [(row["step"], row["seconds_per_step"]) for row in rows if "seconds_per_step" in row]
    return sum((step - before) * seconds for (step, seconds), (before, _) in zip(laps, [(0, 0.0), *laps]))


def write_predictions(path: pathlib.Path, task: data.Task, examples: list[dict], logits: np.ndarray) -> None:
    """One JSON object a line: what is known of the example, the predicted label or score, the logits.

    Of a decoder: the loss, in nats a token, and the number of tokens.
    """
    with path.open("w") as file:
        for example, row, prediction in zip(examples, logits.tolist(), metrics.predictions(task, logits).tolist()):
            known = {name: value for name, value in example.items() if not isinstance(value, np.ndarray | bytes)}
            found = {"prediction": prediction, "logits": row}
            if task.language:
                found = {"loss": row[0] / row[1], "tokens": int(row[1])}
            file.write(json.dumps(known | found) + "\n")


def main(_):
    quiet()
    processes.join(flags.FLAGS.join_timeout)
    train(from_flags(), local(flags.FLAGS.workdir))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What to train: a file of configs/.")
    flags.DEFINE_string("workdir", None, "Directory for everything that the run writes.", required=True)
    flags.DEFINE_float("join_timeout", 300, "Seconds in which all processes of a run must come.", lower_bound=1)
    run_command(main)
