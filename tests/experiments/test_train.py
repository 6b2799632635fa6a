"""The whole road with a tiny model; runs that are killed and started again, as real processes."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from experiments import data, evaluate, flops, metrics, plots, report
from experiments.build import build
from experiments.config import identity
from experiments.signals import Interrupt
from experiments.step import make_loss
from experiments.train import train, training_seconds
from experiments.workdir import check_workdir
from gpart_jax import load_adapter, sharding
from gpart_jax.targets import named_leaves

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 2 * 160


def command(model, workdir, batch_size=32):
    return [
        sys.executable, "-m", "experiments.train", "--config=configs/quickstart.py", f"--workdir={workdir}",
        f"--config.model.source={model}", "--config.method.d=256", "--config.task.max_length=8",
        "--config.method.dropout=0.1", "--config.train.epochs=2", "--config.train.log_every=10",
        "--config.train.checkpoint_every=30", f"--config.train.batch_size={batch_size}",
    ]  # fmt: skip


def run(*args, **kwargs):
    return subprocess.run(
        command(*args, **kwargs), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )


def environment():
    """That of a process with one device. What one process compiled serves the next: else it is most of a short run."""
    return os.environ | {"XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def signal_at(step, number, *args):
    """Starts a run and sends it a signal once it has logged `step`; returns its exit code and output."""
    process = subprocess.Popen(
        command(*args), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log = pathlib.Path(args[1]) / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while last_step(log) < step:
        assert process.poll() is None, process.communicate()[0]
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"step {step} never came")  # a guard against hanging, not a bound on speed
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def last_step(log):
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def logged(workdir, stopped=()):
    """Everything that a run logged, but for times, and the first mean after each step at which it `stopped`."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    cut = [10 * (step // 10 + 1) for step in stopped]
    return [
        {name: value for name, value in row.items() if not re.search("second|mfu|memory", name)}
        for row in rows
        if row["step"] not in cut
    ]


def final_state(workdir):
    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        return step, manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    finished = run(tiny_model, workdir)
    assert finished.returncode == 0, finished.stderr
    return workdir


def test_a_run_leaves_what_its_docstring_says(undisturbed, tiny_model):
    results = json.loads((undisturbed / "results.json").read_text())
    assert results["steps"] == STEPS
    assert results["trained_numbers"] == 256 + 32 * 2 + 2
    rows = logged(undisturbed)
    assert [row["step"] for row in rows if "validation_accuracy" in row] == [STEPS // 2, STEPS]
    assert rows[-2]["step"] == STEPS and rows[-2]["loss"] < rows[0]["loss"]
    assert list((undisturbed / "tensorboard").iterdir())
    predictions = [json.loads(line) for line in (undisturbed / "predictions.jsonl").read_text().splitlines()]
    assert np.mean([row["label"] == row["prediction"] for row in predictions]) == results["test"]


def test_the_adapter_is_small_and_the_checkpoint_holds_no_frozen_weight(undisturbed):
    path = undisturbed / "adapter.safetensors"
    tensors = load_file(path)
    assert {name: array.shape for name, array in tensors.items()} == {
        "theta": (256,), "head/classifier/kernel": (32, 2), "head/classifier/bias": (2,)
    }  # fmt: skip
    assert path.stat().st_size < 4 * 256 + 4 * (32 * 2 + 2) + 4096
    _, state = final_state(undisturbed)
    assert max(np.size(leaf) for leaf in jax.tree.leaves(state)) == 256
    assert state["trainable"]["theta"].any()


def test_the_adapter_on_disk_scores_as_reported(undisturbed, config):
    experiment = build(config)
    method, trainable = load_adapter(undisturbed / "adapter.safetensors").on(experiment.params)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    outputs = evaluate.outputs_of(experiment, method, trainable, mesh)
    logits = evaluate.predict(experiment.task, outputs, mesh, experiment.task.test, 100)
    results = json.loads((undisturbed / "results.json").read_text())
    assert metrics.score(experiment.task, experiment.task.test, logits) == results["test_scores"]


@pytest.mark.parametrize(
    "signals",
    [
        [(1, signal.SIGKILL), (100, signal.SIGKILL), (250, signal.SIGKILL)],
        [(45, signal.SIGTERM), (85, signal.SIGINT), (165, signal.SIGKILL), (320, signal.SIGKILL)],
    ],
)
def test_ended_at_any_step_a_run_goes_on_to_the_same_theta(undisturbed, tiny_model, tmp_path, signals):
    """Killed, it goes on after its last checkpoint; on SIGTERM and Ctrl-C it saves one first."""
    stopped, expected = [], ""
    for step, number in signals:
        code, output = signal_at(step, number, tiny_model, tmp_path)
        assert expected in output
        expected = ""
        if number == signal.SIGKILL:
            assert code == -number, output
        else:
            assert code == 128 + number, output
            stopped.append(final_state(tmp_path)[0])
            assert stopped[-1] >= step and f"{number.name}: saved step {stopped[-1]}." in output
            expected = f"goes on after step {stopped[-1]} of {STEPS}"
    finished = run(tiny_model, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "adapter.safetensors").read_bytes() == (undisturbed / "adapter.safetensors").read_bytes()
    step, state = final_state(tmp_path)
    expected_step, expected = final_state(undisturbed)
    assert step == expected_step == STEPS
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert logged(tmp_path, stopped) == logged(undisturbed, stopped)


def test_a_finished_run_is_not_trained_again(undisturbed, tiny_model):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    finished = run(tiny_model, undisturbed)
    assert finished.returncode == 0 and "is finished" in finished.stdout
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_a_workdir_of_another_experiment_is_refused_and_untouched(undisturbed, tiny_model):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    refused = run(tiny_model, undisturbed, batch_size=16)
    assert refused.returncode != 0
    assert "holds another experiment: config.train.batch_size is 32 there, 16 here" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_checkpoints_of_unknown_origin_are_refused(config, tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(ValueError, match="no config.json to say whose"):
        train(config, tmp_path)


def test_a_workdir_in_which_nothing_was_saved_can_be_claimed_anew(config, tmp_path):
    config.method.d = 10**6
    with pytest.raises(ValueError, match="d = 1000000 must be between 1 and N"):
        train(config, tmp_path)
    config.method.d = 256
    config.train.epochs = 1
    assert train(config, tmp_path, jax.devices()[:1])["steps"] == STEPS // 2


def test_a_run_may_go_on_with_another_mesh_and_number_of_devices(config, tmp_path):
    config.train.epochs = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interrupt, "requested", lambda self, step: "SIGTERM" if step == 70 else None)
        with pytest.raises(SystemExit):
            train(config, tmp_path, jax.devices()[:1])
    config.mesh.data, config.mesh.fsdp = 2, 2
    with pytest.MonkeyPatch.context() as patch:
        steps = []
        patch.setattr(Interrupt, "requested", lambda self, step: steps.append(step))
        assert train(config, tmp_path, jax.devices()[:4])["device"] == "4 x cpu"
    assert sorted(set(steps)) == list(range(71, STEPS // 2 + 1))


def test_operational_settings_may_change_and_a_test_that_failed_is_made_again_alone(config, tmp_path):
    config.train.epochs = 1

    def fail(*_, **__):
        raise MemoryError("the test's batch")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.train.save_adapter", fail)
        with pytest.raises(MemoryError):
            train(config, tmp_path, jax.devices()[:1])
    config.train.update(eval_batch_size=16, log_every=5, checkpoint_every=7, step_timeout=60.0, nonfinite="skip", compiled="")
    config.model.remat, config.model.attention = "full", "xla"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interrupt, "requested", lambda self, step: None if step == STEPS // 2 else pytest.fail("trained again"))
        assert train(config, tmp_path, jax.devices()[:1])["steps"] == STEPS // 2
    saved = json.loads((tmp_path / "config.json").read_text())["train"]
    assert (saved["eval_batch_size"], saved["log_every"]) == (16, 5)


def test_every_key_that_no_declaration_frees_makes_another_experiment(config, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "config.json").write_text(config.to_json())
    values = identity(config)
    assert {"seed", "method.d", "train.batch_size", "optimizer.lr", "model.dtype"} <= values.keys()
    assert not any(key.startswith("mesh.") for key in values)
    for key, value in values.items():
        other = config.copy_and_resolve_references()
        with other.ignore_type():
            other.update_from_flattened_dict({key: "another" if value != "another" else "one"})
        with pytest.raises(ValueError, match=f"config.{re.escape(key)} is .* there, 'another' here"):
            check_workdir(other, tmp_path)


def test_what_a_step_did_is_logged(undisturbed):
    rows = logged(undisturbed)
    steps = [row for row in rows if "loss" in row]
    assert all(row.keys() >= {"gradient_norm", "step_length", "theta_norm", "learning_rate"} for row in steps)
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    peak = max(row["learning_rate"] for row in steps)
    assert 0.9e-2 < peak <= 1e-2 and steps[-1]["learning_rate"] < 1e-4
    best = load_file(undisturbed / "adapter.safetensors")["theta"]
    at = [row["theta_norm"] for row in steps if row["step"] in (STEPS // 2, STEPS)]
    assert np.isclose(np.linalg.norm(best), at, rtol=1e-5).any()
    # Adam moves each of the d = 256 numbers by about the learning rate.
    shares = [row["step_length"] / (row["learning_rate"] * 16) for row in steps[:-1]]
    assert max(shares) < 1.5 and np.median(shares) > 0.1


def test_it_stops_early_and_has_what_validated_best(config, tmp_path):
    config.train.update(epochs=2, validate_every=20, patience=3)
    results = train(config, tmp_path, jax.devices()[:1])
    validated = {row["step"]: row["validation_accuracy"] for row in logged(tmp_path) if "validation_accuracy" in row}
    assert list(validated) == list(range(20, results["steps"] + 1, 20)) and results["steps"] < STEPS
    best = max(validated, key=validated.get)
    assert results["steps"] == best + 3 * 20 and results["validation"] == validated[best]
    assert results["best_epoch"] == round(best / 160, 2)
    assert train(config, tmp_path / "again", jax.devices()[:1])["test"] == results["test"]


def test_the_seconds_of_a_training_are_of_its_steps():
    rows = [{"step": 2, "seconds_per_step": 5.0}, {"step": 2, "validation_loss": 1.0}, {"step": 6, "seconds_per_step": 0.5}]
    assert training_seconds(rows) == 2 * 5.0 + 4 * 0.5 and training_seconds([]) == 0


def test_one_training_has_the_test_by_each_protocol(config, tmp_path):
    config.optimizer.update(lr=None, step=0.5)
    config.train.update(select="scored", writers=(), epochs=None, steps=STEPS)  # which are two epochs
    results = train(config, tmp_path)
    rows = logged(tmp_path)
    tested = {row["step"]: row["test_accuracy"] for row in rows if "test_accuracy" in row}
    held = {row["step"]: row["validation_accuracy"] for row in rows if "validation_accuracy" in row}
    assert list(tested) == list(held) == [STEPS // 2, STEPS]
    found = results["test_by_protocol"]
    assert found == {"scored": max(tested.values()), "last": tested[STEPS], "heldout": tested[max(held, key=held.get)]}
    assert results["test"] == found["scored"] and results["select"] == "scored" and results["validation"] is None
    assert results["learning_rate"] == 0.5 / 16 and 0 < results["base_norm"] < 100
    assert max(row["learning_rate"] for row in rows if "learning_rate" in row) <= 0.5 / 16
    steps = [row["step_length"] for row in rows if "step_length" in row]
    assert 0.1 < max(steps) < 0.6  # about the length that was asked for, at most


@pytest.mark.parametrize("at", [160, 320])
def test_told_to_stop_while_it_validates_it_saves_that_step_and_goes_on_there(config, tmp_path, undisturbed, at):
    """At the end of the first epoch, and in the test."""
    config.train.checkpoint_every = 1000
    with pytest.MonkeyPatch.context() as patch:
        calls = []

        def requested(self, step):
            calls.append(step)
            return "SIGTERM" if calls.count(at) == 2 else None  # the first is the step's own

        patch.setattr(Interrupt, "requested", requested)
        with pytest.raises(SystemExit):
            train(config, tmp_path, jax.devices()[:1])
    assert final_state(tmp_path)[0] == at
    train(config, tmp_path, jax.devices()[:1])
    steps = [row["step"] for row in logged(tmp_path) if "validation_accuracy" in row]
    assert steps == [160, 320]


def test_what_an_unfinished_run_has_best_is_scored_on_any_devices(config, tmp_path):
    config.mesh.data, config.train.checkpoint_every = 2, 1000
    command = [sys.executable, "-m", "experiments.evaluate", f"--workdir={tmp_path}", "--split=validation"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interrupt, "requested", lambda self, step: "SIGTERM" if step == 200 else None)
        with pytest.raises(SystemExit):
            train(config, tmp_path, jax.devices()[:2])
    (best,) = [row["validation_accuracy"] for row in logged(tmp_path) if "validation_accuracy" in row]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "The 1 devices here don't fit the run's mesh" in done.stdout
    assert "isn't finished: this is of step 200, the best that it validated" in done.stdout
    assert f"validation accuracy {best:.4f} on " in done.stdout


def test_writers_get_the_numbers_and_mfu_is_of_the_models_products(config, tmp_path, monkeypatch):
    logged_there, began = [], []

    class FakeRun:
        log = staticmethod(lambda numbers, step: logged_there.append({"step": step} | numbers))
        finish = staticmethod(lambda: logged_there.append("finished"))

    fake = types.SimpleNamespace(init=lambda **options: began.append(options) or FakeRun)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(flops.PEAKS, "cpu", 1e12)
    config.train.update(epochs=1, writers=("tensorboard", "wandb"))
    train(config, tmp_path, jax.devices()[:1])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged_there == [*rows, "finished"] and began[0]["id"] == (tmp_path / "wandb-id.txt").read_text() and began[0]["config"]["method"]["d"] == 256
    assert any((tmp_path / "tensorboard").iterdir())
    needed = [row["mfu"] * 1e12 * row["seconds_per_step"] for row in rows if "mfu" in row]
    experiment = build(config)
    kernels = sum(x.size for path, x in named_leaves(experiment.params) if path.endswith("kernel"))
    tokens = 32 * 8
    assert all(3 * kernels * tokens < found < 8 * kernels * tokens for found in needed)  # 2 forward, 2 or 4 back, and attention
    config.train.writers = ("tensorbord",)
    with pytest.raises(ValueError, match="config.train.writers names 'tensorbord'. Choose of tensorboard, wandb"):
        train(config, tmp_path / "other", jax.devices()[:1])


def test_a_trace_of_some_steps_is_left(config, tmp_path, capsys):
    config.train.update(epochs=1, profile="3:5")
    train(config, tmp_path, jax.devices()[:1])
    assert "a trace of steps 4 to 5" in capsys.readouterr().out
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match="profile = '5' must be two numbers of steps, such as '10:15'"):
        config.train.profile = "5"
        train(config, tmp_path / "other", jax.devices()[:1])


def test_a_damaged_checkpoint_is_moved_away_and_the_one_before_is_used(config, tmp_path, caplog):
    config.train.epochs = 1
    train(config, tmp_path, jax.devices()[:1])
    expected, kept = (tmp_path / "adapter.safetensors").read_bytes(), logged(tmp_path)

    def damage(step, change):
        (tmp_path / "results.json").unlink()
        for path in (tmp_path / "checkpoints" / str(step) / "state").rglob("*"):
            if path.is_file() and path.stat().st_size > 1000:
                path.write_bytes(change(path.read_bytes()))

    def cut(content):
        return content[:20]

    def one_byte(content):
        return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]

    for change in (cut, one_byte):
        damage(160, change)
        train(config, tmp_path, jax.devices()[:1])
        assert "Checkpoint 160 is damaged" in caplog.text
        assert (tmp_path / "adapter.safetensors").read_bytes() == expected and logged(tmp_path) == kept
        caplog.clear()
    assert len(list((tmp_path / "damaged-checkpoints").iterdir())) == 2  # nothing is thrown away
    for number in (150, 160):
        (tmp_path / "results.json").touch()
        damage(number, cut)
    with pytest.raises(ValueError, match=r"160 is damaged.*no other can be read. Move .*checkpoints away"):
        train(config, tmp_path, jax.devices()[:1])
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"150", "160"}


@jax.custom_vjp
def spoil(x, flag):
    """x, whose gradient is NaN where there is a flag."""
    return x


spoil.defvjp(lambda x, flag: (x, flag), lambda flag, g: (jnp.where(flag > 0, jnp.nan, g), None))


def explode_at(monkeypatch, *steps, value=np.nan):
    """Makes the loss of these steps NaN; with 1, their gradient alone."""
    whole = data.train_batches

    def batches(task, *args, **kwargs):
        def collate(rows):
            batch = task.collate(rows)
            return batch | {"explode": np.zeros(len(batch["label"]), np.float32)}

        return whole(task._replace(collate=collate), *args, **kwargs)

    def loss_of(model, task):
        loss = make_loss(model, task)

        def exploding(adapt, frozen, batch, key=None):
            flag = batch["explode"].mean()
            return spoil(loss(adapt, frozen, batch, key) + jnp.where(flag == 1, 0, flag), flag)

        return exploding

    place, count = sharding.global_batch, iter(range(1, 10**6))

    def global_batch(batch, mesh):
        bad = next(count) in steps
        return place(batch | {"explode": np.full_like(batch["explode"], value if bad else 0)}, mesh)

    monkeypatch.setattr(data, "train_batches", batches)
    monkeypatch.setattr(sharding, "global_batch", global_batch)
    monkeypatch.setattr("experiments.train.make_loss", loss_of)


def test_a_loss_that_is_not_finite_stops_the_run_and_nothing_is_lost(config, tmp_path, monkeypatch):
    config.train.epochs = 1
    config.train.log_every = 40  # later than the next checkpoint, which would hide the step from the run that goes on
    explode_at(monkeypatch, 65)
    with pytest.raises(FloatingPointError, match="is nan at step 65, batch 65 of epoch 1.*Lower config.optimizer.lr"):
        train(config, tmp_path, jax.devices()[:1])
    step, state = final_state(tmp_path)
    assert step == 60 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["trainable"]))


def test_a_gradient_that_is_not_finite_stops_the_run_though_its_loss_is(config, tmp_path, monkeypatch):
    config.train.epochs = 1
    explode_at(monkeypatch, 65, value=1)
    with pytest.raises(FloatingPointError, match=r"gradient's norm is nan, the loss 0\.\d+, at step 65, batch 65 of epoch 1"):
        train(config, tmp_path, jax.devices()[:1])
    assert final_state(tmp_path)[0] == 60


def test_a_loss_that_is_not_finite_may_be_passed_over(config, tmp_path, monkeypatch, capsys):
    config.train.epochs = 1
    config.train.nonfinite = "skip"
    explode_at(monkeypatch, 65, 66, 150)
    results = train(config, tmp_path, jax.devices()[:1])
    shown = capsys.readouterr().out
    assert "nan at step 65, batch 65 of epoch 1: passed over, as 2 of the last 10 steps were" in shown
    assert "nan at step 150" in shown and results["steps"] == STEPS // 2
    assert all(np.isfinite(row["loss"]) for row in logged(tmp_path) if "loss" in row)
    assert np.isfinite(load_file(tmp_path / "adapter.safetensors")["theta"]).all()


def test_a_disk_that_is_full_is_named_and_what_was_saved_stays(undisturbed, tiny_model, tmp_path):
    limited = ["bash", "-c", 'ulimit -f 3; exec "$@"', "-"]  # KiB that a file may have: the config, but no checkpoint
    done = subprocess.run(
        limited + command(tiny_model, tmp_path), cwd=ROOT, env=environment(),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "File too large: " in done.stderr and "run the same command to go on" in done.stderr
    finished = run(tiny_model, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "adapter.safetensors").read_bytes() == (undisturbed / "adapter.safetensors").read_bytes()


def test_a_workdir_that_cannot_be_made_is_named(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory: .*file/run can't be written to.*choose another workdir"):
        train(config, tmp_path / "file" / "run")


def test_a_step_that_never_ends_ends_the_process(tiny_model, tmp_path):
    code = (
        "import pathlib, sys, time, experiments.loop as l, experiments.train as t; from configs import quickstart;"
        "c = quickstart.get_config();"
        f"c.model.source = {str(tiny_model)!r}; c.method.d = 256; c.train.step_timeout = 4.0; c.train.checkpoint_every = 20;"
        "save = l.Checkpoints.save; l.Checkpoints.save = lambda *a: (save(*a), time.sleep(1000));"
        f"t.train(c, pathlib.Path({str(tmp_path)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Timeout (0:00:04)!" in done.stderr and "in run" in done.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        (("train", "epoch", 3), r"config.train has an unknown key 'epoch'. Did you mean 'epochs'?"),
        (("method", "dd", 3), r"Method 'gpart' .*unexpected keyword argument 'dd'"),
        (("method", "scheme", "balanced"), r"Unknown scheme 'balanced'. Choose one of balanced-v1, splitmix64"),
        (("method", "d", 10**9), r"d = 1000000000 must be between 1 and N = 2048"),
        (
            ("method", "targets", "nothing"),
            r"Target pattern 'nothing' matches no leaf. Paths look like: 'classifier/bias'",
        ),
        (("method", "name", "magic"), r"Unknown method 'magic'. Choose one of bitfit, fastfood, full"),
        (("task", "name", "words"), r"Unknown task 'words'. Choose one of lexicon, glue/cola"),
        (("optimizer", "schedule", "steep"), r"Unknown schedule 'steep'"),
        (("train", "batch_size", 10**6), r"batch_size = 1000000 must be between 1 and 5"),
        (
            ("train", "accumulate", 5),
            r"config.train.batch_size = 32 doesn.t divide over the mesh: it must be a multiple of 40",
        ),
        (("train", "log_every", 0), r"config.train.log_every must be a positive integer, not 0"),
        (("model", "source", "/no/such/place"), r"/no/such/place"),
        (("model", "dtype", "float99"), r"config.model.dtype must be one of float32, bfloat16, float16, not 'float99'"),
        (("mesh", "data", "x"), r"config.mesh.data = 'x' is of the wrong type: it must be int"),
        (("optimizer", "warmup", None), r"config.optimizer.warmup = None is of the wrong type: it must be int | float"),
        (("train", "steps", 10), r"Set one of config.train.epochs and config.train.steps, .* Both are set"),
        (("train", "epochs", None), r"Set one of config.train.epochs and config.train.steps, .* Neither is set"),
        (("train", "epochs", 0.5), r"config.train.epochs must be a positive integer, not 0.5"),
        (("train", "patience", -1), r"config.train.patience must be a positive integer or None, not -1"),
    ],
)
def test_bad_config_gets_one_clear_error(config, tmp_path, change, message):
    section, key, value = change
    with config.unlocked(), config.ignore_type():
        config[section][key] = value
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config, tmp_path / "run")


def test_the_comparison_draws_its_table_and_its_picture(make_config, tmp_path, capsys):
    workdirs = [tmp_path / method for method in ("gpart", "lora", "head")]
    for workdir in workdirs:
        config = make_config(workdir.name)
        config.train.epochs = 1
        train(config, workdir, jax.devices()[:1])
    runs = [report.find_runs(workdir)[0] for workdir in workdirs]
    report.print_table(runs)
    table = capsys.readouterr().out
    for run, name in zip(runs, ("gpart, d = 256", "lora, r = 8", "head")):
        assert name in table and f"{run.results['trained_numbers']:,}" in table and f"{100 * run.results['test']:.1f} %" in table
    plots.draw(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_help_shows_the_flags():
    shown = subprocess.run(
        [sys.executable, "-m", "experiments.train", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert "--config" in shown.stdout and "--workdir" in shown.stdout
    assert "Trains one method on one task" in shown.stdout


def test_a_partition_that_reads_the_weights_trains_and_is_evaluated(config, tmp_path):
    config.method.scheme = "signed_magnitude"
    config.train.batch_size, config.train.epochs = 512, 1
    results = train(config, tmp_path)
    command = [sys.executable, "-m", "experiments.evaluate", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert f"test accuracy {results['test']:.4f} on 1500 examples" in done.stdout, done.stderr
