"""Trains one method on one task; run the same command again to go on from the last checkpoint.

  python -m experiments.train --config=configs/quickstart.py --config.method.d=1024 --workdir=runs/d1024

The workdir then holds: config.json; checkpoints/ (what is trained, its optimizer, the data position, the RNG; never the
frozen model); metrics.jsonl and tensorboard/; adapter.safetensors (of the best epoch); results.json; predictions.jsonl.
"""

import json
import math
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from experiments import data, evaluate
from experiments.checkpoint import Checkpoints, Interrupt, claim_workdir, write_json
from experiments.config import check_config
from experiments.logger import Logger, quiet
from experiments.optimizer import make_optimizer
from experiments.step import make_loss, make_train_step
from gpart_jax import load_adapter, save_adapter
from gpart_jax.methods import from_spec, trained_numbers


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
    """Trains to the end, or goes on where an earlier run in `workdir` stopped.

    Returns:
      The results, as written to `workdir/results.json`.

    Raises:
      ValueError: a config with missing or unknown keys or values; a workdir that belongs to another config.
      FloatingPointError: the loss is no longer finite.
      SystemExit: with code 143, after a checkpoint was saved because of SIGTERM or Ctrl-C.
    """
    check_config(config)
    method = from_spec(config.method.to_dict(), config.head_targets)
    claim_workdir(config, workdir)
    if (workdir / "results.json").exists():
        print(f"{workdir} is finished; see its results.json.")
        return json.loads((workdir / "results.json").read_text())

    experiment = evaluate.build(config)
    model, frozen, task = experiment
    steps_per_epoch = len(task.train) // config.train.batch_size
    total_steps = config.train.epochs * steps_per_epoch
    optimizer = make_optimizer(total_steps, **config.optimizer)
    if config.train.batch_size % config.train.accumulate:
        raise ValueError(
            f"config.train.batch_size = {config.train.batch_size} must be a multiple of config.train.accumulate = "
            f"{config.train.accumulate}."
        )
    batches = data.train_batches(
        task, config.train.batch_size, config.train.epochs, config.seed, model.config.pad_token_id
    )

    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    trainable = method.init(frozen, init_key)
    state = {
        "step": 0,
        "trainable": trainable,
        "optimizer": optimizer.init(trainable),
        "key": jax.random.key_data(dropout_key),
        "best": {"trainable": trainable, "score": -math.inf, "epoch": 0},
    }

    train_step = make_train_step(make_loss(model, method, task), optimizer, config.train.accumulate)
    adapt = jax.jit(method.apply)

    def score(examples, trainable) -> tuple[dict[str, float], np.ndarray]:
        logits = evaluate.predict(experiment, adapt(frozen, trainable), examples, config.train.eval_batch_size)
        return evaluate.score(task, examples, logits), logits

    with Checkpoints(workdir) as checkpoints, Interrupt() as interrupt:
        state = jax.tree.map(np.array, checkpoints.restore(state, batches))
        step = int(state["step"])
        with Logger(workdir, config.method.name, step, total_steps) as logger:
            if step:
                logger.say(f"goes on after step {step} of {total_steps}")
            watch, losses = Stopwatch(), []
            while step < total_steps:
                state["trainable"], state["optimizer"], loss = train_step(
                    state["trainable"], state["optimizer"], frozen, next(batches), state["key"], step
                )
                step += 1
                losses.append(loss)
                logger.advance(step)
                watch.step()

                if step % config.train.log_every == 0 or step % steps_per_epoch == 0:
                    mean = float(jnp.stack(losses).mean())
                    if not math.isfinite(mean):
                        raise FloatingPointError(f"The loss is {mean} at step {step}. Lower config.optimizer.lr.")
                    logger.write(step, loss=mean, seconds_per_step=watch.lap())
                    losses = []
                if step % steps_per_epoch == 0:
                    epoch = step // steps_per_epoch
                    scores = score(task.validation, state["trainable"])[0] if task.validation else {}
                    value = scores.get(task.metrics[0], -math.inf)
                    if value > state["best"]["score"] or not task.validation:  # without one, the last epoch is kept
                        kept = jax.tree.map(np.array, state["trainable"])
                        state["best"] = {"trainable": kept, "score": value, "epoch": epoch}
                    if scores:
                        logger.write(step, **{f"validation_{name}": value for name, value in scores.items()})
                    shown = "".join(f"  validation {name} {value:.4f}" for name, value in scores.items())
                    logger.say(f"epoch {epoch} of {config.train.epochs}  loss {mean:.4f}{shown}")
                    watch.restart()
                stop = interrupt.requested  # read once: it may come at any moment
                if stop or step % config.train.checkpoint_every == 0 or step == total_steps:
                    checkpoints.save(state | {"step": step}, batches)
                    watch.restart()
                if stop:
                    checkpoints.wait()
                    logger.say(f"{stop}: saved step {step}. Run the same command to go on.")
                    sys.exit(143)

            # The test score is that of the adapter as it lies on disk, not of the arrays it was written from.
            best, adapter = state["best"], workdir / "adapter.safetensors"
            save_adapter(adapter, config.method.to_dict(), best["trainable"], frozen, config.head_targets)
            _, loaded = load_adapter(adapter, frozen)
            scores, logits = score(task.test, loaded)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            logger.say(f"test {shown} with the adapter of epoch {best['epoch']}: {adapter}")

    write_predictions(workdir / "predictions.jsonl", task, task.test, logits)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
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
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    write_json(workdir / "results.json", results)
    return results


class Stopwatch:
    """Seconds a step, from laps of several steps that nothing else came between."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._steps, self._start = 0, time.perf_counter()

    def step(self) -> None:
        self._steps += 1

    def lap(self) -> float:
        """Ends a lap, once its last step's result has been waited for."""
        seconds = (time.perf_counter() - self._start) / self._steps
        self.restart()
        return seconds


def write_predictions(path: pathlib.Path, task: data.Task, examples: list[dict], logits: np.ndarray) -> None:
    """One JSON object a line: what is known of the example, the predicted label or score, the logits."""
    with path.open("w") as file:
        for example, row, prediction in zip(examples, logits.tolist(), evaluate.predictions(task, logits).tolist()):
            known = {name: value for name, value in example.items() if name not in data.INPUTS}
            file.write(json.dumps(known | {"prediction": prediction, "logits": row}) + "\n")


def main(_):
    quiet()
    train(flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What to train: a file of configs/.")
    flags.DEFINE_string("workdir", None, "Directory for everything that the run writes.", required=True)
    app.run(main)
