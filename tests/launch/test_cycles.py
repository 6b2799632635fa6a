"""Estimates of a TPU's cycles, from a dump that is committed and, where libtpu is installed, from its compiler."""

import importlib.util
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from launch import cycles, hlo

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT / "tests/data/cycles"
# Of make_fixtures.TURNS, and the bundles of each loop that are in no inner one, counted by hand in nested.5.bundles.txt.
NESTED = 11 + 2 * (6 + 37 * (10 + 3 * (15 + 5 * 10)))


def read(folder):
    bundles = {file.name.removesuffix(".bundles.txt"): file.read_text() for file in folder.glob("*.bundles.txt")}
    return (folder / "program.txt").read_text(), bundles


@pytest.fixture(scope="module")
def committed():
    return read(DATA)


def without_unknown(text, bundles):
    text = "\n".join(line for line in text.splitlines() if "%unknown.1 = " not in line)
    return text, {name: found for name, found in bundles.items() if name != "unknown.1"}


def test_bundles_count_as_often_as_their_loops_turn(committed):
    text = committed[1]["nested.5"]
    assert cycles.kernel_cycles(text, "nested") == NESTED
    assert cycles.kernel_cycles(text.replace("%s26_s11, 37 /*", "%s26_s11, 370 /*"), "nested") == (
        11 + 2 * (6 + 370 * (10 + 3 * (15 + 5 * 10)))
    )
    assert cycles.kernel_cycles(text.replace("sfence", "vdelay 9"), "nested") == NESTED + 9


SPILLED = """
     0   :  { %s1_s0 = smov.u32 0 }
   0x1 LB: > { %s2_s1 = sphi %s1_s0, %s9_s2  ;;  %8 = sst [smem:[#allocation7_spill]] %s2_s1 } /* Start region 5 */
   0x2   : > { %s5_s1 = sld [smem:[#allocation7_spill]] (%p0_p1) /* phi copy */ }
   0x3   : > { %s9_s2 = sadd.s32 1, %s5_s1 /* copy for cssa */ }
   0x4   : > { %s6_s3 = smov.u32 (%p0_p1), %s9_s2  ;;  %p3_p0 = scmp.ge.s32.totalorder %s6_s3, 7 /* loop exit test */ }
   0x5   : > { %9 = sbr.rel (!%p3_p0) target = $region5 }
   0x6   : > { %10 = vnop }
   0x7   : > { %11 = vnop }
   0x8   : > { %12 = vnop }
   0x9   : > { %13 = vnop }
   0xa   :  { %14 = vnop }
"""


def test_a_counter_that_is_put_aside_and_copied_is_followed():
    """As the compiler does where registers are few."""
    assert cycles.kernel_cycles(SPILLED, "spilled") == 1 + 7 * 9 + 1


def test_a_counter_that_lies_aside_from_turn_to_turn_begins_as_it_was_put_there():
    text = SPILLED.replace("%s2_s1 = sphi %s1_s0, %s9_s2  ;;  %8 = sst [smem:[#allocation7_spill]] %s2_s1", "%8 = vnop")
    text = text.replace("%s1_s0 = smov.u32 0", "%s1_s0 = smov.u32 2  ;;  %7 = sst [smem:[#allocation7_spill]] %s1_s0")
    text = text.replace("%10 = vnop", "%10 = sst [smem:[#allocation7_spill]] %s9_s2")
    assert cycles.kernel_cycles(text, "put aside") == 1 + 5 * 9 + 1


def test_of_kernels_that_pass_over_blocks_a_share_counts(committed):
    text, bundles = without_unknown(*committed)
    text = text.replace("f32[1048576,128]", "f32[64,128]").replace('"bytes_accessed":"1000000000"', "")
    whole = cycles.estimate(text, bundles, "v5e")
    half = cycles.estimate(text, bundles, "v5e", {"nested": 0.5, "other": 0.1})
    assert half.kernels == 14 * round(NESTED / 2) and half.cycles - half.kernels == whole.cycles - whole.kernels
    # What a kernel says of itself may break its instruction into lines.
    target = 'custom_call_target="tpu_custom_call"'
    broken = text.replace(target, target + ', frontend_attributes={kernel_metadata={\n"a":"{1}"\n}}')
    assert broken != text and cycles.estimate(broken, bundles, "v5e") == whole


def test_a_loop_of_unknown_length_is_refused(committed):
    with pytest.raises(ValueError, match="unknown.1: how often its loop of bundles 0xe to 0x11 turns depends on data"):
        cycles.kernel_cycles(committed[1]["unknown.1"], "unknown.1")
    with pytest.raises(ValueError, match="unknown.1: how often"):
        cycles.estimate(*committed, "v5e")


@pytest.mark.parametrize("chip", cycles.CHIPS)
def test_a_kernel_takes_its_bundles_or_its_bytes(committed, chip):
    text, bundles = without_unknown(*committed)
    a_cycle = cycles.CHIPS[chip].bandwidth / cycles.CHIPS[chip].clock
    written, count = 4 * 2**20 * 128, 4 * 8  # the operand of the one in the loop is in the chip's own memory
    assert cycles.estimate(text, bundles, chip).kernels == 13 * round(written / a_cycle) + round(10**9 / a_cycle)
    small = text.replace("f32[1048576,128]", "f32[64,128]").replace('"bytes_accessed":"1000000000"', "")
    assert 4 * 64 * 128 + count < NESTED * a_cycle
    assert cycles.estimate(small, bundles, chip).kernels == 14 * NESTED


def test_equal_kernels_share_a_dump(committed):
    text, bundles = without_unknown(*committed)
    one = {"nested.5": bundles["nested.5"]}
    assert cycles.estimate(text, one, "v5e") == cycles.estimate(text, bundles, "v5e")
    with pytest.raises(ValueError, match="no bundles of the kernel nested.5: libtpu was loaded before"):
        cycles.estimate(text, {}, "v5e")


def test_estimates_of_the_compiler_count_as_often_as_their_loops_turn(committed):
    text, bundles = without_unknown(*committed)
    found = cycles.estimate(text, bundles, "v5e")
    loop, rest = text.split("ENTRY")
    estimates = [sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', part))) for part in (loop, rest)]
    assert min(estimates) > 0
    assert found.cycles - found.kernels == 13 * estimates[0] + estimates[1]


def test_branches_and_calls_are_walked():
    text = """HloModule toy
%short (p: s32[]) -> s32[] {
  ROOT %p = s32[] parameter(0)
}
%long (q: s32[]) -> s32[] {
  %q = s32[] parameter(0)
  ROOT %work = s32[] negate(%q)
}
%called (r: s32[]) -> s32[] {
  ROOT %more = s32[] conditional(%r, %r, %r), branch_computations={%short, %long}
}
ENTRY %main (s: s32[]) -> s32[] {
  ROOT %out = s32[] call(%s), to_apply=%called
}
"""
    assert [line.split(" = ")[0].strip() for line, _ in hlo.executed(text)] == ["%q", "ROOT %work"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu, which isn't installed")
def test_the_compiler_of_a_v5e_gives_what_is_read(tmp_path):
    command = [sys.executable, "-m", "tests.data.cycles.make_fixtures", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, bundles = read(tmp_path)
    rows = math.prod(
        (2, 37, 3, 5)
    )  # of the kernel that is nested; a row takes a dozen bundles, more than half of them its own
    (found,) = {cycles.kernel_cycles(bundles[name], name) for name in bundles if name.startswith("nested")}
    assert 9 * rows < found < 20 * rows
    assert cycles.estimate(*without_unknown(text, bundles), "v5e").kernels > 14 * found
    with pytest.raises(ValueError, match="unknown.*: how often its loop"):
        cycles.estimate(text, bundles, "v5e")
