"""What the benchmarks share: calls timed in turn, their spread, a Markdown table, and the same as JSON."""

import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
from absl import flags

flags.DEFINE_string("json", None, "Also write the figures to this file.")


def keep_freed_memory() -> None:
    """Starts the script anew, once, with a glibc that doesn't give freed memory back.

    Else the kernel zeroes new pages for each large result, which takes several times as long as what is measured.
    """
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        largest = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**40)}
        spec = sys.modules["__main__"].__spec__
        os.execve(sys.executable, [sys.executable, "-m", spec.name, *sys.argv[1:]], os.environ | largest)


def in_turn(calls: Mapping[str, Callable], repeats: int, limit: float = 20.0) -> dict[str, list[float]]:
    """Seconds of each call, which take turns; once before to compile. Fewer turns (at least 3) where they take over `limit` s."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = {name: [] for name in calls}
    start = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - start > limit:
            break
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """ "median (lowest ... highest)"."""
    low, middle, high = (scale * value for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.{digits}f} ({low:.{digits}f} ... {high:.{digits}f})"


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Of neighbours in time, so that what else the machine does meets both."""
    return [value / other for value, other in zip(values, base)]


class Table:
    """A Markdown table, printed row by row, whose rows are also kept for `save`."""

    def __init__(self, *columns: str):
        self.columns, self.rows = columns, []
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def add(self, *cells) -> None:
        self.rows.append(dict(zip(self.columns, cells, strict=True)))
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def save(table: Table, **figures) -> None:
    """Writes a table, other figures and the device's peak memory so far to the file of --json, if there is one.

    The peak is in bytes; None where the backend doesn't report it, as a CPU's doesn't.
    """
    if flags.FLAGS.json:
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        file, text = pathlib.Path(flags.FLAGS.json).expanduser(), json.dumps({"table": table.rows, "peak": peak} | figures, indent=1)
        beside = file.with_name(f".{file.name}")
        beside.write_text(text)
        os.replace(beside, file)  # whole, whenever the benchmark is killed
