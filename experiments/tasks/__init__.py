"""The tasks by name. Each is a function of the options of config.task, and of the seed, to a Task."""

import functools
import inspect
import pathlib

import tokenizers

from experiments.data import Task
from experiments.tasks.glue import FIELDS, load_glue
from experiments.tasks.lexicon import load_lexicon
from experiments.tasks.vision import SOURCES, load_vision
from gpart_jax.models.encoder import EncoderConfig
from gpart_jax.models.storage import read_config

TEXT = {"lexicon": load_lexicon} | {f"glue/{name}": functools.partial(load_glue, name) for name in FIELDS}
VISION = {name: functools.partial(load_vision, name) for name in SOURCES}


def load_task(spec: dict, model_dir: pathlib.Path | None, seed: int) -> Task:
    """The task that config.task describes; a text is tokenized by the tokenizer in `model_dir`.

    Args:
      spec: {"name": "glue/sst2", "max_length": 64, ...}.
      model_dir: holds config.json and tokenizer.json. A task of images needs none.
      seed: of the held-out split, where the task makes one.

    Raises:
      ValueError: an unknown task or option, or bad data.
      FileNotFoundError: no tokenizer, or no data.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name in VISION:
        load = VISION[name]
    elif name in TEXT:
        tokenizer = read_tokenizer(model_dir)
        load = functools.partial(TEXT[name], tokenizer, pad=EncoderConfig.from_hf(read_config(model_dir)).pad_token_id)
    else:
        raise ValueError(f"Unknown task {name!r}. Choose one of {', '.join([*TEXT, *VISION])}.")
    try:
        inspect.signature(load).bind(seed=seed, **options)
    except TypeError as error:
        raise ValueError(f"Task {name!r} with options {options}: {error}.") from None
    return load(seed=seed, **options)


def read_tokenizer(model_dir: pathlib.Path | None) -> tokenizers.Tokenizer:
    """The tokenizer beside a model's weights.

    Raises:
      FileNotFoundError: there is none.
    """
    if model_dir is None or not (model_dir / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{model_dir} holds no tokenizer.json. Save the model's fast tokenizer beside its weights."
        )
    return tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
