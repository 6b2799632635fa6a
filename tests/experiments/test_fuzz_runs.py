"""Damaged files of data and of runs: the right result or a ValueError or FileNotFoundError in so many words, and nothing written.

GPART_FUZZ=2000 makes so many mutations of each valid file, in place of 40.
"""

import io
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import quickstart, vision
from experiments import images, reasoning, report
from experiments.answers import RULES
from experiments.tasks import math
from experiments.tasks.vision import load_vision
from experiments.workdir import changes, check_workdir, read_config, read_lines
from gpart_jax.commands import explain

LONG = settings(max_examples=int(os.environ.get("GPART_FUZZ", 40)), deadline=None, suppress_health_check=list(HealthCheck))
RESULTS = {
    "method": "gpart", "task": "lexicon", "seed": 1, "metric": "accuracy", "test": 0.5, "trained_numbers": 9, "adapter_bytes": 9,
    "test_by_class": {"a": 0.5, "b": 0.5, "c": 0.1},
}  # fmt: skip
ROWS = [{"idx": n, "prompt": "1?", "completion": " The answer is: 2", "ended": "eos", "answer": "2", "right": "2", "correct": True} for n in (0, 1)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def picture(form):
    Image.new("P" if form in ("GIF", "PNG") else "RGB", (8, 8), 3).save(buffer := io.BytesIO(), form)
    return buffer.getvalue()


def read_picture(path):
    return images.decode({"image": path.read_bytes(), "id": path.name})


def read_folder(path):
    task = load_vision("folder", seed=0, image_size=8, data_dir=str(path.parents[2]), holdout=0.0)
    return task.collate([task.train[n] for n in range(len(task.train))])


def read_aircraft(path):
    return load_vision("aircraft", seed=0, image_size=8, data_dir=str(path.parent))


def read_run(path):
    runs = report.find_runs(path.parent)
    return report.markdown(runs), report.latex(runs)


def read_workdir(path):
    read_config(path.parent)
    (path.parent / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
    check_workdir(quickstart.get_config(), path.parent)


def read_math(path):
    for example in math.read_math(path):
        assert RULES["math"].answer(example["response"])


META = [{"query": "1 + 1?", "response": "The answer is: 2", "type": "x"}] * 2
PROBLEMS = [{"problem": "1 + 1?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "1", "type": "x"}] * 2
CONFIG, IMAGES = (config.get_config().to_json().encode() for config in (quickstart, vision))
VARIANTS = {"variants.txt": b"A300\nB1 x\n", **{f"images_variant_{name}.txt": b"1 A300\n2 B1 x\n" for name in ("train", "val", "test")}}
FILES = {  # name -> where it lies, its content, what reads it, and what lies beside it
    "metamathqa": ("m.json", json.dumps(META).encode(), math.read_metamathqa, {}),
    "metamathqa lines": ("m.jsonl", lines(META), math.read_metamathqa, {}),
    "math": ("m.json", json.dumps(PROBLEMS).encode(), read_math, {}),
    "math folder": ("d/1.json", json.dumps(PROBLEMS[0]).encode(), lambda path: read_math(path.parent), {}),
    "answers": ("predictions.jsonl", lines(ROWS), reasoning._read, {}),
    "metrics": ("metrics.jsonl", lines([{"step": 1, "loss": 0.5}] * 2), read_lines, {}),
    "config": ("config.json", CONFIG, read_workdir, {}),
    "config of images": ("config.json", IMAGES, read_workdir, {}),
    "config in a report": ("config.json", CONFIG, read_run, {"results.json": json.dumps(RESULTS).encode()}),
    "results": ("results.json", json.dumps(RESULTS).encode(), read_run, {"config.json": CONFIG}),
    "origin": ("origin.json", b'{"train data": "1"}', lambda path: changes(path.parent, {"train data": "2"}), {}),
    "variants": ("variants.txt", VARIANTS["variants.txt"], read_aircraft, VARIANTS),
    "list of aircraft": ("images_variant_val.txt", VARIANTS["images_variant_val.txt"], read_aircraft, VARIANTS),
    "picture in a folder": ("train/a/x.png", picture("PNG"), read_folder, {"test/a/x.png": picture("PNG")}),
    **{form: (f"x.{form}", picture(form), read_picture, {}) for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")},
}


@st.composite
def mutations(draw, content: bytes):
    """A valid file, cut, with bytes changed, put in or taken out; of JSON, with a value changed for another kind of value."""
    kind = draw(st.sampled_from(["cut", "bytes", "insert", "remove", "value", "value"]))
    at = draw(st.integers(0, len(content)))
    if kind == "cut":
        return content[:at]
    if kind == "remove":
        return content[:at] + content[at + draw(st.integers(1, 40)) :]
    if kind == "bytes":
        new = draw(st.binary(min_size=1, max_size=4))
        return content[:at] + new + content[at + len(new) :]
    other = draw(st.sampled_from([b"null", b"[]", b"{}", b'""', b"-1", b"1e999", b"NaN", b"true", b'"\\ud800"', b"[" * 3000, b"\n", b"0", b'"x"']))
    if kind == "insert":
        return content[:at] + other + content[at:]
    end = min((n for n in (content.find(mark, at) for mark in (b",", b"}", b"]")) if n >= 0), default=len(content))
    start = max(content.rfind(mark, 0, end) for mark in (b":", b"[", b",")) + 1
    return content[:start] + other + content[max(start, end) :]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_gives_the_right_result_or_a_clear_error(name, tmp_path_factory):
    where, content, read, beside = FILES[name]
    folder = tmp_path_factory.mktemp("fuzz") / "here"
    for other, stored in beside.items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(stored)
    path = folder / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    before = None
    if "config" not in name:
        before = read(path)  # it is valid

    @LONG
    @given(mutations(content))
    def check(mutated):
        path.write_bytes(mutated)
        listed = sorted(str(one) for one in folder.rglob("*") if "checkpoints" not in str(one))
        try:
            read(path)
        except (ValueError, FileNotFoundError) as error:
            assert explain(error), repr(error)  # raised by us, in so many words
        assert sorted(str(one) for one in folder.rglob("*") if "checkpoints" not in str(one)) == listed
        if name != "answers":  # whose last line, cut as it was written, is dropped from the file
            assert path.read_bytes() == mutated

    check()
    path.write_bytes(content)
    assert before is None or read(path) is not None or before == read(path)
