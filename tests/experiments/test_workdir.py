"""What a run began with: written down, compared when it goes on, the same in another place."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import vision
from experiments import data
from experiments.build import build
from experiments.tasks import load_task
from experiments.train import train
from experiments.workdir import changes, keep_origin

SPLITS = ("train", "validation", "test")


def saved(workdir):
    (workdir / "checkpoints" / "4").mkdir(parents=True)
    return workdir


def test_what_a_run_began_with_is_kept_from_its_first_checkpoint_on(tmp_path):
    keep_origin(tmp_path, {"train data": "1"})
    keep_origin(tmp_path, {"train data": "2"})  # nothing was saved: claimed anew
    saved(tmp_path)
    keep_origin(tmp_path, {"train data": "2", "of a later version": "3"})
    with pytest.raises(ValueError, match="other data or another model: train data: 2 there, 4 here. Bring back"):
        keep_origin(tmp_path, {"train data": "4"})
    assert json.loads((tmp_path / "origin.json").read_text()) == {"train data": "2"}


def test_a_run_of_the_version_before_goes_on_and_has_it_from_then_on(tmp_path):
    keep_origin(saved(tmp_path), {"train data": "1"})
    assert changes(tmp_path, {"train data": "2"}) == ["train data: 1 there, 2 here"]


EXAMPLE = {"input_ids": np.array([1, 2], np.int32), "image": b"ab", "label": 1, "id": "a.png", "idx": 3}


@pytest.mark.parametrize(
    "change, same",
    [
        ({"input_ids": np.array([1, 3], np.int32)}, False),
        ({"input_ids": np.array([[1, 2]], np.int32)}, False),
        ({"loss_mask": np.array([0, 1], np.int32)}, False),
        ({"image": b"ac"}, False),
        ({"label": 0}, False),
        ({"label": 1.5}, False),
        ({"id": "b.png", "idx": 4}, True),
    ],
)
def test_all_that_is_learned_of_an_example_counts(change, same):
    examples = [EXAMPLE | {"label": n % 2} for n in range(600)]  # of several threads
    changed = [*examples[:599], examples[599] | change]
    assert (data.fingerprint(examples) == data.fingerprint(changed)) == same
    assert data.fingerprint(examples) != data.fingerprint(examples[::-1])
    assert data.fingerprint([]) == data.fingerprint([]) != data.fingerprint(examples[:1])


def origins(spec, where=None):
    task = load_task(spec, where, seed=0)
    return {split: data.fingerprint(getattr(task, split)) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_that_change_in_place_are_other_data_and_copies_are_the_same(tmp_path, split):
    draw = np.random.default_rng(0)
    for part in SPLITS:
        for label in "ab":
            (tmp_path / "here" / part / label).mkdir(parents=True)
            for n in range(2):
                pixels = draw.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "here" / part / label / f"{n}.png")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = ({"name": "folder", "image_size": 8, "data_dir": str(tmp_path / name)} for name in ("here", "there"))
    before = origins(here)
    assert origins(there) == before
    Image.new("RGB", (8, 8), "red").save(tmp_path / "there" / split / "b" / "1.png")
    after = origins(there)
    assert [part for part in SPLITS if after[part] != before[part]] == [split]


def test_prepared_data_and_the_tokenizer_count(glue_dir, tiny_model, tmp_path):
    spec = {"name": "glue/sst2", "max_length": 16, "holdout": 0.75, "data_dir": str(glue_dir)}
    before = origins(spec, tiny_model)
    shutil.copytree(glue_dir / "glue" / "sst2", tmp_path / "glue" / "sst2")
    assert origins(spec | {"data_dir": str(tmp_path)}, tiny_model) == before
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] |= {"a": 5, "b": 4}
    file.write_text(json.dumps(tokenizer))
    after = origins(spec, tmp_path / "model")
    assert all(after[part] != before[part] for part in SPLITS)


@pytest.mark.parametrize("family", ["text", "images"])
def test_training_refuses_to_go_on_with_other_data_or_another_model(family, config, tmp_path):
    if family == "images":
        config = vision.get_config("digits,pretrain")
        config.model.shape.update(hidden_size=16, num_layers=1, intermediate_size=32)
    origin = build(config).origin()
    assert {"train data", "validation data", "test data", "labels of the data", "model's weights"} <= origin.keys()
    saved(tmp_path)
    (tmp_path / "config.json").write_text(config.to_json())
    for name in ("validation data", "model's weights", "model.hidden_size"):
        (tmp_path / "origin.json").write_text(json.dumps(origin | {name: "another"}))
        with pytest.raises(ValueError, match=f"other data or another model: {name}: another there, .* here"):
            train(config, tmp_path)
    assert build(config).origin() == origin
