"""GLUE as TFDS prepares it: what is read, what is refused, and whole runs from configs/glue.py with tiny models."""

import json
import shutil

import jax
import numpy as np
import pytest
import scipy.stats
import tensorflow_datasets as tfds

from configs import glue as config_glue
from experiments import metrics
from experiments.build import build
from experiments.tasks import glue, load_task
from experiments.train import train


def spec(name, directory, **options):
    return {"name": f"glue/{name}", "max_length": 32, "holdout": 0.0, "data_dir": str(directory)} | options


def test_the_recipes_are_those_published():
    config = config_glue.get_config("rte,large")
    assert (config.train.epochs, config.optimizer.lr, config.optimizer.head_lr) == (120, 5e-3, 5e-3)
    assert (config.method.d, config.method.dropout, config.task.max_length) == (23_040, 0.1, 512)
    assert (config.optimizer.weight_decay, config.optimizer.warmup, config.train.batch_size) == (0.1, 0.06, 32)
    config = config_glue.get_config("sst2,lora,base")  # in any order
    assert (config.train.epochs, config.optimizer.lr, config.optimizer.head_lr) == (60, 5e-4, 1e-3)


def test_the_partitions_seed_follows_the_runs_unless_it_is_set():
    config = config_glue.get_config("cola")
    config.seed = 7
    assert config.method.seed == 7
    config.method.seed = 8
    assert (config.seed, config.method.seed) == (7, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("wnli", "no task 'wnli' for base. Choose one of cola"),
        ("cola,minilm", "no task 'cola' for minilm"),
        ("sst2,huge", "'huge' is neither a size"),
    ],
)
def test_unknown_config_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        config_glue.get_config(arguments)


@pytest.mark.parametrize("name", glue.FIELDS)
def test_each_task_is_read_in_glues_order(name, glue_dir, tiny_model):
    task = load_task(spec(name, glue_dir), tiny_model, seed=0)
    assert (len(task.train), len(task.validation), len(task.test)) == (400, 0, 40)
    assert [example["idx"] for example in task.test] == sorted(example["idx"] for example in task.test)
    pair = len(glue.FIELDS[name]) == 2
    for example in task.train:
        first = example["text"][0] if pair else example["text"]
        good = example["label"] > 2.5 if name == "stsb" else example["label"] == 1
        assert first.startswith("good" if good else "bad")
        assert ("token_type_ids" in example) == pair
    assert task.outputs == (1 if name == "stsb" else 2)
    assert any("naïve" in str(example["text"]) for example in task.train)


def test_roberta_gets_no_token_types(glue_dir, tiny_roberta):
    task = load_task(spec("rte", glue_dir, max_length=64), tiny_roberta, seed=0)
    assert not any("token_type_ids" in example for example in task.train)
    ids = task.train[0]["input_ids"].tolist()
    assert ids[0] == 0 and ids.count(2) == 3  # <s> first </s></s> second </s>


def test_the_first_examples_and_the_held_out_ones(glue_dir, tiny_model):
    task = load_task(spec("sst2", glue_dir, train_examples=350, holdout=0.2), tiny_model, seed=3)
    assert (len(task.train), len(task.validation), len(task.test)) == (50, 300, 40)
    assert {example["idx"] for example in task.train + task.validation} == set(range(350))
    with pytest.raises(ValueError, match="train_examples = 401 must be between 1 and 400"):
        load_task(spec("sst2", glue_dir, train_examples=401), tiny_model, seed=0)


def test_missing_data_gets_the_command_that_prepares_it(tmp_path, tiny_model):
    with pytest.raises(
        FileNotFoundError, match=r"(?s)no glue/cola in .*config.task.data_dir.*download_and_prepare\(\)"
    ):
        load_task(spec("cola", tmp_path), tiny_model, seed=0)


def test_truncated_and_missing_files_are_named(glue_dir, tmp_path, tiny_model):
    shutil.copytree(glue_dir / "glue" / "rte", tmp_path / "glue" / "rte")
    (file,) = (tmp_path / "glue" / "rte").rglob("*-train.array_record*")
    content = file.read_bytes()
    for kept in (len(content) // 2, 0):
        file.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"(?s)train split of glue/rte in .* cannot be read .*prepare it again"):
            load_task(spec("rte", tmp_path), tiny_model, seed=0)
    file.unlink()
    with pytest.raises(ValueError, match=r"(?s)train split of glue/rte .* cannot be read .*No such file"):
        load_task(spec("rte", tmp_path), tiny_model, seed=0)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("sst2", {"sentence": b"  "}, "glue/sst2 train, idx 5, in .*: sentence is empty"),
        ("sst2", {"label": -1}, r"idx 5, .*: the label is -1, but should be one of 0 \(negative\), 1 \(positive\)"),
        ("sst2", {"label": 2}, "the label is 2, but"),
        ("rte", {"sentence2": b""}, "sentence2 is empty"),
        ("stsb", {"label": 5.5}, r"the label is 5.5, but should be a score from 0.0 to 5.0"),
        ("stsb", {"label": np.nan}, "the label is nan"),
    ],
)
def test_bad_examples_are_named(name, change, message, glue_dir, tiny_model, monkeypatch):
    original = tfds.core.DatasetBuilder.as_data_source

    def changed(self, split):
        rows = list(original(self, split=split))
        rows = [row | change if row["idx"] == 5 else row for row in rows]
        return type("Source", (list,), {"__getitems__": lambda self, at: [self[n] for n in at]})(rows)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", changed)
    with pytest.raises(ValueError, match=message):
        load_task(spec(name, glue_dir), tiny_model, seed=0)


def small(arguments, source, glue_dir):
    config = config_glue.get_config(arguments)
    config.model.source = str(source)
    config.task.data_dir = str(glue_dir)
    config.task.max_length = 64
    config.task.holdout = 0.2  # 300 of 400
    config.model.dropout = 0.0
    config.train.batch_size, config.train.epochs = 10, 10
    config.method.d = 256
    return config


def test_a_classification_learns_with_roberta(tiny_roberta, glue_dir, tmp_path):
    config = small("rte,base", tiny_roberta, glue_dir)
    results = train(config, tmp_path, jax.devices()[:2])
    assert results["trained_numbers"] == 256 + 32 * 32 + 32 + 2 * 32 + 2
    assert results["test"] > 0.9 and results["validation"] > 0.9
    row = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert set(row) == {"text", "label", "idx", "prediction", "logits"}


def test_a_regression_learns_with_bert(tiny_model, glue_dir, tmp_path):
    config = small("stsb,base", tiny_model, glue_dir)
    config.method, config.optimizer.lr = {"name": "full"}, 1e-2  # of all its random weights, or it is slow to learn
    results = train(config, tmp_path, jax.devices()[:2])
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    scores, labels = [row["prediction"] for row in rows], [row["label"] for row in rows]
    assert results["metric"] == "pearson" and results["test"] > 0.9
    expected = {
        "pearson": scipy.stats.pearsonr(labels, scores)[0],
        "spearman": scipy.stats.spearmanr(labels, scores)[0],
    }
    assert results["test_scores"] == pytest.approx(expected, abs=1e-6)


def test_without_held_out_examples_the_last_epoch_is_tested(tiny_model, glue_dir, tmp_path):
    config = small("sst2,base", tiny_model, glue_dir)
    config.task.holdout, config.train.epochs = 0.0, 2
    results = train(config, tmp_path, jax.devices()[:2])
    assert results["best_epoch"] == 2 and results["validation"] is None


def test_texts_longer_than_the_model_takes_are_refused_at_the_start(tiny_model, glue_dir):
    config = small("sst2,base", tiny_model, glue_dir)
    config.task.max_length = 65
    with pytest.raises(ValueError, match="max_length = 65, but .* takes 64 tokens"):
        build(config)


def test_metrics_of_a_worked_example():
    labels, guesses = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1]
    assert metrics.METRICS["accuracy"](labels, guesses) == 0.75
    assert metrics.METRICS["f1"](labels, guesses) == pytest.approx(2 / 3)
    assert metrics.METRICS["matthews"](labels, guesses) == pytest.approx(7 / 15)  # (2 * 4 - 1 * 1) / 15
    assert metrics.METRICS["pearson"]([0.0, 1.0, 2.0], [0.0, 1.0, 8.0]) == pytest.approx(8 / np.sqrt(2 * 38))
    assert metrics.METRICS["spearman"]([0.0, 1.0, 2.0], [0.0, 1.0, 8.0]) == pytest.approx(1.0)
    assert metrics.METRICS["pearson"]([0.0, 1.0, 2.0], [3.0, 3.0, 3.0]) == 0.0
