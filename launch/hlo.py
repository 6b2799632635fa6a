"""What a compiled program executes and communicates, read from its HLO text."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
          "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_METADATA = re.compile(r"kernel_metadata=\{\n.*\n\}\}")  # breaks an instruction into lines
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One collective instruction of a program for one device."""

    kind: str  # of KINDS
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, dimensions) of what it gives each device
    group: int  # devices that take part together
    times: int  # executions in one run of the program

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def bytes(self) -> int:
        """Size of its result, times its executions."""
        return self.times * sum(size(dtype, shape) for dtype, shape in self.shapes)


def size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array."""
    return _BYTES.get(dtype, 4) * math.prod(shape)


def executed(text: str) -> list[tuple[str, int]]:
    """The instructions of a compiled program outside of fusions, and how often each is executed.

    Args:
      text: `compiled.as_text()`. Of a conditional, the longest branch counts.

    Raises:
      ValueError: a loop whose number of trips the text does not say.
    """
    computations, name = {}, None
    for line in _METADATA.sub("kernel_metadata={}}", text).splitlines():
        if match := _COMPUTATION.match(line):
            name = "ENTRY" if line.startswith("ENTRY") else match[1]
            computations[name] = []
        elif name and line.startswith("  "):
            computations[name].append(line)

    def bound(condition) -> int:  # the constant that a loop's counter is compared with
        lines = computations[condition]
        lines = lines + [line for one in lines for called in _CALLED.findall(one) for line in computations[called]]
        turns = {int(n) for line in lines for n in _BOUND.findall(line)}
        if len(turns) != 1:
            raise ValueError(f"The program doesn't say how often the loop with the condition {condition} runs.")
        return turns.pop()

    def inside(name, times):
        for line in computations[name]:
            if match := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                known = _TRIPS.search(line)
                yield from inside(match[2], times * (int(known[1]) if known else bound(match[1])))
            elif " conditional(" in line:
                branches = [name.strip().lstrip("%") for found in _BRANCHES.findall(line) for name in found.split(",")]
                yield from inside(max(branches or _CALLED.findall(line), key=lambda one: len(computations[one])), times)
            elif match := re.search(r" (?:call|async-start)\(.*(?:to_apply|calls)=%?([\w.\-]+)", line):
                yield from inside(match[1], times)
            else:
                yield line, times

    return list(inside("ENTRY", 1))


def collectives(text: str) -> list[Collective]:
    """All collectives of more than one device, with how often loops execute them.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: a collective in a loop whose number of trips the text does not say.
    """
    found, calls, bounds, name, entry = {}, {}, {}, None, None
    pieces = set()
    devices = int(re.search(r"num_partitions=(\d+)|$", text)[1] or 1)
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            found[name], calls[name], bounds[name] = [], [], []
            if line.startswith("ENTRY"):
                entry = name
        if name is None or " = " not in line:
            continue
        if match := _COLLECTIVE.search(line):
            shapes = tuple(
                (d, tuple(map(int, filter(None, s.split(","))))) for d, s in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            )
            if match[3] and match[2] != "all-reduce":  # (operands..., results..., contexts)
                shapes = shapes[len(shapes) // 2 :] if len(shapes) % 2 == 0 else shapes[1:2]
            group = _group(line) or devices
            # The TPU's compiler fuses one collective with several pieces of other work, and names it in each.
            piece = (re.search(r"channel_id=(\d+)|$", line)[1], shapes) if "fus" in name else None
            if group > 1 and piece not in pieces:
                found[name].append((match[2], shapes, group))
                if piece:
                    pieces.add(piece)
        bounds[name] += _BOUND.findall(line)
        trips = 1
        if " while(" in line:
            known = _TRIPS.search(line)
            trips = int(known[1]) if known else _CONDITION.search(line)[1]
        called = _CALLED.findall(line) + [b.strip().lstrip("%") for m in _BRANCHES.findall(line) for b in m.split(",")]
        for other in called:
            calls[name].append((other, trips))

    def below(name, times):
        result = [Collective(*one, times) for one in found.get(name, [])]
        for other, trips in calls.get(name, []):
            if isinstance(trips, str):  # a condition, which compares a counter from 0 on with its only constant
                if len(bounds[trips]) != 1:
                    if not below(other, 1):
                        continue
                    raise ValueError(f"The loop {other} communicates, but the program doesn't say how often it runs.")
                trips = int(bounds[trips][0])
            result += below(other, times * trips)
        return result

    return below(entry, 1)


def _group(line: str) -> int | None:
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):  # groups, devices in each
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):  # from jax 0.11 on: 'data'=4,... and axes
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return 2 if any(a != b for a, b in re.findall(r"\{(\d+),(\d+)", match[0])) else 1
    return None  # none named: all devices
