import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tensorflow_datasets.text.glue  # noqa: F401 (registers GLUE)
import tokenizers

from configs import quickstart
from gpart_jax.models import pretrained
from gpart_jax.models.encoder import EncoderClassifier, EncoderConfig


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random BERT that reads letters, as a Hugging Face directory with a tokenizer."""
    directory = tmp_path_factory.mktemp("tiny_model")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = tokenizers.BertWordPieceTokenizer({token: n for n, token in enumerate(vocabulary)})
    tokenizer.save(str(directory / "tokenizer.json"))
    save_model(directory, EncoderConfig(len(vocabulary), 32, 1, 2, 64, 64))
    return directory


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory):
    """A random RoBERTa that reads bytes, with a byte-level BPE tokenizer as the published models have."""
    directory = tmp_path_factory.mktemp("tiny_roberta")
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = specials + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.ByteLevelBPETokenizer({token: n for n, token in enumerate(vocabulary)}, [])
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = EncoderConfig(
        len(vocabulary), 32, 1, 2, 64, 66, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, family="roberta",
        initializer_range=0.3,  # so that its output depends on its input from the start
    )  # fmt: skip
    save_model(directory, config)
    return directory


def save_model(directory, config):
    tokens, model = jnp.zeros((1, 1), jnp.int32), EncoderClassifier(config, 2)
    pretrained.save(directory, model, jax.jit(model.init)(jax.random.key(7), tokens, tokens)["params"])


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory):
    """GLUE's six tasks with made-up examples, prepared by TFDS's own code from files in GLUE's own formats.

    400 examples to train on, 40 to validate: each text has 1 to 8 words, and its label is whether the first is "good".
    """
    files, prepared = tmp_path_factory.mktemp("glue_files"), tmp_path_factory.mktemp("tfds")
    random = np.random.default_rng(0)

    def examples(count):
        for n in range(count):
            words = random.choice(["film", "plot", "cast", "naïve", "slow"], random.integers(0, 8))
            yield n, int(n % 2), " ".join([("bad", "good")[n % 2], *words]), "a second text"

    def write(path, header, row, count):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ["\t".join(header)] if header else []
        path.write_text("\n".join(lines + ["\t".join(map(str, row(*e))) for e in examples(count)]) + "\n")

    binary = ("entailment", "not_entailment")
    formats = {  # folder, header, row
        "cola": ("CoLA", None, lambda n, y, a, b: ("x", y, "", a)),
        "sst2": ("SST-2", ["sentence", "label"], lambda n, y, a, b: (a, y)),
        "qnli": ("QNLI", ["index", "question", "sentence", "label"], lambda n, y, a, b: (n, a, b, binary[y])),
        "rte": ("RTE", ["index", "sentence1", "sentence2", "label"], lambda n, y, a, b: (n, a, b, binary[y])),
        "stsb": ("STS-B", ["sentence1", "sentence2", "score"], lambda n, y, a, b: (a, b, 5 * y - 0.25 * (n % 4) * (2 * y - 1))),
    }  # fmt: skip
    for folder, header, row in formats.values():
        for split, count in {"train": 400, "dev": 40, "test": 2}.items():
            write(files / folder / f"{split}.tsv", header, row, count)
    write(files / "CoLA" / "test.tsv", ["index", "sentence"], lambda n, y, a, b: (n, a), 2)  # it alone has a header
    mrpc = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    for split, count in {"train": 440, "test": 2}.items():
        write(files / f"{split}.txt", ["\ufeff" + mrpc[0], *mrpc[1:]], lambda n, y, a, b: (y, n, n, a, b), count)
    (files / "dev_ids.txt").write_text("".join(f"{n}\t{n}\n" for n in range(400, 440)))

    with pytest.MonkeyPatch.context() as patch:
        manager = tfds.download.DownloadManager
        patch.setattr(manager, "download_and_extract", lambda self, url: str(files))
        patch.setattr(manager, "download", lambda self, urls: {
            "dev_ids": str(files / "dev_ids.txt"), "train": str(files / "train.txt"), "test": str(files / "test.txt")
        })  # fmt: skip
        for name in (*formats, "mrpc"):
            tfds.builder(f"glue/{name}", data_dir=prepared, file_format="array_record").download_and_prepare()
    return prepared


@pytest.fixture
def make_config(tiny_model):
    """method -> the quickstart on the tiny model: 2 x 160 quick steps."""

    def make(method: str) -> ml_collections.ConfigDict:
        config = quickstart.get_config(method)
        config.model.source = str(tiny_model)
        config.task.max_length = 8  # one length to compile
        if method == "gpart":
            config.method.d = 256
            config.method.dropout = 0.1
        config.train.epochs = 2
        config.train.log_every = 10
        config.train.checkpoint_every = 30
        return config

    return make


@pytest.fixture
def config(make_config):
    return make_config("gpart")
