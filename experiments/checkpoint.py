"""What a run keeps so that it may be killed at any step: its state, and the position in its data."""

import hashlib
import json
import pathlib
import time
import typing

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from experiments.processes import barrier, is_writer


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
            saved = self._read(step, state)
            if isinstance(saved, Exception):
                damaged[step] = saved
            else:
                good.add(step)
        if damaged and not good:
            self._refuse(damaged)
        self._move_away(damaged)
        return good

    def restore(self, state: dict, batches=None, step: int | None = None) -> dict:
        """The newest saved state that is intact, and any `batches` set to its position; `state` itself where there is none.

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
            saved = self._read(number, state)
            if isinstance(saved, Exception):
                damaged[number] = saved
                continue
            self._move_away(damaged)
            if batches is not None:
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

    def _read(self, step: int, state: dict) -> typing.Any:
        """What was saved at a step; or, in all processes, the error where one of them can't read it."""
        try:
            saved: typing.Any = self._read_here(step, state)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            saved = error
        failed = isinstance(saved, Exception)
        if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(failed)).any() and not failed:
            return ValueError("another process can't read it")
        return saved

    def _read_here(self, step: int, state: dict):
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
