"""The benchmarks, one after another, each in a process of its own; their tables, and all figures as one JSON file.

  python -m benchmarks.run                               # everything: about half an hour on two cores
  python -m benchmarks.run --suite=transform,step        # some
  python -m benchmarks.run --quick                       # few sizes and repeats, to see that all work

Each is a script of its own with options of its own: `python -m benchmarks.<suite> --help`. On an accelerator start `device`
instead, which runs these at its size. Left to be started alone are `images`, `glue_step` (a recipe's step), `pytorch_step` (needs
PyTorch), `accelerators` (needs plugins for GPU and TPU, which need not be here) and `endurance` (faults, no times).
"""

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

import jax
from absl import app, flags

from experiments.command import run_command

SUITES = {  # what it measures, and the options of --quick
    "transform": ("forward over a copy, VJP over a sum, bytes kept", ["--sizes=1048576", "--ds=256,23040", "--repeats=3"]),
    "step": ("a training step over the same with given weights; memory", ["--models=minilm", "--rows=2", "--repeats=3"]),
    "setup": ("making a partition of 1.3 billion weights", ["--ds=23040"]),
    "collectives": ("bytes that a step communicates on 8 devices", []),
    "population": ("a population of runs against the runs", ["--config.train.epochs=1", "--members=2"]),
    "serving": ("a batch of many adapters against a batch of one", ["--adapters=32", "--repeats=3"]),
    "generation": ("tokens a second", ["--prompts=2", "--new_tokens=16", "--repeats=1"]),
}  # fmt: skip
FULL = {"population": ["--config.train.epochs=1"]}


def processor() -> str:
    """What /proc/cpuinfo calls the first core, or what Python knows."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine() -> dict:
    device = jax.devices()[0]
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def probe() -> dict:
    """`machine()`, by a process of its own: what holds an accelerator keeps it from the benchmarks."""
    command = "import json; from benchmarks.run import machine; print(json.dumps(machine()))"
    found = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def measure(module: str, arguments: list[str], timeout: float | None = None) -> tuple[dict | None, str]:
    """(figures, what went wrong or ""), of a benchmark in a process of its own that prints as it goes.

    A benchmark that failed, or was killed after `timeout` seconds, leaves the figures that it had so far; None if it had none.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, wrong = pathlib.Path(folder) / "figures.json", ""
        try:
            code = subprocess.run([sys.executable, "-m", module, *arguments, f"--json={file}"], timeout=timeout).returncode
            wrong = f"it ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            wrong = f"it was not done after {timeout:.0f} s"
        if not file.exists():
            return None, wrong or "it wrote no figures"
        return json.loads(file.read_text()), wrong


def main(_):
    options = flags.FLAGS
    if unknown := set(options.suite) - set(SUITES):
        raise app.UsageError(
            f"--suite={','.join(options.suite)}: {sorted(unknown)[0]!r} is none of {', '.join(SUITES)}."
        )
    figures = {"date": datetime.datetime.now().isoformat(timespec="minutes"), "command": " ".join(sys.argv[1:])}
    figures["machine"] = probe()
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    failed = []
    for suite in options.suite:
        what, quick = SUITES[suite]
        arguments = quick if options.quick else FULL.get(suite, [])
        print(f"\n# {suite}: {what}\n\n    python -m benchmarks.{suite} {' '.join(arguments)}\n", flush=True)
        found, wrong = measure(f"benchmarks.{suite}", arguments)
        if wrong:
            failed.append(f"{suite} ({wrong})")
        if found:
            figures[suite] = found
        pathlib.Path(options.output).expanduser().write_text(json.dumps(figures, indent=1))
    print(f"\nFigures: {options.output}")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    flags.DEFINE_list("suite", list(SUITES), f"Which, of {', '.join(SUITES)}.")
    flags.DEFINE_bool("quick", False, "Few sizes and repeats.")
    flags.DEFINE_string("output", "benchmarks.json", "Where the figures go.")
    run_command(main)
