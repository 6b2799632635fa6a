"""Mathematical reasoning, the data alone: MetaMathQA (arXiv 2309.12284) and GSM8K (2110.14168) to train on, GSM8K and
MATH (2103.03874) to test on, and word problems that are made here, for a first run without any file.

An example is {"question", "response", "idx", ...}, with "answer" where one is known, in the form that `answers.RULES`
compares with; `encode_training` and `encode_prompts` add its text and tokens.
"""

import json
import logging
import os
import pathlib
import random
import re
import string

import numpy as np

from experiments.answers import boxed
from experiments.data import Task
from experiments.tasks.prepared import open_prepared
from experiments.text import language_task
from gpart_jax.files import find
from gpart_jax.models.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

TRAINING_DATA = ("metamathqa", "gsm8k", "problems")
TEMPLATE = "Question: {question}\nAnswer: {response}"  # the authors'
STOP = ("\nQuestion:",)  # a new one: the answer is over
NEW_QUESTION = re.compile(r"(?:^|\n)[ \t*_#]*Question(?: \d+)?[ *_]*:")
NEW_TOKENS = {"gsm8k": 1024, "math": 2048, "problems": 256}  # at most
METAMATH_FILE = "MetaMathQA-395K.json"  # in its hub data set


def load_reasoning(
    name: str,
    vocabulary: Vocabulary,
    *,
    seed: int,
    max_length: int,
    train_examples: int | None = None,
    validation_examples: int | None = None,
    test_examples: int = 500,
    template: str | None = None,
    characters: int | None = None,
    source: str = "meta-math/MetaMathQA",
    data_dir: str | None = None,
) -> Task:
    """Texts to train on, others whose loss is the test, and, if asked for, others whose loss chooses the epoch.

    Args:
      name: of TRAINING_DATA. "gsm8k" is tested on its test split, "metamathqa" on examples held out of it, "problems" are
        made here, all of them different.
      vocabulary: of the model.
      seed: of what is held out, and of the problems.
      max_length: in tokens; see `encode_training`.
      train_examples: only the first so many; None means all, of problems 2,000.
      validation_examples: so many are held out of those to train on; None: none, and the last epoch is tested.
      test_examples: so many, or all there are.
      template: of a text, with {question} and, at its end, {response}; None: TEMPLATE.
      characters: texts to train on whose "question response" has more are left out, before any are chosen; None: none are.
      source: of MetaMathQA, as in `read_metamathqa`.
      data_dir: of GSM8K, as in `read_gsm8k`.

    Raises:
      FileNotFoundError, ValueError: as the readers; a template that isn't one; or too few examples.
    """
    prompt_of(template)  # or an error, before anything is read

    def short(examples):
        return [one for one in examples if characters is None or len(f"{one['question']} {one['response']}") <= characters]

    if name == "gsm8k":
        train, test = short(read_gsm8k("train", data_dir)), read_gsm8k("test", data_dir)
    else:
        if name == "problems":
            made = make_problems((train_examples or 2000) + (validation_examples or 0) + test_examples, seed)
        else:
            made = read_metamathqa(source)
            random.Random(seed).shuffle(made)
        made = short(made)
        test, train = made[:test_examples], made[test_examples:]
    held_out = validation_examples or 0
    if not 0 <= held_out < len(train):
        least = "" if characters is None else f" of at most {characters} characters (config.task.characters)"
        raise ValueError(f"validation_examples = {held_out} must leave some of {len(train)} texts of {name}{least} to train on.")
    validation, train = train[:held_out], train[held_out:]
    if not 1 <= (train_examples or 1) <= len(train):
        raise ValueError(f"train_examples = {train_examples} must be between 1 and {len(train)}, all of {name}.")
    train, test = train[:train_examples], test[:test_examples]
    for split, examples in {"train": train, "validation": validation, "test": test}.items():
        encode_training(vocabulary, examples, max_length, f"{name} {split}", template)
    return language_task(train, validation, test, max_length=max_length)


def prompt_of(template: str | None) -> str:
    """What of a template (None: TEMPLATE) stands before the response, without the space there.

    Raises:
      ValueError: it hasn't {question} and {response} once each, the latter at its end, or has other fields.
    """
    template = TEMPLATE if template is None else template
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError:  # a brace alone
        fields = []
    if fields != ["question", "response"] or not template.endswith("{response}"):
        raise ValueError(
            f"config.task.template = {template!r} must have {{question}} and {{response}} once each, and end with {{response}}, as "
            f"{TEMPLATE!r} does; any other brace is doubled."
        )
    return template.removesuffix("{response}").rstrip(" ")


def encode_training(vocabulary: Vocabulary, examples: list[dict], max_length: int, name: str, template: str | None = None) -> None:
    """Adds "text", "input_ids" and "loss_mask" (int32, 1 where a token is to be learned) to the examples of split `name`.

    The loss is over question and answer and the token that ends the sequence, not the one that begins it. What is longer
    than `max_length` tokens keeps its end, and the token that begins it; it is counted in a warning.
    """
    begin = [] if vocabulary.bos is None else [vocabulary.bos]
    if max_length <= len(begin) + 1:
        raise ValueError(f"max_length = {max_length} leaves no room beside the tokens that begin and end a sequence.")
    template = TEMPLATE if template is None else template
    texts = [template.format(**example) for example in examples]
    cut = 0
    for example, text, ids in zip(examples, texts, _tokens(vocabulary, texts)):
        kept = [*ids, vocabulary.eos][-(max_length - len(begin)) :]
        cut += len(kept) <= len(ids)
        example["text"] = text
        example["input_ids"] = np.array(begin + kept, np.int32)
        example["loss_mask"] = np.array([0] * len(begin) + [1] * len(kept), np.int32)
    if cut:
        logger.warning("%s: %d of %d texts are longer than %d tokens and were cut.", name, cut, len(texts), max_length)


def encode_prompts(vocabulary: Vocabulary, examples: list[dict], template: str | None = None) -> None:
    """Adds "prompt", as `prompt_of` has it, and its "input_ids" to each example."""
    begin = [] if vocabulary.bos is None else [vocabulary.bos]
    prompts = [prompt_of(template).format(**example) for example in examples]
    for example, prompt, ids in zip(examples, prompts, _tokens(vocabulary, prompts)):
        example["prompt"] = prompt
        example["input_ids"] = np.array(begin + ids, np.int32)


def read_windows(vocabulary: Vocabulary, path: str | os.PathLike, max_length: int) -> list[dict]:
    """A text file cut into windows of at most `max_length` tokens, each with "input_ids" and "loss_mask" as `encode_training` has them.

    Each window begins as a text does, and none ends as one. The mask names every token of the file; as in any row, nothing predicts
    the first where no token that begins a text stands before it.

    Raises:
      FileNotFoundError, ValueError: there is no such file; it is no UTF-8 text, or has less than two tokens.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no text file {path}. Set config.task.forgetting to one, or to None to measure no forgetting.")
    try:
        (ids,) = _tokens(vocabulary, [path.read_text(encoding="utf-8-sig")])
    except ValueError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}). Set config.task.forgetting to one.") from error
    begin = [] if vocabulary.bos is None else [vocabulary.bos]
    if len(ids) < 2:
        raise ValueError(f"{path} has {len(ids)} tokens, too few to predict any. Set config.task.forgetting to a longer text.")
    room = max_length - len(begin)
    windows = [ids[start : start + room] for start in range(0, len(ids), room)]
    return [
        {
            "input_ids": np.array(begin + window, np.int32),
            "loss_mask": np.array([0] * len(begin) + [1] * len(window), np.int32),
        }
        for window in windows
    ]


def _tokens(vocabulary: Vocabulary, texts: list[str]) -> list[list[int]]:
    vocabulary.tokenizer.no_padding()
    vocabulary.tokenizer.no_truncation()
    return [encoding.ids for encoding in vocabulary.tokenizer.encode_batch(texts, add_special_tokens=False)]


def completion(text: str) -> str:
    """What a model wrote after a prompt, up to the line on which it begins a new question."""
    found = NEW_QUESTION.search(text)
    return text[: found.start()] if found else text


def read_gsm8k(split: str, data_dir: str | None = None) -> list[dict]:
    """GSM8K's "train" or "test" split through TFDS, in the order in which it was prepared.

    The response is the annotators', without their calculator's `<<1+2=3>>`, and ends as MetaMathQA's do.

    Args:
      data_dir: where TFDS keeps its data sets; None means $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      FileNotFoundError: the data isn't there; the message has the command that gets it.
      ValueError: data that cannot be read, or an example without a question or an answer.
    """
    prepared = open_prepared("gsm8k", data_dir, "tensorflow_datasets.text.gsm8k")
    try:
        source = prepared.builder.as_data_source(split=split)
        rows = [
            [row[name].decode("utf-8", "replace").strip() for name in ("question", "answer")]
            for row in source.__getitems__(range(len(source)))
        ]
    except Exception as error:  # TFDS, array_record and the file system have a type for each; a cut text is None
        raise ValueError(
            f"The {split} split of gsm8k in {prepared.where} cannot be read ({error}). Remove that folder and prepare it again:\n"
            f"  {prepared.command}"
        ) from error
    examples = []
    for idx, (question, solution) in enumerate(rows):
        steps, _, answer = (part.strip() for part in re.sub(r"<<.*?>>", "", solution).rpartition("####"))
        if not question or not steps or not answer:
            raise ValueError(
                f"gsm8k {split}, number {idx}, in {prepared.where} lacks a question, a solution or the answer after ####."
            )
        response = f"{steps}\n#### {answer}\nThe answer is: {answer}"
        examples.append({"question": question, "response": response, "answer": answer, "idx": idx})
    return examples


def read_metamathqa(source: str | os.PathLike) -> list[dict]:
    """MetaMathQA, to train on.

    Args:
      source: its JSON file, or the hub's name of the data set, `meta-math/MetaMathQA`, which is downloaded unless it is
        in the cache.

    Raises:
      FileNotFoundError: there is no such file or data set.
      ValueError: a damaged file, or a record without a query or a response.
    """
    path = pathlib.Path(source).expanduser()
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)) and not path.suffix:
        path = _from_hub(str(source))
    return [
        {"question": row["query"], "response": row["response"], "type": row.get("type"), "idx": idx}
        for idx, (_, row) in enumerate(_records(path, ("query", "response")))
    ]


def read_math(source: str | os.PathLike) -> list[dict]:
    """MATH, to test on: {"problem", "solution", "level", "type"} as JSON lines, a JSON list, or a folder of JSON files.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: a damaged file, or a record without a problem or a boxed answer in its solution.
    """
    examples = []
    for idx, (where, row) in enumerate(_records(pathlib.Path(source).expanduser(), ("problem", "solution"))):
        answer = boxed(row["solution"])
        if not answer:
            raise ValueError(f"{where}: the solution holds no \\boxed{{answer}}. Correct or remove this problem.")
        known = {name: row.get(name) for name in ("level", "type")}
        examples.append({"question": row["problem"], "response": row["solution"], "answer": answer, "idx": idx} | known)
    return examples


def _from_hub(name: str) -> pathlib.Path:
    try:
        import huggingface_hub  # here, because a file needs no hub client

        return pathlib.Path(huggingface_hub.hf_hub_download(name, METAMATH_FILE, repo_type="dataset"))
    except Exception as error:  # no network, no such data set, no permission: the client has a type for each
        raise FileNotFoundError(
            f"{name!r} is no file here, and fetching {METAMATH_FILE} from the Hugging Face hub failed: {error}\n"
            "Check the name and the network, or download the file elsewhere and give its path."
        ) from error


def _records(path: pathlib.Path, fields: tuple[str, ...]) -> list[tuple[str, dict]]:
    """(where, record) of a JSON list, of JSON lines, or of a folder of JSON files; each has text in the fields."""
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}. Give the path of the data set's JSON file, or of the folder that holds it."
        )
    files = find(path, "*.json") if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} holds no JSON files. Give the folder with one for each problem.")
    records = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            if file.suffix == ".jsonl":
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            else:
                rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged or not JSON ({error}). Download or copy it again.") from error
        rows = rows if isinstance(rows, list) else [rows]
        records += [(f"{file}, record {number}", row) for number, row in enumerate(rows)]
    for where, row in records:
        for field in fields:
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}: {field!r} is missing or empty. Correct or remove this record.")
    return records


NAMES = ("Ada", "Boris", "Chen", "Dana", "Emil", "Fatima", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena")
THINGS = ("apples", "books", "coins", "pencils", "shells", "stamps", "stickers", "tickets")
PROBLEMS = (  # question, response, and the x and y in them
    (
        "{name} has {a} {things} and buys {b} bags of {c} {things} each. How many {things} does {name} have now?",
        "The bags hold {b} * {c} = {x} {things}.\n{name} has {a} + {x} = {y} {things} now.",
        lambda a, b, c: (b * c, a + b * c),
    ),
    (
        "{name} earns {a} dollars an hour and works {b} hours a day. How many dollars does {name} earn in {c} days?",
        "In a day {name} earns {a} * {b} = {x} dollars.\nIn {c} days these are {x} * {c} = {y} dollars.",
        lambda a, b, c: (a * b, a * b * c),
    ),
    (
        "{name} reads {a} pages on Monday, {b} times as many on Tuesday, and {c} on Wednesday. How many pages are that?",
        "On Tuesday {name} reads {a} * {b} = {x} pages.\nAll three days are {a} + {x} + {c} = {y} pages.",
        lambda a, b, c: (a * b, a + a * b + c),
    ),
    (
        "{name} packs {a} boxes with {b} {things} each, and then takes out {c} of all. How many {things} are left in them?",
        "The boxes hold {a} * {b} = {x} {things}.\nThere are {x} - {c} = {y} {things} left.",
        lambda a, b, c: (a * b, a * b - c),
    ),
)  # fmt: skip


def make_problems(count: int, seed: int) -> list[dict]:
    """So many word problems, no two alike, of two steps in whole numbers; for a seed always the same, in one order."""
    if not 1 <= count <= 100_000:
        raise ValueError(f"The number of word problems, {count}, must be between 1 and 100,000.")
    draw, made = random.Random(seed), {}
    while len(made) < count:
        question, response, compute = draw.choice(PROBLEMS)
        a, b = draw.randint(2, 30), draw.randint(2, 30)
        words = {"name": draw.choice(NAMES), "things": draw.choice(THINGS), "a": a, "b": b, "c": draw.randint(2, 30)}
        words["x"], words["y"] = compute(a, b, words["c"])
        if words["y"] < 0:
            continue
        ending = "\n#### {y}\nThe answer is: {y}"
        text = question.format(**words)
        made[text] = {"question": text, "response": (response + ending).format(**words), "answer": str(words["y"])}
    return [example | {"idx": idx} for idx, example in enumerate(made.values())]
