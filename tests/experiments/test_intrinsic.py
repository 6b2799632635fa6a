"""The intrinsic dimension: which d are tried, and what is said of them. The runs themselves are train.py's."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import intrinsic

FOUND = {"head": 0.5, "full": 0.9}


@given(st.integers(1, 2**40), st.integers(0, 41))
def test_the_smallest_that_reaches_it_by_few_runs(most, first):
    """Scores rise at 2^first; the largest power of two up to `most` may be too small."""
    asked = []

    def score(d):
        asked.append(d)
        return float(d >= 1 << first)

    expected = 1 << first if 1 << first <= most else None
    assert intrinsic.smallest(score, 1.0, most) == expected
    assert len(asked) == len(set(asked)) <= 2 + most.bit_length().bit_length()


@pytest.fixture
def trained(monkeypatch):
    """What would be trained: the configs, in order."""
    made = []

    def train(config, workdir):
        made.append(config)
        d = config.method.get("d")
        score = FOUND.get(config.method.name) or (0.87 if d >= 1000 else 0.5 + d / 10_000)
        return {"validation": score, "test": score - 0.01, "trained_numbers": d or 7, "metric": "accuracy"}

    monkeypatch.setattr(intrinsic, "train", train)
    return made


def test_the_curve_of_a_task(trained, make_config, tmp_path):
    config = make_config("gpart")
    config.method.targets = r"attention/(query|value)/kernel$"
    curve = intrinsic.intrinsic(config, 0.9, [3, 4], 2.56, 1e-4, tmp_path)
    assert curve["wanted"] == pytest.approx(0.86) and curve["dimension"] == 1024
    assert json.loads((tmp_path / "curve.json").read_text()) == curve and (tmp_path / "curve.png").is_file()
    assert [config.method.name for config in trained[:4]] == ["head", "head", "full", "full"]
    assert [config.seed for config in trained[:2]] == [3, 4] and trained[2].optimizer.lr == 1e-4
    for own in trained[4:]:
        assert (own.optimizer.step, own.optimizer.lr, own.method.seed) == (2.56, None, own.seed)


def test_what_has_no_dimension_is_refused(trained, make_config, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="found with gpart, not with lora"):
        intrinsic.intrinsic(make_config("lora"), 0.9, [0], 1.0, 1e-4, tmp_path)
    monkeypatch.setitem(FOUND, "full", 0.4)
    with pytest.raises(ValueError, match="there is no gain to have a share of. Set --full_lr"):
        intrinsic.intrinsic(make_config("gpart"), 0.9, [0], 1.0, 1e-4, tmp_path)
