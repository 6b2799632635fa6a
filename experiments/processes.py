"""One run in several processes: how they find each other, and which of them writes.

Where JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, as every launcher in launch/ does, `join` makes
this process one of that many; without them it leaves it to JAX to know a Slurm step or a Cloud TPU slice of several. The devices
of all processes are then one mesh, and each runs the same program.
"""

import json
import os
import socket
import time

import jax
from absl import app
from jax.experimental import multihost_utils

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def cache_programs(folder: str | None) -> None:
    """Keeps compiled programs in a folder, so that the next process needn't compile them.

    Args:
      folder: config.train.compiled: "" for none; None for $JAX_COMPILATION_CACHE_DIR, or ~/.cache/gpart_jax/compiled.
    """
    if folder is None and jax.config.jax_compilation_cache_dir is None:
        folder = "~/.cache/gpart_jax/compiled"
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder) or None)


def join(timeout: float = 300) -> None:
    """Joins the run's other processes; does nothing where there are no others.

    Raises:
      absl.app.UsageError: some of the variables are missing or wrong.
      TimeoutError: not all have come within `timeout` seconds; it names those that haven't.
    """
    given = [name for name in VARIABLES if os.environ.get(name)]
    if not given:
        hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or len(hosts) > 1:
            jax.distributed.initialize(initialization_timeout=round(timeout))
        return
    if missing := sorted(set(VARIABLES) - set(given)):
        raise app.UsageError(f"{', '.join(given)} set, but not {', '.join(missing)}. Set all three, or none.")
    address, count, index = (os.environ[name] for name in VARIABLES)
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count) and ":" in address):
        raise app.UsageError(
            f"JAX_COORDINATOR_ADDRESS={address} must be host:port, and JAX_PROCESS_ID={index} one of 0 to "
            f"JAX_NUM_PROCESSES={count} less one."
        )
    roll_call(address, int(count), int(index), timeout)
    jax.distributed.initialize(address, int(count), int(index), initialization_timeout=round(timeout))


def roll_call(address: str, count: int, index: int, timeout: float) -> None:
    """Returns in all processes once all are there. JAX's own wait ends without saying who is missing, and aborts.

    Raises:
      TimeoutError: in each process that came, with the numbers of those that didn't.
    """
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + timeout
    if index == 0:
        missing = _call(int(port), count, deadline)
    else:
        missing = _answer(host, int(port), index, deadline, timeout)
    if missing:
        raise TimeoutError(
            f"Process {', '.join(map(str, missing))} of {count} (counted from 0) did not join within {timeout:g} s. "
            f"Look at its log; does it reach {address}, and was it started with the same JAX_COORDINATOR_ADDRESS?"
        )


def _call(port: int, count: int, deadline: float) -> list[int]:
    """Process 0: waits for the others' numbers, and tells each who is missing."""
    came = {}
    with socket.create_server(("", port)) as server:
        while len(came) < count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                number = int(connection.recv(16))
                if 1 <= number < count:
                    came[number] = connection
            except (TimeoutError, ValueError, OSError):
                continue  # nobody came, or a stranger, who says something else
        missing = sorted(set(range(1, count)) - came.keys())
        for connection in came.values():
            with connection:
                connection.sendall(json.dumps(missing).encode() + b"\n")
    return missing


def _answer(host: str, port: int, index: int, deadline: float, timeout: float) -> list[int]:
    """Another process: gives its number, and hears who is missing."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(str(index).encode())
                connection.settimeout(timeout + 5)  # process 0 may have started its watch later
                if line := connection.makefile().readline():
                    return json.loads(line)
        except OSError:
            pass
        time.sleep(0.2)
    return [0]


def is_writer() -> bool:
    """Whether this process writes what a run has one of: its config, metrics, adapter, results."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
