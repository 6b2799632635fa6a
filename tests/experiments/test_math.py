"""The data of mathematical reasoning: GSM8K as TFDS prepares it, MetaMathQA's and MATH's own formats, made-up problems."""

import json
import logging
import re

import huggingface_hub
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tensorflow_datasets.text.gsm8k  # noqa: F401 (registers GSM8K)
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.answers import RULES
from experiments.tasks import math
from gpart_jax.models.vocabulary import Vocabulary

SOLUTION = "She has 3 + 4 = <<3+4=7>>7 apples.\nThat is <<1000*7=7000>>7,000 grams.\n#### 7,000"
METAMATH = [
    {
        "query": "What is 1 + 1?",
        "response": "It is 2.\nThe answer is: 2",
        "type": "MATH_Rephrased",
        "original_question": "?",
    },
    {"query": "What is {x}\u2028?", "response": "The answer is: 3", "type": "GSM_SV", "original_question": "?"},
]
MATH = {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "level": "Level 1", "type": "Algebra"}


@pytest.fixture(scope="module")
def letters():
    """Each letter is a token; <s> is 0 and </s> is 1."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "</s>": 1} | {chr(n): n for n in range(9, 127)}, "x")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return tokenizer


@pytest.fixture(scope="module")
def gsm8k_dir(tmp_path_factory):
    """GSM8K with made-up problems, prepared by TFDS's own code from a file in GSM8K's own format."""
    files, prepared = tmp_path_factory.mktemp("gsm8k_files"), tmp_path_factory.mktemp("tfds")
    rows = [{"question": f"Problem {n}: how many grams?", "answer": SOLUTION} for n in range(20)]
    (files / "all.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        paths = {split: files / "all.jsonl" for split in ("train", "test", "train_socratic", "test_socratic")}
        patch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda self, urls: paths)
        tfds.builder("gsm8k", data_dir=prepared, file_format="array_record").download_and_prepare()
    return prepared


# Text


def text_of(tokenizer, ids):
    return "".join(tokenizer.id_to_token(number) for number in ids)


@pytest.mark.parametrize("bos", [None, 0])
def test_training_text_and_what_the_loss_covers(letters, bos):
    (example,) = examples = [{"question": "1+1?", "response": "It is 2."}]
    math.encode_training(Vocabulary(letters, bos, 1), examples, 100, "train")
    assert example["text"] == "Question: 1+1?\nAnswer: It is 2."
    begin = "" if bos is None else "<s>"
    assert text_of(letters, example["input_ids"]) == begin + example["text"] + "</s>"
    assert example["loss_mask"].tolist() == [0] * bool(begin) + [1] * (len(example["text"]) + 1)
    assert example["input_ids"].dtype == example["loss_mask"].dtype == np.int32
    math.encode_prompts(Vocabulary(letters, bos, 1), examples)
    assert example["prompt"] == "Question: 1+1?\nAnswer:"
    assert text_of(letters, example["input_ids"]) == begin + example["prompt"]


def test_long_examples_keep_their_end(letters, caplog):
    examples = [{"question": "1+1?", "response": response} for response in ("It is 2.", "2", "3.")]
    math.encode_training(Vocabulary(letters, 0, 1), examples, 26, "train")
    assert [text_of(letters, example["input_ids"]) for example in examples] == [
        "<s>n: 1+1?\nAnswer: It is 2.</s>",
        "<s>Question: 1+1?\nAnswer: 2</s>",
        "<s>uestion: 1+1?\nAnswer: 3.</s>",
    ]
    assert [example["loss_mask"].tolist() for example in examples] == [[0] + [1] * 25] * 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "train: 2 of 3 texts are longer than 26 tokens and were cut" in caplog.text
    with pytest.raises(ValueError, match="max_length = 2 leaves no room"):
        math.encode_training(Vocabulary(letters, 0, 1), examples, 2, "train")


def test_a_template_is_of_training_and_of_prompts_alike(letters):
    template = "Question: {question} Think step by step.\nAnswer:{response}"
    (example,) = examples = [{"question": "1+{1}?", "response": "2."}]
    math.encode_training(Vocabulary(letters, None, 1), examples, 100, "train", template)
    assert example["text"] == "Question: 1+{1}? Think step by step.\nAnswer:2."
    assert example["loss_mask"].all()  # question and answer
    math.encode_prompts(Vocabulary(letters, None, 1), examples, template)
    assert example["prompt"] == "Question: 1+{1}? Think step by step.\nAnswer:"
    assert math.prompt_of(None) == "Question: {question}\nAnswer:"


@pytest.mark.parametrize(
    "template",
    ["", "{question}", "{response} {question}", "{question} {response}.", "{query} {response}", "{question}{idx}{response}",
     "{question}{question}{response}", "{ {question}{response}", "{question[0]}{response}"],
)  # fmt: skip
def test_what_is_no_template_is_named(template):
    with pytest.raises(ValueError, match="config.task.template = .* must have {question} and {response} once each"):
        math.load_reasoning("problems", None, seed=0, max_length=8, template=template)


def test_long_texts_are_left_out_before_any_are_chosen(letters, tmp_path):
    rows = [{"query": "?" * length, "response": "."} for length in range(1, 21)]  # and a space: two characters more
    (tmp_path / "meta.json").write_text(json.dumps(rows))
    of = {"seed": 0, "max_length": 99, "source": str(tmp_path / "meta.json"), "test_examples": 2, "validation_examples": 3}
    for characters, count in ((12, 10), (22, 20), (None, 20)):
        task = math.load_reasoning("metamathqa", Vocabulary(letters, None, 1), characters=characters, **of)
        found = [*task.train, *task.validation, *task.test]
        assert sorted(len(example["question"]) for example in found) == list(range(1, count + 1))
        assert (len(task.validation), len(task.test)) == (3, 2)
    with pytest.raises(ValueError, match=r"0 texts of metamathqa of at most 2 characters \(config.task.characters\) to train on"):
        math.load_reasoning("metamathqa", Vocabulary(letters, None, 1), characters=2, **of)


# A text that may be forgotten


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=2, max_size=60), st.integers(3, 20), st.sampled_from([None, 0]))
def test_windows_hold_a_text_once_in_its_order(letters, tmp_path, text, max_length, bos):
    (tmp_path / "text").write_text(text)
    windows = math.read_windows(Vocabulary(letters, bos, 1), tmp_path / "text", max_length)
    begin = 0 if bos is None else 1
    assert "".join(text_of(letters, window["input_ids"][begin:]) for window in windows) == text
    assert {len(window["input_ids"]) for window in windows[:-1]} <= {max_length} and len(windows[-1]["input_ids"]) <= max_length
    for window in windows:
        assert window["loss_mask"].tolist() == [0] * begin + [1] * (len(window["input_ids"]) - begin)


@pytest.mark.parametrize(
    "content, message", [(None, "There is no text file"), (b"\xff\xfe\x00", "is no UTF-8 text"), (b"a", "has 1 tokens, too few")]
)
def test_a_text_that_cannot_be_forgotten_is_named(letters, tmp_path, content, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=f"{message}.*Set config.task.forgetting to"):
        math.read_windows(Vocabulary(letters, None, 1), tmp_path / "text", 8)


def test_a_completion_ends_at_a_new_question():
    assert math.completion(" 2.\nThe answer is: 2\n\nQuestion: What is 3?") == " 2.\nThe answer is: 2\n"
    assert math.completion(" 2") == " 2"
    for new in ("Question:", "Question 2:", " Question: ", "**Question:**", "### Question 3:"):
        assert math.completion(f" 2\n{new} What?") == " 2"
    for within in (" The Questionnaire has 12 Questions.\nThe answer is: 12", " 2\nQuestions: none", " The Question: is it 2?"):
        assert math.completion(within) == within


# GSM8K


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_is_read(gsm8k_dir, split):
    examples = math.read_gsm8k(split, str(gsm8k_dir))
    assert len({example["question"] for example in examples}) == 20
    assert [example["idx"] for example in examples] == list(range(20))
    response = "She has 3 + 4 = 7 apples.\nThat is 7,000 grams.\n#### 7,000\nThe answer is: 7,000"
    for example in examples:
        assert (example["response"], example["answer"]) == (response, "7,000")
        assert RULES["gsm8k"].equal(RULES["gsm8k"].answer(response), example["answer"])


def test_missing_and_damaged_gsm8k(gsm8k_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)no gsm8k in .*config.task.data_dir.*download_and_prepare\(\)"):
        math.read_gsm8k("train", str(tmp_path))
    (folder,) = (gsm8k_dir / "gsm8k").iterdir()
    copy = tmp_path / "gsm8k" / folder.name
    copy.mkdir(parents=True)
    for file in folder.iterdir():
        content = file.read_bytes()
        (copy / file.name).write_bytes(content[: len(content) // 2] if "-train." in file.name else content)
    with pytest.raises(ValueError, match=r"(?s)train split of gsm8k in .* cannot be read .*prepare it again"):
        math.read_gsm8k("train", str(tmp_path))
    assert len(math.read_gsm8k("test", str(tmp_path))) == 20


@pytest.mark.parametrize(
    "change", [{"question": b" "}, {"answer": b"It is 7."}, {"answer": b"#### 7"}, {"answer": b"7 ####"}]
)
def test_bad_examples_of_gsm8k_are_named(gsm8k_dir, monkeypatch, change):
    original = tfds.core.DatasetBuilder.as_data_source

    def changed(self, split):
        rows = list(original(self, split=split))
        rows[5] = rows[5] | change
        return type("Source", (list,), {"__getitems__": lambda self, at: [self[n] for n in at]})(rows)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", changed)
    with pytest.raises(ValueError, match="gsm8k train, number 5, in .* lacks a question, a solution or the answer"):
        math.read_gsm8k("train", str(gsm8k_dir))


# MetaMathQA and MATH


def test_metamathqa_from_a_list_and_from_lines(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps(METAMATH))
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in METAMATH))
    examples = math.read_metamathqa(tmp_path / "meta.json")
    assert examples == math.read_metamathqa(str(tmp_path / "meta.jsonl"))
    assert examples[1] == {"question": "What is {x}\u2028?", "response": "The answer is: 3", "type": "GSM_SV", "idx": 1}


def test_metamathqa_from_the_hub(tmp_path, monkeypatch):
    (tmp_path / "meta.json").write_text(json.dumps(METAMATH))
    asked = []

    def download(name, file, repo_type):
        asked.append((name, file, repo_type))
        return str(tmp_path / "meta.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(math.read_metamathqa("meta-math/MetaMathQA")) == 2
    assert asked == [("meta-math/MetaMathQA", "MetaMathQA-395K.json", "dataset")]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(
        FileNotFoundError, match="(?s)'meta-math/MetaMathQA' is no file here.*failed: division.*give its path"
    ):
        math.read_metamathqa("meta-math/MetaMathQA")


def test_math_from_lines_and_from_a_folder(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(MATH) + "\n" + json.dumps(MATH | {"problem": "Again?"}) + "\n")
    for name, row in {"algebra/1.json": MATH, "geometry/1.json": MATH | {"problem": "Again?"}}.items():
        (tmp_path / "test" / name).parent.mkdir(parents=True)
        (tmp_path / "test" / name).write_text(json.dumps(row))
    examples = math.read_math(tmp_path / "test.jsonl")
    assert examples == math.read_math(tmp_path / "test")
    expected = {"question": "Again?", "response": MATH["solution"], "answer": "2", "idx": 1, "level": "Level 1"}
    assert examples[1] == expected | {"type": "Algebra"}


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"problem": ', "data.json is damaged or not JSON.*Download or copy it again"),
        (json.dumps([MATH, MATH | {"problem": " "}]), "data.json, record 1: 'problem' is missing or empty"),
        (json.dumps([MATH, 5]), "data.json, record 1: 'problem' is missing"),
        (json.dumps([MATH | {"solution": "It is 2."}]), r"data.json, record 0: the solution holds no \\boxed"),
        (json.dumps({"problem": "?"}), "data.json, record 0: 'solution' is missing"),
    ],
)
def test_bad_records_are_named(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        math.read_math(tmp_path / "data.json")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no .*nothing.json. Give the path"):
        math.read_metamathqa(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="holds no JSON files"):
        math.read_math(tmp_path)


# Made-up problems


def test_made_up_problems_follow_the_seed_and_are_right():
    problems = math.make_problems(500, seed=3)
    assert problems[:50] == math.make_problems(50, seed=3) != math.make_problems(50, seed=4)
    assert len({problem["question"] for problem in problems}) == 500
    for problem in problems:
        assert RULES["gsm8k"].answer(problem["response"]) == problem["answer"]
        for line in problem["response"].splitlines()[:2]:
            expression, value = re.search(r"(\d+(?: [-+*] \d+)+) = (\d+)", line).groups()
            assert eval(expression) == int(value)
        assert value == problem["answer"]
    with pytest.raises(ValueError, match="number of word problems, 0, must be between 1 and 100,000"):
        math.make_problems(0, seed=0)
