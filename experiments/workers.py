"""Trains many runs in worker processes: a run that fails, or takes its process with it, doesn't stop the others."""

import collections
import contextlib
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from multiprocessing import connection
from typing import NamedTuple

import jax
import ml_collections

from experiments.config import differences
from experiments.logger import quiet
from experiments.progress import SweepProgress
from experiments.workdir import InUse, check_workdir

AGAIN = 5.0  # seconds until a run that is trained elsewhere is asked for again
IN_USE = "in use"


class Planned(NamedTuple):
    config: ml_collections.ConfigDict
    directory: pathlib.Path


def run_all(runs: list[Planned], jobs: int, workdir: pathlib.Path, population: int = 1) -> dict[pathlib.Path, str]:
    """Trains the runs that aren't finished, `jobs` at once, and shows how far the whole is.

    Up to `population` runs that follow one another and may share a program are trained together, as one job. A run that another
    machine is training is asked for again when the others are done.

    Returns:
      The directory of each run that failed, and the error's first line.

    Raises:
      ValueError: a run's directory holds another experiment; nothing was started.
      SystemExit: with code 143, after the workers saved checkpoints because of SIGTERM or Ctrl-C.
    """
    for run in runs:
        check_workdir(run.config, run.directory)
    unfinished = [run for run in runs if not (run.directory / "results.json").exists()]
    todo = collections.deque(together(unfinished, population))
    workers = [Worker(slot, jobs, workdir / ".compiled") for slot in range(min(jobs, len(todo)))]
    failures, elsewhere, asked = {}, [], 0.0  # what is trained elsewhere, and when that was seen
    try:
        with _noted_signals() as signals, SweepProgress(len(runs), len(unfinished), workdir) as progress:
            while not signals and (todo or any(worker.runs for worker in workers)):
                for worker in workers:
                    if todo and not worker.runs and (todo[0] not in elsewhere or time.monotonic() > asked + AGAIN):
                        worker.give(todo.popleft())
                        progress.start([run.directory for run in worker.runs])
                working = {worker.connection: worker for worker in workers if worker.runs}
                for ready in connection.wait(working, timeout=0.5):
                    if signals:
                        break  # a process that ended may have had the same signal
                    ended, seconds = working[ready].runs, time.monotonic() - working[ready].since
                    outcomes = working[ready].take()
                    if IN_USE in outcomes:
                        todo.append(ended)
                        elsewhere.append(ended)
                        asked = time.monotonic()
                        progress.leave([run.directory for run in ended])
                        continue
                    for run, outcome in zip(ended, outcomes):
                        if isinstance(outcome, str):
                            failures[run.directory] = outcome
                    progress.end([run.directory for run in ended], outcomes, seconds)
                progress.update()
            if signals:
                progress.say(f"{signals[0]}: saving checkpoints.")
    finally:
        _end(workers)
    if signals:
        finished = sum((run.directory / "results.json").exists() for run in runs)
        print(f"{signals[0]}: {finished} of {len(runs)} runs are finished. Run the same command to go on.")
        sys.exit(143)
    return failures


def together(runs: list[Planned], most: int) -> list[list[Planned]]:
    """The runs in order, in groups of up to `most` that may be one population."""
    groups = []
    for run in runs:
        if groups and len(groups[-1]) < most and not differences(groups[-1][0].config, run.config):
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def _end(workers: list["Worker"]) -> None:
    """Ends the workers' processes; one that trains saves a checkpoint first."""
    processes = [worker.process for worker in workers if worker.process]
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


@contextlib.contextmanager
def _noted_signals():
    """Within it, the first SIGTERM or Ctrl-C only adds its name to the list that it gives; a second one kills as usual."""
    names = []

    def note(number, frame):
        names.append(signal.Signals(number).name)
        restore()

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield names
    finally:
        restore()


class Worker:
    """One of `jobs` places: a process, another one if it dies, and the runs that it trains together, mostly one."""

    def __init__(self, slot: int, jobs: int, cache: pathlib.Path):
        self.runs = self.process = None
        self._arguments = gpu_share(visible_gpus(), slot, jobs), cache

    def give(self, runs: list[Planned]) -> None:
        if not self.process:
            context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs, *self._arguments))
            self.process.start()
            theirs.close()  # so that the end of the process ends the connection
        self.runs, self.since = runs, time.monotonic()
        self.connection.send(runs)

    def take(self) -> list[dict | str]:
        """The results of each run that has ended, or the first line of its error."""
        runs, self.runs = self.runs, None
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code, self.process = self.process.exitcode, None
        error = f"its process ended with code {code}; see log.txt"
        if code < 0:
            error = f"its process was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            error += ", perhaps because memory ran out"
        for run in runs:
            run.directory.mkdir(parents=True, exist_ok=True)
            (run.directory / "error.txt").write_text(error + "\n")
        return [error] * len(runs)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may hold; asking JAX would take the devices from the workers."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(n) for n, _ in enumerate(pathlib.Path("/dev").glob("nvidia[0-9]*"))]


def gpu_share(gpus: list[str], slot: int, jobs: int) -> dict[str, str]:
    """The environment that gives a worker its GPUs, or its part of one's memory where workers are more."""
    if not gpus:
        return {}
    share = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot % len(gpus) :: jobs])}
    if jobs > len(gpus):
        share["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / math.ceil(jobs / len(gpus)):.2f}"
    return share


def _work(runs: connection.Connection, environment: dict[str, str], cache: pathlib.Path) -> None:
    """The worker process: trains what comes until it is terminated."""
    os.setpgrp()  # Ctrl-C on the terminal goes to the parent alone, which sends one SIGTERM
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)  # before the backend starts
    quiet()
    sys.stdout.reconfigure(line_buffering=True)
    if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR goes before
        jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    while True:
        runs.send(_train(runs.recv()))


def _end_with_parent() -> None:
    """A parent killed by SIGKILL cannot stop its workers, and a second sweep must not find them still training."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _train(runs: list[Planned]) -> list[dict | str]:
    from experiments.population import train_population  # the parent does without: it starts in half the time
    from experiments.train import train

    first = runs[0].directory
    for run in runs:
        run.directory.mkdir(parents=True, exist_ok=True)
        (run.directory / "error.txt").unlink(missing_ok=True)
        if run.directory != first:
            (run.directory / "log.txt").write_text(f"Trained together with {first}, which has the log.\n")
    with (first / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)  # of the process, so that what libraries in C++ write comes along
        os.dup2(log.fileno(), 2)
    try:
        return [train(*runs[0])] if len(runs) == 1 else train_population(*zip(*runs))
    except InUse:
        return [IN_USE] * len(runs)
    except Exception as error:
        for run in runs:
            (run.directory / "error.txt").write_text(traceback.format_exc())
        return [f"{type(error).__name__}: {error}".splitlines()[0]] * len(runs)
