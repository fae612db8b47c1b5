"""How well a gate routes: accuracy, confusion, calibration, and baselines that it must beat.

Functions import scikit-learn when they need it. Shapes: N requests, K adapters, D features, M bins of confidence.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_moe.errors import UserError

ECE_BINS = 15
ZERO_DIVISION = 0.0  # precision of an adapter that is never predicted, recall of one that is never asked for
_SUM_TOLERANCE = 1e-3  # of the sum of a row of probabilities; a softmax in half precision misses 1 by about so much
_WEIGHT_DECAY = 5.0  # of the probe; without it columns of noise weaken the baseline, which flatters the gate
_NOISE = 1e-5  # a feature whose spread is below this share of its size is a constant with rounding noise


@dataclass(frozen=True, eq=False)
class RoutingScores:
    """The result of one evaluation of a gate, made by `routing_scores`. Shares are between 0 and 1."""

    names: tuple[str, ...]  # of the K adapters
    total: int  # requests
    correct: int
    accuracy: float
    confusion_KK: np.ndarray  # int64 requests, rows: the adapter asked for, columns: the predicted one
    support_K: np.ndarray  # int64, requests that ask for each adapter
    predicted_K: np.ndarray  # share of the requests routed to each adapter
    precision_K: np.ndarray
    recall_K: np.ndarray
    majority: str  # the most frequent adapter of the training labels, or without them of the evaluated labels
    majority_accuracy: float  # share of the evaluated requests that ask for it
    ece: float  # see `calibration_error`
    entropy: float  # of the gate, in nats, mean over requests; log(K) if the gate has learned nothing
    constant: str | None  # the one adapter that is predicted for all requests, if they ask for several; else None

    def confusion_pairs(self) -> dict[str, int]:
        """{"true->predicted": requests}, including right predictions; pairs that do not occur are left out."""
        counts = np.ndenumerate(self.confusion_KK)
        return {f"{self.names[true]}->{self.names[found]}": int(count) for (true, found), count in counts if count}


def routing_scores(
    probabilities_NK: np.ndarray, labels_N: np.ndarray, names: Sequence[str], train_labels: np.ndarray | None = None
) -> RoutingScores:
    """Score a gate that predicts the most probable adapter, or the first of equally probable ones.

    Labels and training labels are indices into `names`. Raises ValueError as `check_probabilities` does.
    """
    from sklearn.metrics import precision_recall_fscore_support

    probabilities_NK = check_probabilities(probabilities_NK, names)
    total, adapters = probabilities_NK.shape
    seen = labels_N if train_labels is None else train_labels
    majority, found_N, every = int(np.bincount(seen).argmax()), probabilities_NK.argmax(1), np.arange(adapters)
    confusion_KK = np.bincount(adapters * labels_N + found_N, minlength=adapters**2).reshape(adapters, adapters)
    precision_K, recall_K, *_ = precision_recall_fscore_support(
        labels_N, found_N, labels=every, zero_division=ZERO_DIVISION
    )
    logs_NK = np.log(np.where(probabilities_NK > 0, probabilities_NK, 1))  # 0 log 0 = 0
    constant = len(set(found_N)) == 1 and len(set(labels_N)) > 1  # so N >= 2
    return RoutingScores(
        names=tuple(names),
        total=total,
        correct=int(np.trace(confusion_KK)),
        accuracy=float(np.trace(confusion_KK) / total),
        confusion_KK=confusion_KK,
        support_K=confusion_KK.sum(1),
        predicted_K=confusion_KK.sum(0) / total,
        precision_K=np.asarray(precision_K),
        recall_K=np.asarray(recall_K),
        majority=names[majority],
        majority_accuracy=float((labels_N == majority).mean()),
        ece=calibration_error(probabilities_NK.max(1), found_N == labels_N),
        entropy=max(0.0, -float((probabilities_NK * logs_NK).sum(1).mean())),
        constant=names[found_N[0]] if constant else None,
    )


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray) -> float:
    """Expected calibration error, over ECE_BINS bins ((m - 1) / M, m / M] of the top probability.

    ECE = sum over m of |B_m| / N * |share right in B_m - mean confidence in B_m|: equation 3 of Guo et al. 2017,
    "On Calibration of Modern Neural Networks" (arXiv:1706.04599), whose tables use 15 bins too.
    """
    bin_N = np.searchsorted(np.linspace(0, 1, ECE_BINS + 1)[1:-1], confidence_N, side="left")
    gap_M = np.bincount(bin_N, weights=right_N - confidence_N)  # |B_m| * (share right - mean confidence)
    return float(np.abs(gap_M).sum() / len(confidence_N))


def check_not_constant(scores: RoutingScores) -> None:
    """Raise UserError for a gate that has collapsed onto one adapter."""
    if scores.constant is not None:
        raise UserError(
            f"the gate predicts {scores.constant!r} for all {scores.total} requests although "
            f"{np.count_nonzero(scores.support_K)} adapters are asked for: usually it pools the first token, which "
            "sees nothing of the request under a causal model: pool the last token or the mean instead; "
            "otherwise balance the classes of the training data or change the learning rate"
        )


def table(scores: RoutingScores, baselines: dict[str, float]) -> str:
    """Accuracy, baselines (`majority` is put before them), a row an adapter, the confusion matrix; for a terminal."""
    compared = [["baseline", "accuracy", "the gate is better by"]]
    for name, accuracy in {f"majority ({scores.majority})": scores.majority_accuracy, **baselines}.items():
        compared.append([name, f"{accuracy:.1%}", f"{100 * (scores.accuracy - accuracy):+.1f} points"])
    rows = [["adapter", "requests", "routed to it", "precision", "recall"]]
    for k, name in enumerate(scores.names):
        support, predicted = scores.support_K[k], scores.predicted_K[k]
        defined = ((scores.precision_K[k], predicted), (scores.recall_K[k], support))
        rows.append([name, str(support), f"{predicted:.1%}", *(f"{share:.1%}" if n else "-" for share, n in defined)])
    matrix = [["asked for \\ routed to", *scores.names]]
    matrix += [[name, *map(str, row)] for name, row in zip(scores.names, scores.confusion_KK, strict=True)]
    first = f"routing accuracy {scores.accuracy:.1%}: {scores.correct} of {scores.total} requests"
    last = f"calibration error {scores.ece:.3f} ({ECE_BINS} bins), mean entropy of the gate {scores.entropy:.3f} nats"
    return "\n\n".join([first, *map(_aligned, (compared, rows, matrix)), f"{last} of {np.log(len(scores.names)):.3f}"])


def advice(scores: RoutingScores, baselines: dict[str, float], modalities: str) -> str | None:
    """What to change where a classifier on one modality ("text only", "vision only") routes better than the gate.

    `modalities` is what the gate sees. None: no baseline is better.
    """
    name = max(baselines, key=lambda one: baselines[one], default=None)
    if name is None or baselines[name] <= scores.accuracy:
        return None
    alone, found, best = name.split()[0], scores.accuracy, baselines[name]
    told = f"a small classifier that sees {alone} only routes {best:.1%} right, this gate ({modalities}) {found:.1%}"
    if best - found < 2 * (found * (1 - found) / scores.total) ** 0.5:
        told += f" (of {scores.total} requests: chance alone can make such a difference)"
    if modalities == alone:
        return f"{told}: the gate has not learned what its features tell; train more steps, or raise train.lr"
    return f"{told}: set gate.modalities={alone} and train again, or give the gate of {modalities} more steps or data"


def as_json(scores: RoutingScores, baselines: dict[str, float]) -> dict[str, object]:
    """Everything, in what the json module writes; arrays are lists in the order of `names`, without their suffix."""
    plain = {key.split("_K")[0]: x.tolist() if isinstance(x, np.ndarray) else x for key, x in vars(scores).items()}
    plain |= {"names": list(scores.names), "confusion_pairs": scores.confusion_pairs(), "ece_bins": ECE_BINS}
    baselines = {name: float(accuracy) for name, accuracy in baselines.items()}
    return plain | {"zero_division": ZERO_DIVISION, "baselines": baselines}


def probe_accuracy(
    train_ND: np.ndarray,
    train_labels_N: np.ndarray,
    held_out_ND: np.ndarray,
    held_out_labels_N: np.ndarray,
    seed: int = 0,
) -> float:
    """The share of held-out requests that a small classifier, trained on these features alone, gets right.

    The classifier is a StandardScaler and one hidden layer of 64, reproducible by its seed. Features that do not vary
    in training are left out; if none varies, the answer is the majority class. Raises ValueError for inputs that do not
    fit together.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train_ND, held_out_ND = np.asarray(train_ND, np.float64), np.asarray(held_out_ND, np.float64)
    train_y_N, held_out_y_N = np.asarray(train_labels_N), np.asarray(held_out_labels_N)
    for x, y in ((train_ND, train_y_N), (held_out_ND, held_out_y_N)):
        if x.ndim != 2 or x.shape != (len(y), train_ND.shape[1]) or not x.size or not np.isfinite(x).all():
            raise ValueError(f"features {x.shape} for {len(y)} labels, {train_ND.shape} in training; or not finite")
    classes, counts = np.unique(train_y_N, return_counts=True)
    varies_D = train_ND.std(0) > _NOISE * np.maximum(np.abs(train_ND.mean(0)), np.median(np.abs(train_ND)))
    if len(classes) == 1 or not varies_D.any():
        return float((held_out_y_N == classes[counts.argmax()]).mean())
    probe = make_pipeline(StandardScaler(), MLPClassifier((64,), alpha=_WEIGHT_DECAY, max_iter=60, random_state=seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 60 epochs are enough for a baseline
        probe.fit(train_ND[:, varies_D].astype(np.float32), train_y_N)
    return float((probe.predict(held_out_ND[:, varies_D].astype(np.float32)) == held_out_y_N).mean())


def check_probabilities(probabilities_NK: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Convert to float64. Raises ValueError unless every row is a distribution over `names`, which must differ."""
    found_NK = np.asarray(probabilities_NK, np.float64)
    if len(set(names)) != len(names) or any(not name or "->" in name for name in names):
        raise ValueError(f"names {list(names)}: each must be different, not empty and without '->'")
    if found_NK.ndim != 2 or found_NK.shape[1] != len(names) or not found_NK.size:
        raise ValueError(f"probabilities of shape {found_NK.shape}: expected at least one row of {len(names)}")
    fine_N = (np.abs(found_NK.sum(1) - 1) <= _SUM_TOLERANCE) & (found_NK >= 0).all(1)  # false for NaN
    if not fine_N.all():
        raise ValueError(f"row {fine_N.argmin()} is no distribution: {found_NK[fine_N.argmin()].tolist()}")
    return found_NK


def _aligned(rows: list[list[str]]) -> str:
    """Align the first column to the left and the others to the right, with two spaces between columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)
