"""What a run keeps so that it may be killed at any step: its config, its state, the position in its data."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import signal
import socket
import time
import typing

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from experiments.processes import barrier, is_writer


@contextlib.contextmanager
def claim_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path):
    """Within it `workdir` is this config's and this process's own; no other run may go on in it meanwhile.

    A workdir where nothing was saved yet may be claimed anew, and any by another mesh.

    Raises:
      ValueError: it holds what a run with another config saved, or another process is running in it; nothing of theirs is
        touched.
    """
    if not is_writer() or (workdir / "results.json").exists():  # a finished run is only read
        check_workdir(config, workdir)
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("a+") as lock:  # unlocked as it is closed, also by the death of the process
        _lock(lock, workdir)
        check_workdir(config, workdir)
        if not _has_saved(workdir):
            write_json(workdir / "config.json", json.loads(config.to_json()))
        yield


def check_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Raises a ValueError if `workdir` holds what a run with another config saved."""
    if not _has_saved(workdir):
        return
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} has checkpoints but no config.json to say whose. Choose another workdir.")
    here, there = flatten(json.loads(config.to_json())), flatten(json.loads(path.read_text()))
    differences = [
        f"config.{key} is {there.get(key, 'absent')!r} there, {here.get(key, 'absent')!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key, "absent") != here.get(key, "absent") and not key.startswith("mesh.")
    ]
    if differences:
        raise ValueError(
            f"{workdir} holds another experiment: {'; '.join(differences)}. "
            f"Choose another workdir, or give the same config to go on with that run."
        )


def _has_saved(workdir: pathlib.Path) -> bool:
    return (workdir / "results.json").exists() or any((workdir / "checkpoints").glob("[0-9]*"))


def _lock(lock: typing.TextIO, workdir: pathlib.Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(
            f"{workdir} is in use by another run, process {lock.read().strip()}. "
            f"Wait until it ends, stop it (it saves a checkpoint on SIGTERM), or choose another workdir."
        ) from None
    except OSError as error:  # some cluster file systems have no locks
        logging.warning("%s cannot be locked (%s). Start no second run in it.", workdir, error)
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
    lock.flush()


def write_json(path: pathlib.Path, content) -> None:
    """Writes by way of a temporary file: the path holds the old content or the new, never half of it."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


class Checkpoints:
    """The two newest checkpoints in `workdir/checkpoints`, through Orbax. Use as a context manager."""

    def __init__(self, workdir: pathlib.Path):
        self._directory = workdir.absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._directory, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._manager.close()

    def save(self, state: dict, batches) -> None:
        """Saves in the background. The arrays are copied first, since the next step donates them."""
        state = jax.tree.map(np.array, state)
        position = batches.get_state()  # the same in every process, however many there are
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(position),
            seal=ocp.args.JsonSave({"sha256": _digest(state, position)}),
        )
        if not self._manager.save(state["step"], args=args):
            raise RuntimeError(
                f"Orbax did not save step {state['step']} in {self._directory}, which holds a later one."
            )

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def intact(self, state: dict) -> set[int]:
        """The saved steps that can be read. Damaged checkpoints are moved away; raises as `restore` does if there is no other."""
        good, damaged = set(), {}
        for step in map(int, self._manager.all_steps()):
            try:
                self._read(step, state)
                good.add(step)
            except Exception as error:  # Orbax and TensorStore raise many kinds
                damaged[step] = error
        if damaged and not good:
            self._refuse(damaged)
        self._move_away(damaged)
        return good

    def restore(self, state: dict, batches, step: int | None = None) -> dict:
        """The newest saved state that is intact, and `batches` set to its position; `state` itself where there is none.

        Newer ones that are damaged are moved out of the way, into `workdir/damaged-checkpoints`. With `step` that of this
        step (0: `state`), and what was saved later is removed.

        Raises:
          ValueError: no checkpoint can be read, or none fits `state`.
        """
        if step is not None:
            for later in [saved for saved in self._manager.all_steps() if saved > step]:
                self._manager.delete(later)
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step] if step else []
        damaged = {}
        for number in steps:
            try:
                saved = self._read(number, state)
            except Exception as error:  # Orbax and TensorStore raise many kinds
                damaged[number] = error
                continue
            self._move_away(damaged)
            batches.set_state(saved["data"])
            return saved["state"]
        if damaged:
            self._refuse(damaged)
        return state

    def _refuse(self, damaged: dict[int, Exception]):
        first = max(damaged)
        raise ValueError(
            f"Checkpoint {self._directory / str(first)} is damaged, or another version of this code wrote it "
            f"({damaged[first]}), and no other can be read. Move {self._directory} away to start from step 0."
        ) from damaged[first]

    def _read(self, step: int, state: dict):
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(np.array, state)),
            data=ocp.args.JsonRestore(),
            seal=ocp.args.JsonRestore(),
        )
        saved = self._manager.restore(step, args=args)
        if saved["seal"]["sha256"] != _digest(saved["state"], saved["data"]):
            raise ValueError("its numbers, or its position in the data, aren't those that were saved")
        return saved

    def _move_away(self, damaged: dict[int, Exception]) -> None:
        for step, error in damaged.items():
            away = self._directory.with_name("damaged-checkpoints")
            logging.warning(
                "Checkpoint %d is damaged (%s). It is moved to %s; an older one is used.", step, error, away
            )
            if is_writer():
                away.mkdir(exist_ok=True)
                (self._directory / str(step)).rename(away / f"{step}-{time.time_ns()}")
            barrier(f"moved-{step}")
        if damaged:
            self._manager.reload()


def _digest(state: dict, position: dict) -> str:
    digest = hashlib.sha256(json.dumps(position).encode())
    for path, leaf in jax.tree.leaves_with_path(state):
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def clear_disk_errors(workdir: pathlib.Path):
    """Says of a full or read-only disk what happened to it and what to do; nothing that was saved is touched."""
    try:
        yield
    except Exception as error:  # Orbax wraps what the system says in types of its own
        whole = f"{error} {error!r} {error.__cause__!r} {error.__context__!r}"
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTDIR):
            reason = os.strerror(code)
            of_disk = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the others may be of what is read
            if reason in whole and (of_disk or str(workdir) in whole):
                raise OSError(
                    code,
                    f"{reason}: {workdir} can't be written to. What was saved there is whole: make room or choose another "
                    f"workdir, and run the same command to go on",
                ) from error
        raise


EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130}  # as a shell has them


class Interrupt:
    """Within it, the first SIGTERM or Ctrl-C is only noted; a second one kills as usual.

    In a run of several processes JAX notes SIGTERM, sent to any of them, and has all stop after the same step.
    """

    def __init__(self):
        self._name: str | None = None

    def requested(self, step: int) -> str | None:
        """The name of the signal on account of which to stop after this step; EXIT_CODES has the code to end with."""
        if jax.process_count() > 1:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._name

    def __enter__(self):
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._previous = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, *error):
        self._restore()

    def _request(self, number, frame):
        self._name = signal.Signals(number).name
        logging.info("%s: saving a checkpoint after this step.", self.requested)
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"method": {"d": 4096}} -> {"method.d": 4096}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
