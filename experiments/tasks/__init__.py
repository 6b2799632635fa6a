"""The tasks by name. Each is a function (tokenizer, *, seed, **options) -> Task; its options are those of config.task."""

import functools
import inspect
import pathlib

import tokenizers

from experiments.data import Task
from experiments.tasks.glue import FIELDS, load_glue
from experiments.tasks.lexicon import load_lexicon

TASKS = {"lexicon": load_lexicon} | {f"glue/{name}": functools.partial(load_glue, name) for name in FIELDS}


def load_task(spec: dict, model_dir: pathlib.Path, seed: int) -> Task:
    """The task that config.task describes, tokenized by the tokenizer in `model_dir`.

    Args:
      spec: {"name": "glue/sst2", "max_length": 64, ...}.
      model_dir: holds tokenizer.json.
      seed: of the held-out split, where the task makes one.

    Raises:
      ValueError: an unknown task or option, or bad data.
      FileNotFoundError: no tokenizer, or no data.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in TASKS:
        raise ValueError(f"Unknown task {name!r}. Choose one of {', '.join(TASKS)}.")
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{model_dir} holds no tokenizer.json. Save the model's fast tokenizer beside its weights."
        )
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    try:
        inspect.signature(TASKS[name]).bind(tokenizer, seed=seed, **options)
    except TypeError as error:
        raise ValueError(f"Task {name!r} with options {options}: {error}.") from None
    return TASKS[name](tokenizer, seed=seed, **options)
