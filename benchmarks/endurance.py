"""Rounds of misfortune: one training after another is killed, damaged, starved of disk and raced, and must not mind.

  python -m benchmarks.endurance --rounds=100

Each round starts the training of `configs/vision.py:digits` in the workdir that the round before left, and one thing happens to
it, at a random point from a fixed seed. A run that gets to its end must have the undisturbed run's adapter, byte for byte;
the next round starts another. No checkpoint that was finished and left alone may be lost. Ends with code 1 at the first
round that breaks a rule, and leaves its folder for a look.
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
import time

from absl import app, flags

FAULTS = ("kill", "terminate", "cut", "flip", "fill", "race")
CONFIG = [
    "--config.method.d=256",
    "--config.train.epochs=12",
    "--config.train.checkpoint_every=10",
    "--config.train.log_every=5",
]


class Broken(Exception):
    """A rule was broken."""


class Training:
    """One training, in a folder, as processes."""

    def __init__(self, folder: pathlib.Path, model: pathlib.Path):
        self.workdir = folder / "run"
        self._command = [
            sys.executable, "-m", "experiments.train", "--config=configs/vision.py:digits", f"--config.model.source={model}",
            *CONFIG, f"--workdir={self.workdir}",
        ]  # fmt: skip

    def start(self, kib: int | None = None) -> subprocess.Popen:
        """A process of it; `kib` is the largest file that it may write."""
        limit = [] if kib is None else ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "-"]
        return subprocess.Popen(limit + self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def checkpoints(self) -> dict[int, pathlib.Path]:
        folders = (self.workdir / "checkpoints").glob("[0-9]*")
        return {int(path.name): path for path in folders if re.fullmatch(r"\d+", path.name)}

    def finished(self) -> bool:
        return (self.workdir / "results.json").exists()


def end(process: subprocess.Popen, allowed: tuple[int, ...]) -> str:
    """The output of a process that must end with one of these codes."""
    output, _ = process.communicate(timeout=600)
    if process.returncode not in allowed:
        raise Broken(f"it ended with code {process.returncode}, not one of {allowed}:\n{output[-3000:]}")
    return output


def damage(path: pathlib.Path, fault: str, draw: random.Random) -> None:
    """Cuts off a checkpoint's largest file, or flips one bit of it."""
    file = max((file for file in (path / "state").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content))
    if fault == "cut":
        content = content[:at]
    else:
        content[at] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def suffer(training: Training, fault: str, draw: random.Random, seconds: float) -> str:
    """One round; returns what happened. `seconds` is how long an undisturbed run takes."""
    before = training.checkpoints()
    damaged = None
    if fault in ("cut", "flip") and len(before) > 1:
        damaged = max(before)
        damage(before[damaged], fault, draw)
    if fault == "fill":
        output = end(training.start(kib=draw.choice((0, 1, 2, 4))), (0, 1))
        happened = re.search(r"OSError.*can't be written to", output)
        if not training.finished() and not happened:
            raise Broken(f"a full disk was not named:\n{output[-3000:]}")
    elif fault == "race":
        pair = [training.start(), training.start()]
        outputs = [end(process, (0, 1)) for process in pair]
        codes = [process.returncode for process in pair]
        if 0 not in codes or any(code and "in use by another run" not in out for code, out in zip(codes, outputs)):
            raise Broken(f"of two at once one should go on and one be refused: {codes}\n" + "\n".join(outputs)[-3000:])
    else:
        process = training.start()
        time.sleep(draw.uniform(0, seconds))
        if fault == "kill":
            process.kill()
        elif fault == "terminate":
            process.terminate()
        # A signal that comes before Python or the training is ready for it ends it at once.
        allowed = {"kill": (0, -signal.SIGKILL), "terminate": (0, 143, -signal.SIGTERM)}.get(fault, (0,))
        end(process, allowed)
    after = training.checkpoints()
    intact = [step for step in before if step != damaged]
    if intact and max(after, default=0) < max(intact):
        raise Broken(f"checkpoint {max(intact)} is lost: there are {sorted(after)}")
    return f"{fault}: step {max(before, default=0)} -> {'the end' if training.finished() else max(after, default=0)}"


def main(_):
    draw, counts, finished = random.Random(flags.FLAGS.seed), collections.Counter(), 0
    folder = pathlib.Path(tempfile.mkdtemp(prefix="endurance-"))
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ |= cache | {"JAX_PLATFORMS": "cpu"}
    base = folder / "base"
    subprocess.run(
        [sys.executable, "-m", "experiments.train", "--config=configs/vision.py:digits,pretrain",
         "--config.train.epochs=5", f"--workdir={base}"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    undisturbed = Training(folder / "undisturbed", base / "model")
    for _ in range(2):  # the first one compiles
        shutil.rmtree(undisturbed.workdir, ignore_errors=True)
        start = time.monotonic()
        end(undisturbed.start(), (0,))
        seconds = time.monotonic() - start
    expected = (undisturbed.workdir / "adapter.safetensors").read_bytes()
    print(f"an undisturbed run takes {seconds:.1f} s; {folder}", flush=True)
    training = Training(folder / "0", base / "model")
    for number in range(1, flags.FLAGS.rounds + 1):
        fault = draw.choice(FAULTS)
        counts[fault] += 1
        try:
            happened = suffer(training, fault, draw, 0.8 * seconds)
            if training.finished() and (training.workdir / "adapter.safetensors").read_bytes() != expected:
                raise Broken("the adapter isn't the undisturbed run's")
        except Broken as error:
            print(f"round {number}, {fault}: {error}\nSee {training.workdir}.")
            sys.exit(1)
        print(f"round {number} of {flags.FLAGS.rounds}, {happened}", flush=True)
        if training.finished():
            finished += 1
            training = Training(folder / str(number), base / "model")
    shutil.rmtree(folder)
    shown = ", ".join(f"{fault} {count}" for fault, count in sorted(counts.items()))
    print(f"{flags.FLAGS.rounds} rounds ({shown}): {finished} runs came to their end, all with the undisturbed run's adapter; "
          f"no finished checkpoint was lost")  # fmt: skip


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 100, "How many.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of what happens when.")
    app.run(main)
