"""One run in several processes on this machine, each with virtual CPU devices: for tests, and to learn how it is done.

  python -m launch.local --processes=2 --devices=4 --config=configs/quickstart.py --workdir=runs/two

All other arguments go to `python -m experiments.train`, or to another --module, as experiments.evaluate. If a process dies, the others are stopped and all are started
again: they go on from the last checkpoint. SIGTERM or Ctrl-C have all of them save a checkpoint and leave.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

from gpart_jax.commands import clear_errors

PREEMPTED = 143  # experiments.train's exit code after it saved on SIGTERM


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many processes (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=4, help="virtual CPU devices of each (default: %(default)s)")
    parser.add_argument("--restarts", type=int, default=3, help="how often to start again (default: %(default)s)")
    parser.add_argument("--module", default="experiments.train", help="what to run (default: %(default)s)")
    options, arguments = parser.parse_known_args()

    stopping = []  # a signal that came to this launcher
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.append(number))
    for attempt in range(options.restarts + 1):
        code = run_once(options.processes, options.devices, [options.module, *arguments], stopping)
        if code == 0 or stopping:
            return code
        if attempt < options.restarts:
            print(f"launch: a process ended with code {code}; restart {attempt + 1} of {options.restarts}", flush=True)
    print(f"launch: given up after {options.restarts} restarts; the run can be started again later.", flush=True)
    return code


def run_once(processes: int, devices: int, module: list[str], stopping: list) -> int:
    """Starts all processes of a module with its arguments, and waits for them. Returns 0, or the code of the first that failed, once all are gone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
    }
    command = [sys.executable, "-m", *module]
    started = [  # in a session of their own, so that the terminal's Ctrl-C comes to this launcher alone
        subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(index)}, start_new_session=True)
        for index in range(processes)
    ]
    for index, process in enumerate(started):
        print(f"launch: process {index} has pid {process.pid}", flush=True)
    told = False
    try:
        while True:
            codes = [process.poll() for process in started]
            failed = [code for code in codes if code]
            if failed and not (stopping and all(code in (None, 0, PREEMPTED) for code in codes)):
                return failed[0]
            if None not in codes:
                return PREEMPTED if failed else 0
            if stopping and not told:
                for process in started:
                    process.send_signal(signal.SIGTERM)
                told = True
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    with clear_errors():
        sys.exit(main())
