"""One run in two real processes of four virtual devices: equal to one device, killed, preempted, incomplete."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from absl import app
from safetensors.numpy import load_file

from experiments import processes
from experiments.train import train
from tests import test_sharding
from tests.experiments.test_train import environment, last_step, logged

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 160


def arguments(model, workdir):
    return [
        "--config=configs/quickstart.py", f"--config.model.source={model}", "--config.method.d=256",
        "--config.task.max_length=8", "--config.train.epochs=1", "--config.train.log_every=10", "--config.train.checkpoint_every=20",
        f"--workdir={workdir}",
    ]  # fmt: skip


def launch(model, workdir):
    command = [sys.executable, "-m", "launch.local", "--processes=2", "--devices=4", *arguments(model, workdir)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    process = launch(tiny_model, workdir)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "8 x cpu" in (workdir / "results.json").read_text()
    return workdir


def test_two_processes_train_as_one_device_does(undisturbed, make_config, tmp_path):
    config = make_config("gpart")
    config.method.dropout, config.train.epochs = 0.0, 1
    one = train(config, tmp_path)
    assert one["steps"] == STEPS
    ours, theirs = (load_file(workdir / "adapter.safetensors") for workdir in (tmp_path, undisturbed))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(theirs[name], ours[name], atol=2e-4)
    losses = [[row["loss"] for row in logged(workdir) if "loss" in row] for workdir in (tmp_path, undisturbed)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


DECODER = """
import sys
import numpy as np
from experiments import processes
processes.join(timeout=60)
from tests.test_sharding import prepared, ten_steps
step, arguments = prepared("decoder", "2 x 2 x 2")
losses, trained = ten_steps(step, *arguments)
if processes.is_writer():
    np.savez(sys.argv[1], losses=losses, theta=trained["theta"])
processes.barrier("done")
"""


def test_a_decoder_in_two_processes_trains_as_on_one_device(tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_NUM_CPU_DEVICES": "4", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DECODER, tmp_path / "result.npz"], cwd=ROOT, env=environment | {"JAX_PROCESS_ID": n},
            stderr=subprocess.PIPE, text=True,
        )
        for n in "01"
    ]  # fmt: skip
    for process in started:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error
    step, arguments = test_sharding.prepared("decoder", "one")
    losses, trained = test_sharding.ten_steps(step, *arguments)
    result = np.load(tmp_path / "result.npz")
    np.testing.assert_allclose(result["losses"], losses, rtol=2e-6)
    np.testing.assert_allclose(result["theta"], trained["theta"], atol=2e-5)


def test_told_to_stop_or_with_a_process_killed_the_run_ends_with_the_same_theta(undisturbed, tiny_model, tmp_path):
    process = launch(tiny_model, tmp_path)
    watch = threading.Timer(300, process.kill)  # a guard against hanging
    watch.start()
    while last_step(tmp_path / "metrics.jsonl") < 10 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    watch.cancel()
    assert process.returncode == 143, output
    (saved,) = set(re.findall(r"SIGTERM: saved step (\d+)", output))

    process = launch(tiny_model, tmp_path)
    lines, killed = [], False
    watch = threading.Timer(300, process.kill)
    watch.start()
    pids = {}
    while len(pids) < 2:
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
        if match := re.search(r"process (\d) has pid (\d+)", lines[-1]):
            pids[int(match[1])] = int(match[2])
    reader = threading.Thread(target=lambda: lines.extend(process.stdout))
    reader.start()
    wanted = (int(saved) // 20 + 1) * 20
    # Orbax writes in the background, but no checkpoint before the one before is whole: a folder of its name alone doesn't say so.
    after = tmp_path / "checkpoints" / str(wanted + 20)
    while not killed and process.poll() is None:
        if after.is_dir():
            os.kill(pids[1], signal.SIGKILL)
            killed = True
        time.sleep(0.01)
    assert process.wait() == 0, "".join(lines)
    watch.cancel()
    reader.join()
    assert killed
    assert "restart 1 of 3" in "".join(lines)
    first, second = re.findall(r"gpart: goes on after step (\d+)", "".join(lines))
    assert first == saved and int(second) in range(wanted, STEPS + 1, 20)
    assert (tmp_path / "adapter.safetensors").read_bytes() == (undisturbed / "adapter.safetensors").read_bytes()
    assert logged(tmp_path, [int(saved)]) == logged(undisturbed, [int(saved)])


def test_a_run_is_evaluated_in_several_processes_and_on_one_device(undisturbed):
    found = json.loads((undisturbed / "results.json").read_text())
    on_all = [sys.executable, "-m", "launch.local", "--module=experiments.evaluate", "--processes=2", "--devices=4"]
    on_one = [sys.executable, "-m", "experiments.evaluate"]
    for command in (on_all, on_one):
        done = subprocess.run(
            [*command, f"--workdir={undisturbed}"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(f"test accuracy {found['test']:.4f} on ") == 1


def test_a_process_that_never_joins_is_named(tmp_path):
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": "localhost:21987", "JAX_NUM_PROCESSES": "4"}
    command = [sys.executable, "-m", "experiments.train", f"--workdir={tmp_path / 'run'}", "--join_timeout=8"]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment | {"JAX_PROCESS_ID": str(n)}, stderr=subprocess.PIPE, text=True
        )
        for n in (0, 2)
    ]
    for process in started:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 1
        assert "Process 1, 3 of 4 (counted from 0) did not join within 8 s." in error
    assert not (tmp_path / "run").exists()


def test_a_stranger_is_not_counted_as_a_process():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def knock():
        for said in (b"7", b"0", b"-1", b"GET / HTTP/1.1"):
            for _ in range(50):
                try:
                    with socket.create_connection(("localhost", port), timeout=1) as connection:
                        connection.sendall(said)
                    break
                except OSError:
                    time.sleep(0.02)

        processes.roll_call(f"localhost:{port}", 2, 1, timeout=30)

    others = threading.Thread(target=knock)
    others.start()
    processes.roll_call(f"localhost:{port}", 2, 0, timeout=30)
    others.join()


def test_without_process_0_the_others_say_so():
    with pytest.raises(TimeoutError, match="Process 0 of 2"):
        processes.roll_call("localhost:21988", 2, 1, timeout=1)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "set, but not JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "must be host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "one of 0 to"),
    ],
)
def test_incomplete_or_wrong_variables_are_named(monkeypatch, variables, message):
    for name in processes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(app.UsageError, match=message):
        processes.join()
