"""How many cycles a program compiled for a TPU takes, by estimate; no TPU need be here.

XLA writes an estimate beside nearly every operation of its own. A kernel (Pallas, `tpu_custom_call`) has none: here it costs
its bundles, of which a TPU starts one a cycle, as often as its loops turn, or the time that its bytes take between HBM and the
chip, whichever is longer. Bundles are read from a dump of the compiler's; it adds about a third to the time of compiling.

Not in the sum, because XLA estimates none of them: collectives, and copies that run beside other work (pairs of start and
done). Nothing else is taken to overlap. Of a branch in a kernel all bundles count, but for `shares`, of a branch of the program the
longest one; DMA waits cost a bundle; a grid that Pallas pipelines counts its two turns of filling and draining in full.
"""

import functools
import os
import pathlib
import re
import tempfile
from typing import NamedTuple

from launch import hlo


class Chip(NamedTuple):
    """What a chip does at most."""

    clock: float  # cycles a second
    bandwidth: float  # bytes a second between HBM and the chip
    flops: float  # bfloat16 operations a second in matrix products


# Bandwidth and FLOP/s are those of Google Cloud's pages on v5e and v6e; v5p's from other pages, its own wasn't read. A clock is the
# FLOP/s by the operations of the matrix units in a cycle: 131,072 on v5e, 262,144 on v5p. For v6e that isn't published clearly: at 1.75e9, what XLA takes a copy to move is
# the same share of the bandwidth as on v5e (0.81), and what it takes a product to do is within the peak.
CHIPS = {
    "v5e": Chip(1.5e9, 819e9, 197e12),
    "v5p": Chip(1.75e9, 2765e9, 459e12),
    "v6e": Chip(1.75e9, 1638e9, 918e12),
}
DUMP = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final_bundles$ --xla_jf_dump_category_filter=codegen"
DELAY = 4  # bundles after a branch that are still executed, on all of CHIPS

_BUNDLE = re.compile(r" *(?:0x)?([0-9a-f]+) +[A-Z ]*: *>* *\{")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel (?:\(!?(%\w+)\) )?target = \$region(\d+)")
_ASSIGNED = re.compile(r"(%\w+) = (\w\S*) (?:\(!?%\w+\),? )?([^;/}]*)")  # value, operation, (predicate), operands
_SPILL = re.compile(r"sst \[smem:\[(#\w+_spill)\]\] (?:\(!?%\w+\),? )?(%\w+)")  # a value that is put aside
_SPILLED = re.compile(r"\[smem:\[(#\w+_spill)\]\]")
_KERNEL = re.compile(r"%?([\w.\-]+) = (.*?) custom-call\((.*?)\), custom_call_target=\"tpu_custom_call\"")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


class Estimate(NamedTuple):
    """Cycles of one run of a program on each device."""

    cycles: int  # of everything, kernels included
    kernels: int


@functools.cache
def dump() -> tempfile.TemporaryDirectory:
    """A folder, removed with this process, into which libtpu is to write bundles. To be called before libtpu is loaded."""
    folder = tempfile.TemporaryDirectory(prefix="bundles-")
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={folder.name} {DUMP}"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # beside other processes that only compile
    return folder


def compile(lowered):
    """Compiles for a TPU.

    Args:
      lowered: what `jax.jit(...).lower(...)` gave for devices of `launch.dryrun.tpu_devices`.

    Returns:
      The compiled program, and for `estimate` the final bundles of its kernels: {name in the HLO: text}. Equal kernels
      are compiled once, and only one of them is in it.
    """
    folder = pathlib.Path(dump().name)
    for file in folder.iterdir():  # of an earlier program, whose kernels may have the same names
        file.unlink()
    compiled = lowered.compile()
    names = {match[1] for match in map(_KERNEL.search, compiled.as_text().splitlines()) if match}
    files = {name[1]: file for file in folder.iterdir()
             if (name := re.fullmatch(r"\d+-(.*)-\d+-final_bundles\.txt", file.name))}  # fmt: skip
    return compiled, {name: files[name].read_text() for name in names & files.keys()}


def estimate(text: str, bundles: dict[str, str], chip: str, shares: dict[str, float] | None = None) -> Estimate:
    """The cycles of a compiled program.

    Args:
      text: `compiled.as_text()`.
      bundles: of its kernels, as `compile` gives them.
      chip: one of CHIPS.
      shares: {beginning of kernels' names: the share of their bundles that is executed}. Splash attention passes over blocks
        that a mask hides, which its program reads from an array: see `attention.share`.

    Raises:
      ValueError: a kernel whose bundles are missing, or that has a loop whose trips aren't known.
    """
    lines, types, bodies = hlo.executed(text), {}, {}
    own = {name: kernel_cycles(found, name) for name, found in bundles.items()}
    for line, _ in lines:
        if match := re.match(r" *(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) [\w\-]+\(", line):
            types[match[1]] = match[2]
        if (kernel := _KERNEL.search(line)) and kernel[1] in own:
            bodies[_body(line)] = own[kernel[1]]
    total = kernels = 0
    for line, times in lines:
        if kernel := _KERNEL.search(line):
            executed = own.get(kernel[1], bodies.get(_body(line)))
            if executed is None:
                raise ValueError(
                    f"The compiler wrote no bundles of the kernel {kernel[1]}: libtpu was loaded before launch.cycles.dump() was "
                    "called, or the program came out of a compilation cache. Get the devices from launch.dryrun.tpu_devices "
                    "before anything else loads libtpu, and unset JAX_COMPILATION_CACHE_DIR."
                )
            executed *= next((share for name, share in (shares or {}).items() if kernel[1].startswith(name)), 1)
            memory = _bytes(line, kernel, types) / (CHIPS[chip].bandwidth / CHIPS[chip].clock)
            kernels += times * round(max(executed, memory))
        else:
            total += times * sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', line)))
    return Estimate(total + kernels, kernels)


def _body(line: str) -> str:
    return re.search(r'"body":"([^"]*)"', line)[1]


def _bytes(line: str, kernel, types: dict[str, str]) -> int:
    """Bytes that a kernel reads and writes in HBM: as its CostEstimate says, else its operands and results that lie there."""
    if (stated := re.search(r'"bytes_accessed":"(\d+)"', line)) and int(stated[1]):
        return int(stated[1])
    operands = [types.get(name, "") for name in re.findall(r"%([\w.\-]+)", kernel[3])]
    in_hbm = [shape for part in (kernel[2], *operands) for shape in _SHAPE.findall(part) if "S(" not in shape[2]]
    return sum(hlo.size(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims, _ in in_hbm)


def kernel_cycles(text: str, name: str) -> int:
    """Bundles that a kernel executes.

    Args:
      text: its final bundles. A line is a bundle; values have one assignment each. A loop ends with a branch back to the region
        that it begins with, by a value that compares its counter with a limit; its trips follow from these.
      name: for errors.

    Raises:
      ValueError: a loop whose start, step or limit is no constant.
    """
    bundles = []
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            assert int(match[1], 16) == len(bundles), f"{name}: no bundle {len(bundles):#x}"
            bundles.append(line)
        elif bundles:  # the rest of a comment
            bundles[-1] += line
    regions, values, aside, times = {}, {}, {}, [1] * len(bundles)
    for at, bundle in enumerate(bundles):
        for region in _REGION.findall(bundle):
            regions.setdefault(region, at)
        for value, operation, operands in _ASSIGNED.findall(bundle):
            values[value] = operation, [operand.strip() for operand in operands.split(",")]
            if operation == "sld" and (place := _SPILLED.match(operands)) and place[1] in aside:
                values[value] = values.get(aside[place[1]], (None, []))  # the same value again
        aside |= dict(_SPILL.findall(bundle))
    for at, bundle in enumerate(bundles):
        for condition, region in _BRANCH.findall(bundle):
            if (start := regions.get(region, at + 1)) <= at:
                trips = _trips(values, condition)
                if trips is None:
                    raise ValueError(
                        f"{name}: how often its loop of bundles {start:#x} to {at:#x} turns depends on data or on the grid's "
                        "index. Give fori_loop bounds that are Python integers, and add what varies inside."
                    )
                end = at + DELAY + 1
                times[start:end] = [trips * turns for turns in times[start:end]]
    waits = [sum(map(int, re.findall(r"vdelay (\d+)", bundle))) for bundle in bundles]
    return sum(turns * (1 + wait) for turns, wait in zip(times, waits, strict=True))


def _trips(values: dict, condition: str) -> int | None:
    """Of a loop that turns until `condition`: counter + step >= limit."""

    def operands(value, operation):
        found, result = values.get(value, (None, []))
        if found == "smov.u32":
            return operands(result[0], operation)
        return result if found == operation else (None, None)

    def constant(value):
        while value in values and values[value][0] == "smov.u32":
            (value,) = values[value][1]
        if value is None or not re.fullmatch(r"-?\d+", value):
            return None
        return int(value) - 2**32 if int(value) >= 2**31 else int(value)

    counter, limit = operands(condition, "scmp.ge.s32.totalorder")
    one, other = operands(counter, "sadd.s32")
    step, before = (constant(one), other) if constant(one) is not None else (constant(other), one)
    # A counter that is put aside from turn to turn begins as what was put there before the loop.
    start = constant(operands(before, "sphi")[0] or before)
    limit = constant(limit)
    if None in (start, step, limit) or step < 1:
        return None
    return max(1, -((start - limit) // step))
