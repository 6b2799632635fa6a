"""How far a sweep is, on the console."""

import json
import pathlib
import re

import rich.console
import rich.progress


class SweepProgress:
    """How far many runs are: a line for each that ends; on a terminal also live ones, of the whole and of what is running.

    Use as a context manager.
    """

    def __init__(self, runs: int, todo: int, workdir: pathlib.Path):
        self._runs, self._ended, self._failed, self._todo, self._workdir = runs, runs - todo, 0, todo, workdir
        self._console = rich.console.Console(highlight=False)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[status]}"),
            rich.progress.TimeRemainingColumn(compact=True),
            rich.progress.TextColumn("left"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
            speed_estimate_period=3600,  # seconds; a run's compilation and evaluation move no bar
        )
        self._whole = self._bar.add_task("all runs", total=todo, status="")
        self._running, self._elsewhere = {}, set()

    def __enter__(self):
        self.say(f"{self._todo} of {self._runs} runs to do in {self._workdir}")
        self._bar.start()
        return self

    def __exit__(self, *error):
        self._bar.stop()

    def start(self, directories: list[pathlib.Path]) -> None:
        more = f" and {len(directories) - 1} more" if len(directories) > 1 else ""
        name = f"{directories[0].relative_to(self._workdir)}{more}"
        self._running[tuple(directories)] = self._bar.add_task(name, total=None, status="starts")

    def leave(self, directories: list[pathlib.Path]) -> None:
        """Of runs that another machine is training."""
        self._bar.remove_task(self._running.pop(tuple(directories)))
        if directories[0] not in self._elsewhere:
            self.say(f"{directories[0]} is being trained elsewhere: the others go first")
        self._elsewhere |= set(directories)

    def end(self, directories: list[pathlib.Path], outcomes: list[dict | str], seconds: float) -> None:
        """Counts runs that were one job, each with its results, or with its error's first line."""
        self._bar.remove_task(self._running.pop(tuple(directories)))
        together = f" for {len(directories)} together" if len(directories) > 1 else ""
        for directory, outcome in zip(directories, outcomes):
            self._ended += 1
            if isinstance(outcome, str):
                self._failed += 1
                text = f"failed: {outcome}"
            else:
                text = f"{outcome['metric']} {outcome['test']:.4f}  {seconds:.0f} s{together}"
            self.say(f"[{self._ended}/{self._runs}] {directory}  {text}")

    def update(self) -> None:
        """Reads how far the runs are from what they wrote."""
        if self._bar.disable:
            return
        done = self._todo - self._runs + self._ended
        for directories, task in self._running.items():
            step, steps = progress_of(directories[0])
            if steps:
                self._bar.update(task, completed=step, total=steps, status=f"step {step} of {steps}")
                done += len(directories) * step / steps
        finished = self._ended - self._failed
        status = f"{finished} of {self._runs} finished, {self._failed} failed, {sum(map(len, self._running))} running"
        self._bar.update(self._whole, completed=done, status=status)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)


def progress_of(directory: pathlib.Path) -> tuple[int, int]:
    """The last step that a run logged, and how many it has: 0 and 0 before the first."""
    log, metrics = directory / "log.txt", directory / "metrics.jsonl"
    said = (
        re.findall(r": (?:starts at|goes on after) step (\d+) of (\d+)$", log.read_text(), re.M) if log.exists() else []
    )
    if not said:
        return 0, 0
    lines = metrics.read_text().split("\n")[:-1]  # the last may be half a line
    return json.loads(lines[-1])["step"] if lines else int(said[-1][0]), int(said[-1][1])
