"""The scripts for clusters, run against stand-ins for what a cluster has."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from experiments.processes import VARIABLES

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
TRAIN = f"""#!{sys.executable}
import json, os, sys
seen = {{name: os.environ.get(name) for name in {VARIABLES + ("CUDA_VISIBLE_DEVICES",)}}}
with open(os.environ["SEEN"], "a") as file:
    file.write(json.dumps(seen | {{"arguments": sys.argv[1:]}}) + "\\n")
codes = os.environ["CODES"].split()
sys.exit(int(codes[min(sum(1 for _ in open(os.environ["SEEN"])), len(codes)) - 1]))
"""


@pytest.fixture
def run(tmp_path):
    """(script, stand-ins, environment, codes that training ends with) -> (exit code, what training saw, output)."""

    def run(script, commands, environment, codes="0"):
        for name, content in (commands | {"train": TRAIN}).items():
            (tmp_path / name).write_text(content)
            (tmp_path / name).chmod(0o755)
        ours = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "train"),
                "SEEN": str(tmp_path / "seen"), "CODES": codes}  # fmt: skip
        done = subprocess.run(
            ["bash", LAUNCH / script, "--config=a b", "--workdir=w"], env=os.environ | ours | environment,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
        assert all(one["arguments"] == ["-m", "experiments.train", "--config=a b", "--workdir=w"] for one in seen)
        return done.returncode, seen, done.stdout

    return run


SLURM = {
    "scontrol": "#!/bin/sh\nprintf 'node7\\nnode9\\n'\n",
    # Two tasks, one after another, and the highest of their codes, as srun has it.
    "srun": """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 99
shift; worst=0
for rank in 0 1; do
  SLURM_NTASKS=2 SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@"
  code=$?; [ $code -gt $worst ] && worst=$code
done
exit $worst
""",
}


def slurm(run, codes):
    return run("slurm.sh", SLURM, {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[7,9]"}, codes)


def test_slurm_gives_each_task_its_number_and_gpu(run):
    code, seen, _ = slurm(run, "0")
    assert code == 0
    assert [tuple(one[name] for name in VARIABLES) for one in seen] == [
        ("node7:20012", "2", "0"), ("node7:20012", "2", "1")
    ]  # fmt: skip
    assert [one["CUDA_VISIBLE_DEVICES"] for one in seen] == ["0", "1"]


def test_slurm_starts_again_after_a_death_and_not_after_preemption(run):
    code, seen, output = slurm(run, "1 0 0 0")
    assert code == 0 and len(seen) == 4 and "attempt 1 of 4" in output
    assert [one["JAX_COORDINATOR_ADDRESS"] for one in seen] == ["node7:20012"] * 2 + ["node7:20013"] * 2
    assert slurm(run, "143")[0] == 143


def test_slurm_gives_up(run):
    code, seen, _ = slurm(run, "3")
    assert code == 3 and len(seen) == 2 * 4


def test_a_tpu_worker_reads_the_metadata(run):
    curl = """#!/usr/bin/env bash
case "${@: -1}" in
  */computeMetadata/v1/instance/attributes/worker-network-endpoints) echo -n a:8470:10.0.0.3,b:8470:10.0.0.4,c:8470:10.0.0.5 ;;
  */computeMetadata/v1/instance/attributes/agent-worker-number) echo -n 2 ;;
  *) exit 22 ;;
esac
"""
    code, seen, _ = run("tpu.sh", {"curl": curl}, {}, "134 0")
    assert code == 0
    assert [tuple(one[name] for name in VARIABLES) for one in seen] == [
        ("10.0.0.3:8476", "3", "2"), ("10.0.0.3:8477", "3", "2")
    ]  # fmt: skip


def test_the_jobset_starts_as_many_processes_as_it_says():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    name, job = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]
    pods = job["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert tuple(sorted(variables)) == tuple(sorted(VARIABLES))
    assert pods["parallelism"] == pods["completions"] == int(variables["JAX_NUM_PROCESSES"])
    host, port = variables["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{name}-{job['name']}-0-0.{pods['template']['spec']['subdomain']}"
    assert int(port) in [one["containerPort"] for one in container["ports"]]
    assert container["command"][1:] == ["-m", "experiments.train"]


def test_the_pages_name_what_the_templates_take():
    for page in ("slurm.md", "tpu.md", "kubernetes.md"):
        text = (LAUNCH / page).read_text()
        for script in re.findall(r"launch/([\w.]+\.(?:sh|yaml))", text):
            assert (LAUNCH / script).is_file(), script
