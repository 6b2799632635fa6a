"""The training loop, of one run or of several that are trained together (population.py).

It validates, steps, logs and saves, in this order: what a checkpoint holds is a step's end, and a run that goes on from it
validates there again.
"""

import contextlib
import faulthandler
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import ml_collections
import numpy as np
import optax

from experiments import data
from experiments.build import Experiment
from experiments.checkpoint import Checkpoints
from experiments.config import RATE_FREE
from experiments.flops import peak
from experiments.logger import Logger
from experiments.optimizer import rate_at
from experiments.signals import EXIT_CODES, Interrupt, Interrupted
from gpart_jax import sharding
from gpart_jax.methods import Method


class Member(NamedTuple):
    """A run."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    experiment: Experiment
    optimizer: dict  # options of `make_optimizer`
    batches: Any  # an iterator whose position can be saved
    state: dict  # of `initial_state`, on the host


def initial_state(config, method: Method, optimizer: optax.GradientTransformation, params) -> dict:
    """What a run saves and goes on from, before its first step. "best" is of the validation of that number."""
    key = jax.random.key(config.seed)  # which draws a fresh head's leaves, by their numbers
    trainable, dropout_key = method.init(params, jax.random.split(key)[0]), jax.random.fold_in(key, 2**32 - 1)
    return {
        "step": 0,
        "trainable": trainable,
        "optimizer": optimizer.init(trainable),
        "key": jax.random.key_data(dropout_key),
        "best": {"trainable": trainable, "score": -math.inf, "epoch": 0},
    }


class Engine(Protocol):
    """How the members' steps are computed.

    parts: into how many equal parts batches are divided, of which this process feeds one.
    """

    parts: int

    def flops(self, batches: list[dict]) -> float:
        """Operations of a step on each device, as `flops.matmul_flops` counts them; 0: it isn't counted."""

    def place(self, states: list[dict]) -> Any:
        """What is trained, on the devices."""

    def step(self, trained: Any, batches: list[dict], number: int) -> tuple[Any, dict[str, jax.Array]]:
        """(trained, numbers) after a step, the numbers of `step.take_step` for each member."""

    def trainable(self, trained: Any, number: int) -> Any:
        """A member's trainable, on the host or on the devices."""

    def optimizer(self, trained: Any, number: int) -> Any:
        """A member's optimizer state, likewise."""

    def score(self, number: int, examples: Sequence[dict], trainable: Any, poll: Callable[[], None]) -> tuple[dict, np.ndarray]:
        """(scores, logits) of a member's trainable; `poll` is called between batches."""


class Schedule(NamedTuple):
    """Of how many steps a training is, and after which of them it validates."""

    total: int
    epoch: int
    every: int

    @classmethod
    def from_options(cls, options: ml_collections.ConfigDict, task: data.Task) -> "Schedule":
        epoch = len(task.train) // options.batch_size
        return cls(options.get("steps") or options.epochs * epoch, epoch, options.get("validate_every") or epoch)

    @property
    def epochs(self) -> int:
        """How often the data is gone through, the last time perhaps not to its end."""
        return -(-self.total // max(1, self.epoch))  # 0 where a batch is larger than the data, which train_batches refuses

    def validation(self, step: int) -> int:
        """How many validations there are up to a step; that at the end is always one."""
        return -(-step // self.every) if step == self.total else step // self.every


def run(members: list[Member], engine: Engine, schedule: Schedule, finish: Callable, title: str) -> None:
    """Trains to the end, or goes on after the newest checkpoint; then `finish(member, number, logger, step, poll)` for each.

    Raises:
      FloatingPointError: a loss or a gradient is no longer finite, unless config.train.nonfinite is "skip".
      SystemExit: after a checkpoint was saved because of SIGTERM (code 143) or Ctrl-C (130).
    """
    options = members[0].config.train
    with contextlib.ExitStack() as stack:
        checkpoints = [stack.enter_context(Checkpoints(member.workdir)) for member in members]
        interrupt = stack.enter_context(Interrupt())
        members, step = restore(members, checkpoints)
        states = [member.state for member in members]
        writers = options.get("writers", ("tensorboard",))
        loggers = [
            stack.enter_context(Logger(member.workdir, title, step, schedule.total, not number, writers))
            for number, member in enumerate(members)
        ]
        say = loggers[0].say
        say(f"{'goes on after' if step else 'starts at'} step {step} of {schedule.total}")
        trained, saved = engine.place(states), step
        watch, history = Stopwatch(options.get("step_timeout"), engine), []
        profile = Profile(options.get("profile"), members[0].workdir)
        stack.callback(watch.stop)
        stack.callback(profile.stop)

        def save():
            nonlocal saved
            for number, (checkpoint, member) in enumerate(zip(checkpoints, members)):
                now = {"trainable": engine.trainable(trained, number), "optimizer": engine.optimizer(trained, number)}
                checkpoint.save(sharding.fetch(member.state | now | {"step": step}), member.batches)
            saved = step

        def poll():
            if name := interrupt.requested(step):
                raise Interrupted(name)

        try:
            while True:
                if step and (step % schedule.every == 0 or step == schedule.total):
                    validate(members, engine, trained, schedule, step, loggers, poll)
                    watch.restart()
                if step == schedule.total or waited(members, schedule, step, options.get("patience")):
                    break
                profile.before(step)
                batches = [next(member.batches) for member in members]
                trained, numbers = engine.step(trained, batches, step)
                step += 1
                history.append(numbers)
                profile.after(step, numbers, say)
                loggers[0].advance(step)
                watch.step(batches)
                ends = step == schedule.total or step % schedule.every == 0 or step % schedule.epoch == 0
                if step % options.log_every == 0 or ends:
                    log(history, members, loggers, schedule, step, watch)
                    history = []
                poll()
                if step % options.checkpoint_every == 0 or step == schedule.total:
                    check_finite(history, members, schedule, step)
                    save()
                    watch.restart()
            if saved != step:  # it stopped early
                save()
            watch.stop()
            for number, (member, logger) in enumerate(zip(members, loggers)):
                finish(member, number, logger, step, poll)
        except Interrupted as stop:
            check_finite(history, members, schedule, step)
            if saved != step:
                save()
            for checkpoint in checkpoints:
                checkpoint.wait()
            say(f"{stop}: saved step {step}. Run the same command to go on.")
            sys.exit(EXIT_CODES[str(stop)])


def restore(members: list[Member], checkpoints: list[Checkpoints]) -> tuple[list[Member], int]:
    """(the members with the newest saved state that all have, its step)"""
    step = None
    if len(members) > 1:  # a kill may come between two members' saves, and one may be damaged
        all_have = set.intersection(*(own.intact(member.state) for own, member in zip(checkpoints, members)))
        step = max(all_have, default=0)
    restored = [
        member._replace(state=jax.tree.map(np.array, own.restore(member.state, member.batches, step)))
        for own, member in zip(checkpoints, members)
    ]
    return restored, int(restored[0].state["step"])


def validate(members, engine, trained, schedule: Schedule, step: int, loggers: list[Logger], poll: Callable) -> None:
    """Scores the held-out examples, and keeps in each state what was the best so far, by config.train.select."""
    shown = []
    for number, (member, logger) in enumerate(zip(members, loggers)):
        trainable, task = engine.trainable(trained, number), member.experiment.task
        scores = engine.score(number, task.validation, trainable, poll)[0] if task.validation else {}
        by = {"heldout": scores, "last": {}}
        select = member.config.train.get("select", "heldout")
        if select == "scored":
            by["scored"] = engine.score(number, task.test, trainable, poll)[0]
            logger.write(step, **{f"test_{name}": value for name, value in by["scored"].items()})
        keep_best(member.state, trainable, task, by[select], schedule.validation(step))
        if scores:
            logger.write(step, **{f"validation_{name}": value for name, value in scores.items()})
            shown.append(scores)
    found = {name: ", ".join(f"{scores[name]:.4f}" for scores in shown) for name in (shown or [{}])[0]}
    found = {"loss": ", ".join(f"{logger.last['loss']:.4f}" for logger in loggers if "loss" in logger.last)} | {
        f"validation {name}": values for name, values in found.items()
    }
    epochs = f"epoch {step // schedule.epoch} of {schedule.epochs}"
    at = epochs if step % schedule.epoch == 0 else f"step {step} of {schedule.total}"
    loggers[0].say("  ".join([at, *(f"{name} {values}" for name, values in found.items() if values)]))


def keep_best(state: dict, trainable, task: data.Task, scores: dict, number: int) -> None:
    """Remembers in state["best"] what a validation found, if it is the best so far, or if there are no scores to choose by."""
    value = task.better * scores[task.metrics[0]] if scores else -math.inf
    if value > state["best"]["score"] or not scores:
        state["best"] = {"trainable": jax.tree.map(np.array, sharding.fetch(trainable)), "score": value, "epoch": number}


def waited(members: list[Member], schedule: Schedule, step: int, patience: int | None) -> bool:
    """Whether the last `patience` validations of every member were no better than one before."""
    if patience is None or not step:
        return False
    return all(schedule.validation(step) - int(member.state["best"]["epoch"]) >= patience for member in members)


def log(history: list[dict], members: list[Member], loggers: list[Logger], schedule: Schedule, step: int, watch: "Stopwatch"):
    """Writes the mean loss since the last time, the other numbers as they are now, and what a step takes."""
    arrays = stacked(history)
    watched = watch.lap(len(members))
    for number, (member, logger) in enumerate(zip(members, loggers)):
        mean = finite_mean(arrays, number, member, schedule, step, loggers[0].say)
        now = {name: float(values[-1, number]) for name, values in arrays.items()} | {"loss": mean}
        if member.optimizer.get("name") not in RATE_FREE:
            now["learning_rate"] = rate_at(step - 1, schedule.total, **member.optimizer)
        logger.write(step, **now, **watched)


def stacked(history: list[dict]) -> dict[str, np.ndarray]:
    """Each of the numbers, (steps, members)."""
    return {name: np.stack([np.atleast_1d(np.asarray(one[name])) for one in history]) for name in history[0]}


def check_finite(history: list[dict], members: list[Member], schedule: Schedule, step: int) -> None:
    """Raises what `finite_mean` does: a checkpoint after a step to stop at would hide it from the run that goes on."""
    for number, member in enumerate(members if history else ()):
        finite_mean(stacked(history), number, member, schedule, step, lambda _: None)


def finite_mean(
    arrays: dict[str, np.ndarray], number: int, member: Member, schedule: Schedule, step: int, say: Callable[[str], None]
) -> float:
    """The mean loss of a member's steps up to `step`; those that changed nothing, for not being finite, are left out.

    Raises:
      FloatingPointError: there is one, and config.train.nonfinite isn't "skip".
    """
    losses, norms = arrays["loss"][:, number], arrays["gradient_norm"][:, number]
    good = np.isfinite(losses) & np.isfinite(norms)
    if good.all():
        return float(losses.mean())
    bad = int(np.argmin(good))
    first = step - len(losses) + 1 + bad
    epoch, batch = divmod(first - 1, schedule.epoch)
    what = f"loss is {losses[bad]}" if not np.isfinite(losses[bad]) else f"gradient's norm is {norms[bad]}, the loss {losses[bad]:.4f},"
    where = f"The {what} at step {first}, batch {batch + 1} of epoch {epoch + 1}"
    if member.config.train.get("nonfinite", "stop") == "stop":
        raise FloatingPointError(
            f"{member.workdir}: {where}. That step changed nothing, and the last checkpoint is good. Lower config.optimizer.lr, "
            f"look at that batch, or pass over such steps with --config.train.nonfinite=skip."
        )
    say(f"{where}: passed over, as {len(good) - good.sum()} of the last {len(losses)} steps were")
    return float(losses[good].mean()) if good.any() else math.nan


class Profile:
    """A trace of some steps for TensorBoard's and xprof's profilers, in `workdir/profile`.

    Args:
      steps: "10:15" traces the steps 11 to 15; None: none.

    Raises:
      ValueError: anything else.
    """

    def __init__(self, steps: str | None, workdir: pathlib.Path):
        self._workdir, self._first, self._last, self._running = workdir / "profile", -1, -1, False
        if steps:
            first, colon, last = steps.partition(":")
            if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
                raise ValueError(f"config.train.profile = {steps!r} must be two numbers of steps, such as '10:15'.")
            self._first, self._last = int(first), int(last)

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._workdir))
            self._running = True

    def after(self, step: int, numbers: dict, say: Callable[[str], None]) -> None:
        if self._running and step == self._last:
            jax.block_until_ready(numbers)
            self.stop()
            say(f"a trace of steps {self._first + 1} to {self._last}: {self._workdir}")

    def stop(self) -> None:
        """Ends a trace that is running, as of a training that ends before it."""
        if self._running:
            jax.profiler.stop_trace()
        self._running = False


class Stopwatch:
    """Seconds a step, from laps of several steps that nothing else came between; and a watchdog over what takes for ever.

    Args:
      timeout: seconds in which each lap, and what comes between laps, must end; else the process says where all its
        threads are, and ends with code 1, for a launcher to start it again. None: there is no limit.
      engine: whose steps they are.
    """

    def __init__(self, timeout: float | None, engine: Engine):
        self._timeout, self._engine = timeout, engine
        self._peak = peak(jax.local_devices()[0])
        self.restart()

    def restart(self) -> None:
        self._steps, self._examples, self._tokens, self._flops, self._start = 0, 0, 0, 0.0, time.perf_counter()
        if self._timeout:
            faulthandler.dump_traceback_later(self._timeout, exit=True)

    def stop(self) -> None:
        if self._timeout:
            faulthandler.cancel_dump_traceback_later()

    def step(self, batches: list[dict]) -> None:
        """Counts a step, its examples, and of text the tokens without padding."""
        self._steps += 1
        self._flops += self._engine.flops(batches) if self._peak else 0
        for batch in batches:
            self._examples += self._engine.parts * len(batch["row"])
            if "attention_mask" in batch:
                self._tokens += self._engine.parts * int(np.count_nonzero(batch["attention_mask"]))

    def lap(self, members: int = 1) -> dict[str, float]:
        """Ends a lap, once its last step's result has been waited for: seconds_per_step, and what is done in a second.

        Of several members' seconds each has its part. Where the device's peak is known also mfu, the share of it that the
        model's matrix products need; where it tells, device_memory, the most bytes that were in use on it.
        """
        seconds = (time.perf_counter() - self._start) / members
        found = {"seconds_per_step": seconds / self._steps, "examples_per_second": self._examples / members / seconds}
        if self._tokens:
            found["tokens_per_second"] = self._tokens / members / seconds
        if self._peak and self._flops:
            found["mfu"] = self._flops / (seconds * members) / self._peak
        if stats := jax.local_devices()[0].memory_stats():
            found["device_memory"] = stats["peak_bytes_in_use"]
        self.restart()
        return found
