"""The folder of a run: whose it is, who is at work in it, and what to say of a disk that fails."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import socket
import typing

import ml_collections
from absl import app, logging

from experiments.config import check_config, identity
from experiments.processes import barrier, is_writer
from gpart_jax import files

MEND = "Bring it back, or move that run's folder away."


def local(path: str) -> pathlib.Path:
    """A path on this machine's disks, where ~ is the home folder.

    Raises:
      absl.app.UsageError: one of a bucket.
    """
    if scheme := re.match(r"(\w+):/", path):
        raise app.UsageError(
            f"{path} lies in {scheme[1]}://, but locks and appended lines need a disk that all processes share. Give such a path, or "
            f"mount the bucket."
        )
    return pathlib.Path(path).expanduser()


class InUse(ValueError):
    """Another process is at work in a workdir."""


@contextlib.contextmanager
def claim_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path):
    """Within it `workdir` is this config's and this process's own; no other run may go on in it meanwhile.

    A workdir where nothing was saved yet may be claimed anew, and any with other values of what `config.OPERATIONAL` names.

    Raises:
      ValueError: it holds what a run with another config saved, or (InUse) another process is running in it; nothing of
        theirs is touched.
    """
    if not is_writer() or (workdir / "results.json").exists():  # a finished run is only read
        check_workdir(config, workdir)
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("a+") as lock:  # unlocked as it is closed, also by the death of the process
        _lock(lock, workdir)
        check_workdir(config, workdir)
        write_json(workdir / "config.json", json.loads(config.to_json()))
        yield


def check_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Raises a ValueError if `workdir` holds what a run with another config saved."""
    if not _has_saved(workdir):
        return
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} has checkpoints but no config.json to say whose. Choose another workdir.")
    here, there = identity(config), identity(read_json(path))
    differences = [
        f"config.{key} is {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differences:
        raise ValueError(
            f"{workdir} holds another experiment: {'; '.join(differences)}. "
            f"Choose another workdir, or give the same config to go on with that run."
        )


def keep_origin(workdir: pathlib.Path, origin: dict[str, str]) -> None:
    """Writes down what a run begins with (`Experiment.origin`), or checks that it goes on with the same. All processes call it.

    A run of a version that wrote down nothing goes on, and has it from then on.

    Raises:
      ValueError: its data or its model are others now, or other processes have others; nothing is touched.
    """
    path = workdir / "origin.json"
    if is_writer() and not (_has_saved(workdir) and path.exists()):
        write_json(path, origin)
    barrier("origin")
    if changed := changes(workdir, origin):
        raise ValueError(
            f"{workdir} holds a run that began with other data or another model: {'; '.join(changed)}. "
            f"Bring back what it began with, or choose another workdir."
        )


def changes(workdir: pathlib.Path, origin: dict[str, str]) -> list[str]:
    """In what `origin` differs from what the run in `workdir` began with, as far as both tell."""
    path = workdir / "origin.json"
    known = read_json(path) if path.exists() else {}
    return [
        f"{name}: {known[name]} there, {origin[name]} here" for name in origin if known.get(name, origin[name]) != origin[name]
    ]


def _has_saved(workdir: pathlib.Path) -> bool:
    return (workdir / "results.json").exists() or any((workdir / "checkpoints").glob("[0-9]*"))


def _lock(lock: typing.TextIO, workdir: pathlib.Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise InUse(
            f"{workdir} is in use by another run, process {lock.read().strip()}. "
            f"Wait until it ends, stop it (it saves a checkpoint on SIGTERM), or choose another workdir."
        ) from None
    except OSError as error:  # some cluster file systems have no locks
        logging.warning("%s cannot be locked (%s). Start no second run in it.", workdir, error)
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
    lock.flush()


def read_json(path: pathlib.Path) -> dict:
    """The JSON object in a file of a run.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    return files.read_json(path, missing="Is this the folder of a run? Train there first.", damaged=MEND)


def read_lines(path: pathlib.Path) -> list[dict]:
    """The JSON object in each line of a file of a run; a last line that was cut as it was written is left out.

    Raises:
      ValueError: it is damaged.
    """
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). {MEND}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is damaged: a line holds no JSON object. {MEND}")
    return rows


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The config of the run in a folder.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    path = workdir / "config.json"
    found = read_json(path)
    try:
        config = ml_collections.ConfigDict(found)
        check_config(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error} {MEND}") from error
    return config


def write_json(path: pathlib.Path, content) -> None:
    """Writes by way of a temporary file: the path holds the old content or the new, never half of it."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


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
