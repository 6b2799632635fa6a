"""Where a run's numbers go: a live line on the console, JSON lines, and what config.train.writers names of WRITERS.

A writer is made as `writer(workdir, title, step)`, for a run that goes on after that step, and has `write(step, numbers)` and
`close()`.
"""

import json
import math
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console
import rich.progress
from absl import flags, logging

from experiments.processes import is_writer
from experiments.workdir import read_json, read_lines


def quiet() -> None:
    """Lets libraries log warnings only, unless --verbosity asks for more: INFO lines would break up the live one."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


class TensorBoard:
    """Event files in `workdir/tensorboard`."""

    def __init__(self, workdir: pathlib.Path, title: str, step: int):
        import tensorboardX  # here, because a run may do without

        self._file = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._file.add_scalar(name, number, step)

    def close(self) -> None:
        self._file.close()


class WandB:
    """A run of Weights & Biases, which goes on under its own id; project and mode are those of wandb's own variables.

    Raises:
      ImportError: wandb isn't installed.
    """

    def __init__(self, workdir: pathlib.Path, title: str, step: int):
        try:
            import wandb
        except ImportError:
            raise ImportError("config.train.writers names wandb: pip install 'gpart_jax[wandb]'.") from None
        own = workdir / "wandb-id.txt"
        if not own.exists():
            own.write_text(secrets.token_hex(4))
        config = read_json(workdir / "config.json")
        self._run = wandb.init(dir=str(workdir), id=own.read_text(), name=str(workdir), resume="allow", config=config)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, Callable[..., Any]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Logger:
    """Use as a context manager. `workdir/metrics.jsonl` has one object a line, each with its step.

    A run that goes on from a checkpoint first drops what was logged after that step, and the validation there, which is made
    again: no step stands there twice. Of several processes only the first logs anything. `show=False` leaves out the console.

    Attributes:
      last: the numbers logged last, by name.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        title: str,
        step: int,
        total_steps: int,
        show: bool = True,
        writers: Sequence[str] = ("tensorboard",),
    ):
        if unknown := set(writers) - WRITERS.keys():
            raise ValueError(f"config.train.writers names {sorted(unknown)[0]!r}. Choose of {', '.join(WRITERS)}.")
        mine = is_writer()
        path = workdir / "metrics.jsonl" if mine else pathlib.Path(os.devnull)
        kept = []
        if path.exists():
            kept = [row for row in read_lines(path) if _before(row, step)]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._lines = path.open("a", buffering=1)
        self._writers = [WRITERS[name](workdir, title, step) for name in writers] if mine else []
        self.console = rich.console.Console(highlight=False, quiet=not (mine and show))
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[status]}"),
            rich.progress.TimeRemainingColumn(compact=True),
            rich.progress.TextColumn("left"),
            console=self.console,
            transient=True,
            disable=not (show and self.console.is_terminal),  # a log file gets the lines of `say` alone
        )
        self._task = self._bar.add_task(title, total=total_steps, completed=step, status="")
        self._title = title
        self.last: dict[str, float] = {}

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *error):
        self._bar.stop()
        self._lines.close()
        for writer in self._writers:
            writer.close()

    def write(self, step: int, **numbers: float) -> None:
        """Records numbers of a step, and shows loss and metrics in the live line."""
        self._lines.write(json.dumps({"step": step, **numbers}) + "\n")
        for writer in self._writers:
            writer.write(step, numbers)
        self.last |= numbers
        shown = [f"{name} {number:.4f}" for name, number in self.last.items() if name.startswith(("loss", "validation"))]
        self._bar.update(self._task, status="  ".join(shown))

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(f"{self._title}: {text}", markup=False, soft_wrap=True)


def _before(row: dict, step: int) -> bool:
    at = row.get("step", math.inf)
    return at < step or (at == step and not any(name.startswith("validation") for name in row))
