"""Rounds of misfortune: one training after another is killed, damaged, starved of disk and raced, and must not mind.

  python -m benchmarks.endurance --rounds=100

Each round starts the training of `configs/vision.py:digits` in the workdir that the round before left, and one thing happens to
it, at a random point from a fixed seed:

  kill, terminate   it is sent SIGKILL or SIGTERM
  cut, flip         before it starts, a random file of its newest checkpoint is cut off, or one bit of it flipped; then kill
  vanish            the base model, or a file of it, isn't there as it starts
  fill              it may write no file beyond a few KiB
  race              two processes start at once; then kill

A run that gets to its end must have the undisturbed run's adapter, byte for byte; the next round starts another. No
checkpoint that was finished and left alone may be lost. Ends with code 1 at the first round that breaks a rule, and leaves
its folder for a look. 100 rounds take about 15 minutes on two CPU cores.
"""

import collections
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from absl import flags

from experiments.command import run_command

FAULTS = ("kill", "terminate", "cut", "flip", "vanish", "fill", "race")
CONFIG = [
    "--config.method.d=256",
    "--config.train.epochs=10",
    "--config.train.checkpoint_every=5",
    "--config.train.log_every=5",
]
TIMEOUT = 600  # seconds in which a process must end


class Broken(Exception):
    """A rule was broken."""


class Process:
    """A process of a training, and what it has said so far."""

    def __init__(self, command: list[str]):
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._deadline = time.monotonic() + TIMEOUT
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.signal = self._process.send_signal

    def _read(self) -> None:
        for line in self._process.stdout:
            self.lines.append(line)

    def wait_for(self, pattern: str) -> None:
        """Until it has said this, or ended."""
        while self._process.poll() is None and not any(re.search(pattern, line) for line in list(self.lines)):
            if time.monotonic() > self._deadline:
                self._hangs()
            time.sleep(0.02)

    def end(self, *allowed: int) -> tuple[int, str]:
        """The code, which must be one of these, and the output of the process, which must end."""
        try:
            code = self._process.wait(self._deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            self._hangs()
        self._reader.join()
        output = "".join(self.lines)
        if code not in allowed:
            raise Broken(f"it ended with code {code}, not one of {allowed}:\n{output[-3000:]}")
        return code, output

    def _hangs(self):
        self._process.kill()
        raise Broken(f"it doesn't end. It said:\n{''.join(self.lines)[-3000:]}")


class Training:
    """One training, in a folder of its own, from a base model."""

    def __init__(self, folder: pathlib.Path, model: pathlib.Path):
        self.workdir, self.model = folder, model
        self.damaged: set[int] = set()  # checkpoints that no run has read or moved away since
        self._command = [
            sys.executable, "-m", "experiments.train", "--config=configs/vision.py:digits", f"--config.model.source={model}",
            *CONFIG, f"--workdir={self.workdir}",
        ]  # fmt: skip

    def start(self, kib: int | None = None) -> Process:
        """A process of it; `kib` is the largest file that it may write."""
        limit = [] if kib is None else ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "-"]
        return Process(limit + self._command)

    def checkpoints(self) -> dict[int, pathlib.Path]:
        folders = (self.workdir / "checkpoints").glob("[0-9]*")
        return {int(path.name): path for path in folders if re.fullmatch(r"\d+", path.name)}

    def moved_away(self) -> set[str]:
        return {path.name for path in (self.workdir / "damaged-checkpoints").glob("*")}

    def finished(self) -> bool:
        return (self.workdir / "results.json").exists()

    def adapter(self) -> bytes:
        return (self.workdir / "adapter.safetensors").read_bytes()


class Moments:
    """When to stop a process: often within its training, else as it starts. Measured of an undisturbed run."""

    TRAINS = r"(starts at|goes on after) step"

    def __init__(self, training: Training, draw: random.Random):
        start = time.monotonic()
        process = training.start()
        process.wait_for(self.TRAINS)
        self._starts = time.monotonic() - start
        process.end(0)
        self.all = time.monotonic() - start
        self._draw = draw

    def wait(self, *processes: Process) -> None:
        """Of several processes, until each has come to its training or ended, and on."""
        if len(processes) == 1 and self._draw.random() < 0.25:
            time.sleep(self._draw.uniform(0, self._starts))
        else:
            for process in processes:
                process.wait_for(self.TRAINS)
            time.sleep(self._draw.uniform(0, 0.6 * (self.all - self._starts)))  # so that it takes several to the end


def damage(checkpoint: pathlib.Path, fault: str, draw: random.Random) -> str:
    """Cuts off one of a checkpoint's files, or flips one bit of it; returns which."""
    file = draw.choice(sorted(file for file in checkpoint.rglob("*") if file.is_file()))
    content = bytearray(file.read_bytes())
    if content:  # not cut off to nothing before
        at = draw.randrange(len(content))
        if fault == "cut":
            content = content[:at]
        else:
            content[at] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    return str(file.relative_to(checkpoint))


def suffer(training: Training, fault: str, draw: random.Random, moments: Moments) -> tuple[str, collections.Counter]:
    """One round; returns what happened, and how many checkpoints were damaged and found to be."""
    before, moved_before, happened = training.checkpoints(), training.moved_away(), ""
    newest = max(before, default=0)
    if fault in ("cut", "flip") and len(before) > 1:
        happened = f", {damage(before[newest], fault, draw)} of {newest} damaged"
        training.damaged.add(newest)
    counts = collections.Counter(damaged=bool(happened))

    if fault == "fill":
        _, output = training.start(kib=draw.choice((0, 1, 2, 4))).end(0, 1)
        if not training.finished() and not re.search(r"OSError.*can't be written to", output):
            raise Broken(f"a full disk was not named:\n{output[-3000:]}")
    elif fault == "race":
        pair = [training.start(), training.start()]
        moments.wait(*pair)
        for process in pair:
            process.signal(signal.SIGKILL)
        codes, outputs = zip(*[process.end(0, 1, -signal.SIGKILL) for process in pair])
        if codes == (1, 1) or any(
            code == 1 and "in use by another run" not in out for code, out in zip(codes, outputs)
        ):
            raise Broken(
                "of two at once one should go on and one be refused:\n" + "\n".join(out[-3000:] for out in outputs)
            )
    elif fault == "vanish":
        gone = draw.choice((training.model, training.model / "config.json", training.model / "model.safetensors"))
        away = gone.with_name(f"{gone.name}.away")
        gone.rename(away)
        try:
            _, output = training.start().end(1)
        finally:
            away.rename(gone)
        if not re.search(rf"FileNotFoundError: {re.escape(str(training.model))}.*{re.escape(gone.name)}", output):
            raise Broken(f"{gone} was missing, and not named:\n{output[-3000:]}")
        if training.checkpoints() != before:
            raise Broken(f"there were checkpoints {sorted(before)}; now there are {sorted(training.checkpoints())}")
        happened = f", without {gone.name}"
    else:
        process = training.start()
        moments.wait(process)
        process.signal(signal.SIGTERM if fault == "terminate" else signal.SIGKILL)
        # A SIGTERM that comes before Python or the training is ready for it ends it at once.
        process.end(0, *((143, -signal.SIGTERM) if fault == "terminate" else (-signal.SIGKILL,)))

    after = training.checkpoints()
    intact = before.keys() - training.damaged
    if intact and max(after, default=0) < max(intact):
        raise Broken(f"checkpoint {max(intact)} is lost: there are {sorted(after)}")
    found = {int(name.split("-")[0]) for name in training.moved_away() - moved_before}
    if not found <= training.damaged:
        raise Broken(f"checkpoints {sorted(found)} were moved away as damaged; {sorted(training.damaged)} are")
    # Where a run went on from a damaged one to a later, only what is never read of it was damaged.
    training.damaged = {step for step in training.damaged - found if step >= max(after)}
    counts["found"] = len(found)
    if found:
        happened += f", gone on from {max(intact)}"
    return f"{fault}: step {newest} -> {'the end' if training.finished() else max(after, default=0)}{happened}", counts


def main(_):
    draw, counts, faults = random.Random(flags.FLAGS.seed), collections.Counter(), collections.Counter()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="endurance-"))
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ |= cache | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    base = folder / "base"
    subprocess.run(
        [sys.executable, "-m", "experiments.train", "--config=configs/vision.py:digits,pretrain",
         "--config.train.epochs=5", f"--workdir={base}"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    model = base / "model"
    Training(folder / "compiles", model).start().end(0)
    undisturbed = Training(folder / "undisturbed", model)
    moments = Moments(undisturbed, draw)
    print(f"an undisturbed run takes {moments.all:.1f} s; {folder}", flush=True)
    training = Training(folder / "0", model)
    for number in range(1, flags.FLAGS.rounds + 1):
        fault = draw.choice(FAULTS)
        faults[fault] += 1
        try:
            happened, counted = suffer(training, fault, draw, moments)
            if training.finished() and training.adapter() != undisturbed.adapter():
                raise Broken("the adapter isn't the undisturbed run's")
        except Broken as error:
            print(f"round {number}, {fault}: {error}\nSee {training.workdir}.")
            sys.exit(1)
        print(f"round {number} of {flags.FLAGS.rounds}, {happened}", flush=True)
        counts += counted
        if training.finished():
            counts["finished"] += 1
            training = Training(folder / str(number), model)
    shutil.rmtree(folder)
    shown = ", ".join(f"{fault} {count}" for fault, count in sorted(faults.items()))
    print(f"{flags.FLAGS.rounds} rounds ({shown}): {counts['finished']} runs came to their end, all with the undisturbed run's "
          f"adapter; {counts['damaged']} times a checkpoint was damaged, {counts['found']} times a run found that and went on "
          f"from the one before; no finished checkpoint was lost")  # fmt: skip


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 100, "How many.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of what happens when.")
    run_command(main)
