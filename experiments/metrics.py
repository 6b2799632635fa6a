"""How good predictions are: the tasks' metrics, from scikit-learn and SciPy."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from experiments.data import Task


def _correlation(function):
    """Of labels and predictions; 0 where all predictions are equal, as Matthews' is, instead of NaN."""
    return lambda labels, scores: 0.0 if np.ptp(scores) == 0 else function(labels, scores).statistic


METRICS = {  # (labels, predictions) -> number
    "accuracy": accuracy_score,
    "f1": f1_score,  # of label 1
    "matthews": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}


def predictions(task: Task, logits: np.ndarray) -> np.ndarray:
    """The predicted labels, or the scores of a regression: (examples,)."""
    return logits[:, 0] if task.labels is None else logits.argmax(-1)


def score(task: Task, examples: Sequence[dict], logits: np.ndarray) -> dict[str, float]:
    """The task's metrics by name."""
    if task.language:
        return {"loss": float(logits[:, 0].sum(dtype=np.float64) / logits[:, 1].sum(dtype=np.float64))}
    labels = [example["label"] for example in examples]
    return {name: float(METRICS[name](labels, predictions(task, logits))) for name in task.metrics}


def by_class(task: Task, examples: Sequence[dict], logits: np.ndarray) -> dict[str, float]:
    """The share of each label's examples that are predicted right: its recall. Labels without an example are left out."""
    labels = np.array([example["label"] for example in examples])
    right = predictions(task, logits) == labels
    return {name: float(right[labels == n].mean()) for n, name in enumerate(task.labels) if (labels == n).any()}
