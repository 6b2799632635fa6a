"""Trains one method on one task; run the same command again to go on from the last checkpoint.

  python -m experiments.train --config=configs/quickstart.py --config.method.d=1024 --workdir=runs/d1024

Several processes, each with the variables of experiments/processes.py set, make one run: see launch/.

The workdir then holds: config.json; checkpoints/ (what is trained, its optimizer, the data position, the RNG; never the
frozen model); metrics.jsonl and tensorboard/; adapter.safetensors (of the best epoch); results.json; predictions.jsonl;
of images mistakes.png; with config.train.export the adapted model, whole.
"""

import faulthandler
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from experiments import data, evaluate, processes
from experiments.checkpoint import EXIT_CODES, Checkpoints, Interrupt, claim_workdir, clear_disk_errors, write_json
from experiments.config import check_config
from experiments.logger import Logger, quiet
from experiments.optimizer import make_optimizer
from experiments.processes import barrier, is_writer
from experiments.step import make_loss, make_outputs, make_train_step
from gpart_jax import load_adapter, save_adapter, sharding
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
      ValueError: a config with missing or unknown keys or values; a workdir that belongs to another config, or is in use.
      FloatingPointError: the loss is no longer finite, unless config.train.nonfinite is "skip".
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
        return json.loads((workdir / "results.json").read_text())

    experiment = evaluate.build(config, mesh)
    model, params, task, rules = experiment
    steps_per_epoch = len(task.train) // config.train.batch_size
    total_steps = config.train.epochs * steps_per_epoch
    optimizer = make_optimizer(total_steps, **config.optimizer)
    part, parts = sharding.data_part(mesh)
    batches = data.train_batches(
        task, config.train.batch_size, config.train.epochs, config.seed, part=part, parts=parts
    )

    state = initial_state(config, method, optimizer, params)
    shardings = sharding.param_shardings(params, mesh, rules)
    frozen = sharding.place(params, shardings)
    train_step = make_train_step(make_loss(model, task), method, optimizer, shardings, config.train.accumulate)
    tables = sharding.replicate(method.tables(params), mesh)
    outputs = make_outputs(model, task, method, shardings)

    def score(examples, trainable) -> tuple[dict[str, float], np.ndarray]:
        trainable = sharding.replicate(trainable, mesh)
        of_batch = lambda batch: outputs(trainable, frozen, batch, tables)
        logits = evaluate.predict(task, of_batch, mesh, examples, config.train.eval_batch_size)
        return evaluate.score(task, examples, logits), logits

    with Checkpoints(workdir) as checkpoints, Interrupt() as interrupt:
        state = jax.tree.map(np.array, checkpoints.restore(state, batches))
        step = int(state["step"])
        state |= sharding.replicate({name: state[name] for name in ("trainable", "optimizer", "key")}, mesh)
        with Logger(workdir, config.method.name, step, total_steps) as logger:
            logger.say(f"{'goes on after' if step else 'starts at'} step {step} of {total_steps}")
            watch, losses = Stopwatch(config.train.get("step_timeout")), []
            while step < total_steps:
                batch = next(batches)
                state["trainable"], state["optimizer"], loss = train_step(
                    state["trainable"],
                    state["optimizer"],
                    frozen,
                    sharding.global_batch(batch, mesh),
                    state["key"],
                    step,
                    tables,
                )
                step += 1
                losses.append(loss)
                logger.advance(step)
                watch.step(parts * np.count_nonzero(batch["attention_mask"]) if "attention_mask" in batch else 0)

                if step % config.train.log_every == 0 or step % steps_per_epoch == 0:
                    mean = finite_mean(np.asarray(jnp.stack(losses)), step, steps_per_epoch, config.train, logger.say)
                    logger.write(step, loss=mean, **watch.lap())
                    losses = []
                if step % steps_per_epoch == 0:
                    epoch = step // steps_per_epoch
                    scores = score(task.validation, state["trainable"])[0] if task.validation else {}
                    keep_best(state, state["trainable"], task, scores, epoch)
                    if scores:
                        logger.write(step, **{f"validation_{name}": value for name, value in scores.items()})
                    shown = "".join(f"  validation {name} {value:.4f}" for name, value in scores.items())
                    logger.say(f"epoch {epoch} of {config.train.epochs}  loss {mean:.4f}{shown}")
                    watch.restart()
                stop = interrupt.requested(step)  # read once: it may come at any moment
                if stop or step % config.train.checkpoint_every == 0 or step == total_steps:
                    if losses:  # a checkpoint after a step to stop at would hide it from the run that goes on
                        finite_mean(np.asarray(jnp.stack(losses)), step, steps_per_epoch, config.train, lambda _: None)
                    checkpoints.save(state | {"step": step}, batches)
                    watch.restart()
                if stop:
                    checkpoints.wait()
                    logger.say(f"{stop}: saved step {step}. Run the same command to go on.")
                    sys.exit(EXIT_CODES[stop])

            watch.stop()
            return finish(config, workdir, experiment, state["best"], total_steps, score, logger, mesh)


def initial_state(config, method: Method, optimizer: optax.GradientTransformation, params) -> dict:
    """What a run saves and goes on from, before its first step."""
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    trainable = method.init(params, init_key)
    return {
        "step": 0,
        "trainable": trainable,
        "optimizer": optimizer.init(trainable),
        "key": jax.random.key_data(dropout_key),
        "best": {"trainable": trainable, "score": -math.inf, "epoch": 0},
    }


def keep_best(state: dict, trainable, task: data.Task, scores: dict, epoch: int) -> None:
    """Remembers in state["best"] what an epoch ended with, if it is the best so far, or if no validation tells."""
    sign = -1 if task.metrics[0] == "loss" else 1
    value = sign * scores.get(task.metrics[0], -sign * math.inf)
    if value > state["best"]["score"] or not task.validation:
        state["best"] = {"trainable": jax.tree.map(np.array, trainable), "score": value, "epoch": epoch}


def finite_mean(
    losses: np.ndarray, step: int, steps_per_epoch: int, options, say: Callable[[str], None], whose: str = ""
) -> float:
    """The mean of the losses of the steps up to `step`; those that aren't finite, which changed nothing, are left out.

    Raises:
      FloatingPointError: there is one, and options.nonfinite isn't "skip".
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if not len(bad):
        return float(losses.mean())
    first = step - len(losses) + 1 + int(bad[0])
    epoch, batch = divmod(first - 1, steps_per_epoch)
    where = f"The loss{whose} is {losses[bad[0]]} at step {first}, batch {batch + 1} of epoch {epoch + 1}"
    if options.get("nonfinite", "stop") == "stop":
        raise FloatingPointError(
            f"{where}. That step changed nothing, and the last checkpoint is good. Lower config.optimizer.lr, look at that "
            f"batch, or pass over such steps with --config.train.nonfinite=skip."
        )
    say(f"{where}: passed over, as {len(bad)} of the last {len(losses)} steps were")
    return float(np.mean(losses[np.isfinite(losses)])) if len(bad) < len(losses) else math.nan


def finish(config, workdir, experiment, best: dict, total_steps: int, score: Callable, logger: Logger, mesh, **more):
    """Saves the best epoch's adapter, tests it as it lies on disk, and writes predictions.jsonl and results.json."""
    task, adapter = experiment.task, workdir / "adapter.safetensors"
    method = from_spec(config.method.to_dict(), config.head_targets)
    save_adapter(adapter, method, best["trainable"], experiment.params)
    _, loaded = load_adapter(adapter).on(experiment.params)
    scores, logits = score(task.test, loaded)
    shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    logger.say(f"test {shown} with the adapter of epoch {best['epoch']}: {adapter}")
    if config.train.get("export"):
        adapted = load_adapter(adapter).apply(experiment.params)
        huggingface.export(
            workdir / "model", experiment.model, adapted, labels=task.labels, tokenizer=config.model.source
        )
        logger.say(f"the adapted model, as a Hugging Face directory: {workdir / 'model'}")
    if not is_writer():
        barrier("results")
        return json.loads((workdir / "results.json").read_text())
    write_predictions(workdir / "predictions.jsonl", task, task.test, logits)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    more |= {"test_by_class": evaluate.by_class(task, task.test, logits)} if task.labels else {}
    if task.augment:
        from experiments.plots import draw_mistakes  # here, because Matplotlib is a fifth of a run's start

        draw_mistakes(task, logits, workdir / "mistakes.png")
    results = {
        "method": config.method.name,
        "task": config.task.name,
        "seed": config.seed,
        "metric": task.metrics[0],
        "test": scores[task.metrics[0]],
        "test_scores": scores,
        "validation": float(best["score"]) if task.validation else None,
        "best_epoch": int(best["epoch"]),
        "steps": total_steps,
        "trained_numbers": trained_numbers(best["trainable"]),
        "adapter_bytes": adapter.stat().st_size,
        # The median leaves out the laps in which a step was compiled.
        "seconds_per_step": statistics.median(row["seconds_per_step"] for row in rows if "seconds_per_step" in row),
        "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        **more,
    }
    write_json(workdir / "results.json", results)
    barrier("results")
    return results


class Stopwatch:
    """Seconds a step, from laps of several steps that nothing else came between; and a watchdog over what takes for ever.

    Args:
      timeout: seconds in which each lap, and what comes between laps, must end; else the process says where all its
        threads are, and ends with code 1, for a launcher to start it again. None: there is no limit.
    """

    def __init__(self, timeout: float | None = None):
        self._timeout = timeout
        self.restart()

    def restart(self) -> None:
        self._steps, self._tokens, self._start = 0, 0, time.perf_counter()
        if self._timeout:
            faulthandler.dump_traceback_later(self._timeout, exit=True)

    def stop(self) -> None:
        if self._timeout:
            faulthandler.cancel_dump_traceback_later()

    def step(self, tokens: int = 0) -> None:
        """Counts a step; of text, its tokens without padding."""
        self._steps += 1
        self._tokens += tokens

    def lap(self) -> dict[str, float]:
        """Ends a lap, once its last step's result has been waited for: seconds_per_step; of text tokens_per_second."""
        seconds = time.perf_counter() - self._start
        found = {"seconds_per_step": seconds / self._steps}
        if self._tokens:
            found["tokens_per_second"] = self._tokens / seconds
        self.restart()
        return found


def write_predictions(path: pathlib.Path, task: data.Task, examples: list[dict], logits: np.ndarray) -> None:
    """One JSON object a line: what is known of the example, the predicted label or score, the logits.

    Of a decoder: the loss, in nats a token, and the number of tokens.
    """
    with path.open("w") as file:
        for example, row, prediction in zip(examples, logits.tolist(), evaluate.predictions(task, logits).tolist()):
            known = {name: value for name, value in example.items() if not isinstance(value, np.ndarray | bytes)}
            found = {"prediction": prediction, "logits": row}
            if task.metrics == ("loss",):
                found = {"loss": row[0] / row[1], "tokens": int(row[1])}
            file.write(json.dumps(known | found) + "\n")


def main(_):
    quiet()
    processes.join(flags.FLAGS.join_timeout)
    train(flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What to train: a file of configs/.")
    flags.DEFINE_string("workdir", None, "Directory for everything that the run writes.", required=True)
    flags.DEFINE_float("join_timeout", 300, "Seconds in which all processes of a run must come.", lower_bound=1)
    app.run(main)
