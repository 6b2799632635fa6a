"""A data set as TFDS prepared it, without TensorFlow; or the command that prepares it."""

import importlib
import os
from typing import NamedTuple

import tensorflow_datasets as tfds


class Prepared(NamedTuple):
    builder: tfds.core.DatasetBuilder
    where: str  # its folder
    command: str  # that downloads and prepares it


def open_prepared(name: str, data_dir: str | None, module: str = "") -> Prepared:
    """The data set `name`, such as "glue/sst2".

    Args:
      data_dir: where TFDS keeps its data sets; None means $TFDS_DATA_DIR or ~/tensorflow_datasets.
      module: which has to be imported so that TFDS knows the data set, if it doesn't find it itself.

    Raises:
      FileNotFoundError: it isn't there; the message has the command that gets it.
    """
    if module:
        importlib.import_module(module)
    data_dir = None if data_dir is None else os.path.expanduser(data_dir)
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    root = builder.data_path.parents[name.count("/") + 1]
    modules = ", ".join(["tensorflow_datasets as tfds", *filter(None, [module])])
    command = (
        f'python -c "import {modules}; '
        f"tfds.builder('{name}', data_dir='{root}', file_format='array_record').download_and_prepare()\""
    )
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"There is no {name} in {builder.data_path}. If it is elsewhere, set --config.task.data_dir (or TFDS_DATA_DIR) "
            f"to the folder that holds {name}. To download and prepare it:\n  {command}"
        )
    return Prepared(builder, str(builder.data_path), command)
