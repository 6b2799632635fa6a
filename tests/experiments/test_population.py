"""Runs trained together: equal to the same runs alone, on one device and on several, killed and continued."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.build import Experiment
from experiments.checkpoint import Checkpoints
from experiments.population import _share, train_population
from experiments.train import train
from gpart_jax import chain, gpart, head, lora
from gpart_jax.models.encoder import Dropout
from tests.experiments.test_train import environment, last_step, logged

ROOT = pathlib.Path(__file__).parents[2]
SEEDS, RATES = (1, 2, 3, 4), (5e-3, 1e-2, 5e-3, 1e-2)


def members(make_config, method="gpart", epochs=1, dropout=0.0):
    configs = []
    for seed, rate in zip(SEEDS, RATES):
        config = make_config(method)
        config.seed, config.optimizer.lr, config.train.epochs = seed, rate, epochs
        config.model.dropout = dropout
        config.task.max_length = 16 if dropout else 8
        config.train.batch_size, config.train.log_every, config.train.checkpoint_every = 128, 5, 10  # 40 steps
        if "seed" in config.method:
            config.method.seed = 10 + seed
        configs.append(config)
    return configs


def check_equal(alone, together):
    ours, theirs = (load_file(workdir / "adapter.safetensors") for workdir in (together, alone))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=2e-4, err_msg=name)
    losses = [[row["loss"] for row in logged(workdir) if "loss" in row] for workdir in (alone, together)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    results = [json.loads((workdir / "results.json").read_text()) for workdir in (alone, together)]
    assert results[1]["population"] in (2, 4)
    for name in ("test", "validation", "best_epoch", "steps", "trained_numbers", "adapter_bytes", "seed"):
        assert results[0][name] == results[1][name], name


def test_members_end_as_the_same_runs_do_alone(make_config, tmp_path):
    configs = members(make_config, dropout=0.1)  # of members whose batches differ in length
    devices = jax.devices()[:1]
    alone = [tmp_path / f"alone{n}" for n in (0, 1)]  # what holds for two holds for all
    for config, workdir in zip(configs, alone):
        train(config, workdir, devices)
    thetas = [load_file(workdir / "adapter.safetensors")["theta"] for workdir in alone]
    assert (
        min(np.abs(a - b).max() for n, a in enumerate(thetas) for b in thetas[:n]) > 1e-3
    )  # so there is something to tell
    for count, used in ((2, 1), (4, 3)):  # of three devices two are used: they divide four members
        together = [tmp_path / f"{count}-{n}" for n in range(count)]
        train_population(configs[:count], together, jax.devices()[:used])
        for one, other in zip(alone, together):
            check_equal(one, other)
            assert f"{2 if used == 3 else 1} x cpu" in (other / "results.json").read_text()


def test_another_methods_members(make_config, tmp_path):
    configs = members(make_config, "vera")[:2]
    for config in configs:
        config.train.batch_size, config.method.rank = 512, 4  # ten steps
    workdirs = [tmp_path / f"{n}" for n in range(3)]
    train_population(configs, workdirs[:2], jax.devices()[:1])
    train(configs[1], workdirs[2], jax.devices()[:1])
    ours, theirs = (load_file(workdir / "adapter.safetensors") for workdir in workdirs[1:])
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=name)


SCRIPT = """
import pathlib, sys, ml_collections, json
from absl import flags, logging
flags.FLAGS(["population"])
from experiments.build import Experiment
from experiments.checkpoint import Checkpoints
from experiments.population import _share, train_population
configs = [ml_collections.ConfigDict(json.loads(text)) for text in json.loads(sys.stdin.read())]
train_population(configs, [pathlib.Path(sys.argv[1]) / str(n) for n in range(len(configs))])
"""


def start(configs, workdir):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, workdir], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip
    process.stdin.write(json.dumps([config.to_json() for config in configs]))
    process.stdin.close()
    return process


def test_killed_or_told_to_stop_a_population_goes_on(make_config, tmp_path):
    configs = members(make_config)[:2]
    whole = start(configs, tmp_path / "whole")
    assert whole.wait() == 0, whole.stdout.read()
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = start(configs, tmp_path / "broken")
        before = last_step(tmp_path / "broken" / "1" / "metrics.jsonl")
        while last_step(tmp_path / "broken" / "1" / "metrics.jsonl") < before + 10 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() == code, process.stdout.read()
    saved = tmp_path / "broken" / "1" / "checkpoints"  # one member's newest is damaged: all go on from the one before
    before, newest = sorted(int(path.name) for path in saved.iterdir() if path.name.isdigit())
    file = max((saved / str(newest) / "state").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])
    process = start(configs, tmp_path / "broken")
    code, output = process.wait(), process.stdout.read()
    assert code == 0 and f"goes on after step {before} of" in output, output
    for n in "01":
        one, other = ((tmp_path / name / n) for name in ("whole", "broken"))
        assert (one / "adapter.safetensors").read_bytes() == (other / "adapter.safetensors").read_bytes()
        assert [row["step"] for row in logged(one)] == [row["step"] for row in logged(other)]


def test_a_kill_between_two_members_saves_leaves_the_earlier_step(tmp_path):
    """The later one is removed, or the member could not save that step again."""

    class Batches:
        def get_state(self):
            return {"at": self.at}

        def set_state(self, state):
            self.at = state["at"]

    batches, state = Batches(), {"step": 0, "theta": np.zeros(2)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (10, 20):
            batches.at = step
            checkpoints.save({"step": step, "theta": np.full(2, 1.0 * step)}, batches)
        checkpoints.wait()
        assert checkpoints.intact(state) == {10, 20}
        restored = checkpoints.restore(state, batches, 10)
        assert (int(restored["step"]), restored["theta"][0], batches.at) == (10, 10, 10)
        checkpoints.save({"step": 20, "theta": np.full(2, 7.0)}, batches)
        assert checkpoints.restore(state, batches)["theta"][0] == 7
        assert checkpoints.restore(state, batches, 0) is state and checkpoints.intact(state) == set()


def test_members_that_cannot_share_a_program_are_refused(make_config, tmp_path):
    one, other = members(make_config)[:2]
    other.method.d = 99
    with pytest.raises(
        ValueError, match="Members of a population differ in method.d. They may differ in seed, method.s"
    ):
        train_population([one, other], [tmp_path / "a", tmp_path / "b"])
    other.method.d = one.method.d
    one.mesh.fsdp = other.mesh.fsdp = 2
    with pytest.raises(ValueError, match="members along 'data'"):
        train_population([one, other], [tmp_path / "a", tmp_path / "b"])


def test_a_frozen_model_has_one_copy_or_cannot_be_shared():
    def experiment(draw):
        params = {"classifier": {"kernel": np.full((2, 2), draw, np.float32)}, "query": np.ones((2, 2), np.float32)}
        return Experiment(None, params, None, None)

    method = gpart(2, targets="query")
    first, second = _share([experiment(1), experiment(2)], [chain(method, head("^classifier/"))] * 2)
    assert first.params["query"] is second.params["query"]
    assert second.params["classifier"]["kernel"][0, 0] == 2
    with pytest.raises(ValueError, match="'classifier/kernel' is frozen and drawn from the seed"):
        _share([experiment(1), experiment(2)], [method] * 2)
    with pytest.raises(ValueError, match="'classifier/kernel' is frozen"):  # LoRA adds to it, and leaves it frozen
        _share([experiment(1), experiment(2)], [lora(1, targets="classifier/kernel")] * 2)


@pytest.mark.parametrize("short, long", [((3, 5, 8), (3, 9, 8)), ((3, 4, 5, 5), (3, 4, 9, 9)), ((3, 8), (3, 8))])
def test_dropout_does_not_see_padding(short, long):
    module, rngs = Dropout(0.3), {"dropout": jax.random.key(1)}
    few, many = (module.apply({}, jnp.ones(shape), jnp.arange(3), rngs=rngs) for shape in (short, long))
    np.testing.assert_array_equal(few, many[tuple(slice(n) for n in short)])
    np.testing.assert_array_equal(module.apply({}, jnp.ones(long)[1:], jnp.arange(1, 3), rngs=rngs), many[1:])
    big = np.asarray(module.apply({}, jnp.ones((64,) + short[1:-1] + (64,)), jnp.arange(64), rngs=rngs))
    assert set(np.unique(big)) == {0, np.float32(1 / 0.7)} and abs((big == 0).mean() - 0.3) < 0.02
    if big.ndim > 2:  # masks of positions are not alike
        assert np.abs(np.corrcoef((big == 0).reshape(64, -1, 64)[:, :, 0].T)[0, 1:]).max() < 0.6
    np.testing.assert_array_equal(module.apply({}, jnp.ones(short), None), jnp.ones(short))
