"""Where a run's numbers go: a live line on the console, JSON lines, TensorBoard."""

import json
import os
import pathlib

import rich.console
import rich.progress
import tensorboardX
from absl import flags, logging

from experiments.processes import is_writer


def quiet() -> None:
    """Lets libraries log warnings only, unless --verbosity asks for more: INFO lines would break up the live one."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


class Logger:
    """Use as a context manager. `workdir/metrics.jsonl` has one object a line, each with its step.

    A run that goes on from a checkpoint first drops what was logged after that step, and the validation there, which is made
    again: no step stands there twice. Of several processes only the first logs anything. `show=False` leaves out the console.

    Attributes:
      last: the numbers logged last, by name.
    """

    def __init__(self, workdir: pathlib.Path, title: str, step: int, total_steps: int, show: bool = True):
        mine = is_writer()
        path = workdir / "metrics.jsonl" if mine else pathlib.Path(os.devnull)
        kept = []
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n") and _before(json.loads(line), step):  # a killed run may leave half a line
                    kept.append(line)
        path.write_text("".join(kept))
        self._lines = path.open("a", buffering=1)
        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1, write_to_disk=mine
        )
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
        self._tensorboard.close()

    def write(self, step: int, **numbers: float) -> None:
        """Records numbers of a step, and shows loss and metrics in the live line."""
        self._lines.write(json.dumps({"step": step, **numbers}) + "\n")
        for name, number in numbers.items():
            self._tensorboard.add_scalar(name, number, step)
        self.last |= numbers
        shown = [f"{name} {number:.4f}" for name, number in self.last.items() if name.startswith(("loss", "validation"))]
        self._bar.update(self._task, status="  ".join(shown))

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(f"{self._title}: {text}", markup=False, soft_wrap=True)


def _before(row: dict, step: int) -> bool:
    return row["step"] < step or (row["step"] == step and not any(name.startswith("validation") for name in row))
