"""The tasks by name. Each is a function of the options of config.task, and of the seed, to a Task."""

import functools
import inspect
import pathlib

from experiments.data import Task
from experiments.tasks.glue import FIELDS, load_glue
from experiments.tasks.lexicon import load_lexicon
from experiments.tasks.math import TRAINING_DATA, load_reasoning, read_windows
from experiments.tasks.vision import SOURCES, load_vision
from experiments.text import packed, with_lengths
from gpart_jax.models.encoder import EncoderConfig
from gpart_jax.models.pretrained_decoder import read_decoder_config
from gpart_jax.models.storage import read_config
from gpart_jax.models.vocabulary import load_vocabulary, read_tokenizer

TEXT, IMAGES, LANGUAGE = "text", "images", "language"
TASKS = {  # name -> what a model of it reads, and the function that loads it
    "lexicon": (TEXT, load_lexicon),
    **{f"glue/{name}": (TEXT, functools.partial(load_glue, name)) for name in FIELDS},
    **{name: (IMAGES, functools.partial(load_vision, name)) for name in SOURCES},
    **{name: (LANGUAGE, functools.partial(load_reasoning, name)) for name in TRAINING_DATA},
}


def task_kind(name: str) -> str:
    """What a task gives: TEXT, IMAGES or LANGUAGE.

    Raises:
      ValueError: an unknown task.
    """
    if name not in TASKS:
        raise ValueError(f"Unknown task {name!r}. Choose one of {', '.join(TASKS)}.")
    return TASKS[name][0]


def load_task(spec: dict, where: pathlib.Path | None, seed: int) -> Task:
    """The task that config.task describes; a text is tokenized by the model's tokenizer.

    Args:
      spec: {"name": "glue/sst2", "max_length": 64, ...}. Of all text may be given: "lengths", those of batches in tokens (None:
        text.LENGTHS); and where a decoder learns it, "packed", whether short texts share a row of max_length tokens, "forgetting",
        a text file as in `read_windows`, and "new_tokens", which `experiments.evaluate` reads.
      where: the model's directory or GGUF file. A task of images needs none.
      seed: of the held-out split, where the task makes one.

    Raises:
      ValueError: an unknown task or option, or bad data.
      FileNotFoundError: no tokenizer, or no data.
    """
    options = dict(spec)
    name = options.pop("name", None)
    kind, load = task_kind(name), TASKS[name][1]
    if kind == TEXT:
        tokenizer = read_tokenizer(where / "tokenizer.json")
        load = functools.partial(load, tokenizer, pad=EncoderConfig.from_hf(read_config(where)).pad_token_id)
    elif kind == LANGUAGE:
        vocabulary = load_vocabulary(where, read_decoder_config(where).vocab_size)
        load = functools.partial(load, vocabulary)
        options.pop("new_tokens", None)
    lengths = options.pop("lengths", None) if kind != IMAGES else None
    pack = options.pop("packed", False) if kind == LANGUAGE else False
    other_text = options.pop("forgetting", None) if kind == LANGUAGE else None
    try:
        inspect.signature(load).bind(seed=seed, **options)
    except TypeError as error:
        raise ValueError(f"Task {name!r} with options {options}: {error}.") from None
    task = load(seed=seed, **options)
    if other_text is not None:
        task = task._replace(other_text=read_windows(vocabulary, other_text, task.max_length))
    task = packed(task, seed) if pack else task
    return task if lengths is None else with_lengths(task, lengths)
