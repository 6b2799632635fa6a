"""Accuracy on GSM8K, MATH or made-up problems: every problem is answered in full, and each answer is kept.

`python -m experiments.evaluate --benchmark=gsm8k` is its command.
"""

import json
import os
import pathlib
from collections.abc import Callable

import jax
from scipy.stats import binomtest

from experiments.answers import RULES, Rule
from experiments.processes import barrier, is_writer
from experiments.tasks import math
from experiments.workdir import read_json, write_json
from gpart_jax.models.decoder import Decoder
from gpart_jax.models.generate import generate_each
from gpart_jax.models.vocabulary import Vocabulary

BENCHMARKS = {"gsm8k": "gsm8k", "math": "math", "problems": "gsm8k"}  # and whose rule of answers it has
LATER = ("weights", "tokenizer")  # settings that an earlier version didn't write


def load_benchmark(name: str, data_dir: str | None, limit: int | None, seed: int) -> list[dict]:
    """The problems, each with its answer.

    Args:
      name: of BENCHMARKS. The made-up problems are those that a run of this seed didn't train on.
      data_dir: of GSM8K where TFDS keeps its data sets; of MATH its file or folder.
      limit: only the first so many; None means all, of made-up problems 500.

    Raises:
      FileNotFoundError, ValueError: as `tasks.math`'s readers.
    """
    if name == "problems":
        return math.make_problems(limit or 500, seed)
    if name == "math" and data_dir is None:
        raise ValueError("MATH is read from its file or folder of JSON: set --data_dir to it.")
    examples = math.read_gsm8k("test", data_dir) if name == "gsm8k" else math.read_math(data_dir)
    return examples[:limit]


def answer_all(
    model: Decoder,
    params,
    mesh: jax.sharding.Mesh,
    vocabulary: Vocabulary,
    benchmark: str,
    examples: list[dict],
    folder: pathlib.Path,
    *,
    settings: dict,
    batch_size: int,
    max_new_tokens: int,
    template: str | None = None,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Answers greedily, and keeps each answer in `folder`/predictions.jsonl as soon as it is there.

    Started again, it goes on with the problems that have no answer there, also with more problems. All processes call it.

    Args:
      params: adapted already, on the mesh.
      settings: what the answers depend on beside what is given here; written into the folder.
      batch_size: problems answered at a time.
      max_new_tokens: of each answer.
      template: that the model learned, as of `tasks.math.load_reasoning`.

    Returns:
      A row for each problem: idx, prompt, completion, ended, answer, right, correct.

    Raises:
      ValueError: the folder holds answers that other settings gave, or a prompt is longer than the context.
    """
    math.encode_prompts(vocabulary, examples, template)
    settings = settings | {"benchmark": benchmark, "max_new_tokens": max_new_tokens}
    settings |= {"ends": list(vocabulary.ends)} if vocabulary.others else {}
    folder.mkdir(parents=True, exist_ok=True)
    barrier("settings")
    if (folder / "settings.json").is_file():
        known = {name: settings[name] for name in LATER if name in settings} | read_json(folder / "settings.json")
        known.pop("prompts", None)  # of all problems together, in an earlier version
        if different := sorted(
            name for name in known.keys() | settings.keys() if known.get(name) != settings.get(name)
        ):
            raise ValueError(
                f"{folder} holds answers of a run that differs in {', '.join(different)}. Move it away, or ask for the same."
            )
    elif is_writer():
        write_json(folder / "settings.json", settings)
    asked = {example["idx"]: example for example in examples}
    rule, kept = RULES[BENCHMARKS[benchmark]], _read(folder / "predictions.jsonl")
    for row in kept:
        example = asked.get(row["idx"])
        if example and (row["prompt"], row["right"]) != (example["prompt"], example["answer"]):
            raise ValueError(f"{folder} holds answers to other problems, such as number {row['idx']}. Move it away.")
    judged = [row | _verdict(rule, row["completion"], row["right"]) for row in kept]  # an earlier version had other rules
    rows = [row for row in judged if row["idx"] in asked]
    done = {row["idx"] for row in rows}
    barrier("answers")  # all have read what is there before one writes
    if judged != kept and is_writer():
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged), encoding="utf-8")
    left = [example for example in examples if example["idx"] not in done]
    left.sort(key=lambda example: len(example["input_ids"]))  # those that are read together are padded little
    if rows:
        say(f"{len(rows)} of {len(examples)} answers are there already")
    decode = vocabulary.tokenizer.decode
    if not left:
        return rows
    answers = generate_each(
        model, params, [example["input_ids"].tolist() for example in left], eos=vocabulary.ends, max_new_tokens=max_new_tokens, rows=batch_size, mesh=mesh,
        stop=math.STOP, decode=decode,
    )  # fmt: skip
    with (folder / "predictions.jsonl" if is_writer() else pathlib.Path(os.devnull)).open("a", buffering=1) as file:
        for number, continuation in answers:
            example, text = left[number], math.completion(decode(continuation.ids))
            known = {"idx": example["idx"], "prompt": example["prompt"], "completion": text, "ended": continuation.ended}
            rows.append(known | _verdict(rule, text, example["answer"]))
            file.write(json.dumps(rows[-1]) + "\n")
            if not len(rows) % batch_size or len(rows) == len(examples):
                say(f"[{len(rows)}/{len(examples)}] {sum(row['correct'] for row in rows)} correct so far")
    return rows


def _verdict(rule: Rule, completion: str, right: str) -> dict:
    answer = rule.answer(completion)
    return {"answer": answer, "right": right, "correct": answer is not None and rule.equal(answer, right)}


def _read(path: pathlib.Path) -> list[dict]:
    """The whole lines of a file; a last one that was cut as it was written is dropped, from the file too.

    Raises:
      ValueError: a line that holds no answer.
    """
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        rows = [json.loads(line) for line in whole.split("\n") if line]
        if not all(isinstance(row["idx"], int) and isinstance(row[key], str) for row in rows for key in ("prompt", "completion", "right")):
            raise ValueError("a line lacks a problem or its answer")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). Move its folder away to answer all problems again.") from error
    if whole != text and is_writer():
        path.write_text(whole, encoding="utf-8")
    return rows


def accuracy(rows: list[dict]) -> tuple[float, float, float]:
    """The share that is correct, and the ends of its 95 % interval (Wilson, JASA 1927)."""
    found = binomtest(sum(row["correct"] for row in rows), len(rows))
    interval = found.proportion_ci(method="wilson")
    return found.statistic, interval.low, interval.high
