"""Scores of a gate against numbers worked out by hand, hostile inputs, probes of known problems, and the pictures."""

import json
import math
import time
import warnings

import numpy as np
import pytest

from ds_moe.errors import UserError
from ds_moe.tasks.gate.figures import confusion_figure, gate_histogram
from ds_moe.tasks.gate.scores import (
    advice,
    as_json,
    calibration_error,
    check_not_constant,
    probe_accuracy,
    routing_scores,
    table,
)

NAMES = ("chat", "ocr", "grounding")
LABELS = np.array([0, 0, 0, 0, 1, 1])  # nobody asks for grounding
FOUND = [0, 0, 1, 2, 1, 0]


def sure(found, confidence=1.0, adapters=3):
    """Probabilities that give `confidence` to each of `found`, the rest to the others in equal parts."""
    probabilities_NK = np.full((len(found), adapters), (1 - confidence) / (adapters - 1))
    probabilities_NK[np.arange(len(found)), found] = confidence
    return probabilities_NK


@pytest.fixture
def scores():
    return routing_scores(sure(FOUND, 0.8), LABELS, NAMES, train_labels=np.array([1, 1, 0]))


def test_scores_of_six_requests(scores):
    assert (scores.total, scores.correct, scores.accuracy) == (6, 3, 0.5)
    assert scores.confusion_KK.tolist() == [[2, 1, 1], [1, 1, 0], [0, 0, 0]]
    pairs = {"chat->chat": 2, "chat->ocr": 1, "chat->grounding": 1, "ocr->chat": 1, "ocr->ocr": 1}
    assert scores.confusion_pairs() == pairs
    assert scores.support_K.tolist() == [4, 2, 0]
    assert scores.predicted_K.tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    assert scores.precision_K.tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert scores.recall_K.tolist() == pytest.approx([1 / 2, 1 / 2, 0])  # an empty class: 0, and no warning
    assert scores.ece == pytest.approx(0.8 - 0.5)  # one bin
    assert scores.entropy == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.1))
    assert scores.constant is None


def test_the_majority_is_that_of_training_and_counted_where_it_is_evaluated(scores):
    assert (scores.majority, scores.majority_accuracy) == ("ocr", pytest.approx(1 / 3))
    without = routing_scores(sure(FOUND), LABELS, NAMES)
    assert (without.majority, without.majority_accuracy) == ("chat", pytest.approx(2 / 3))


def test_calibration_error_over_bins():
    confidence, right = np.array([0.95, 0.95, 0.5, 0.5, 0.5, 0.5]), np.array([1, 0, 1, 1, 1, 0], bool)
    assert calibration_error(confidence, right) == pytest.approx(2 / 6 * 0.45 + 4 / 6 * 0.25)
    assert abs(right.mean() - confidence.mean()) < 0.02  # negative control: without bins the errors cancel


def test_calibration_bins_are_open_below_and_closed_above():
    edge = 10 / 15
    apart = calibration_error(np.array([edge, edge + 1e-9]), np.array([True, False]))
    together = calibration_error(np.array([edge - 1e-9, edge]), np.array([True, False]))
    assert apart == pytest.approx(0.5, abs=1e-6) and together == pytest.approx(edge - 0.5, abs=1e-6)


def test_the_ends_of_the_scale():
    perfect = routing_scores(sure([0, 1, 2]), np.arange(3), NAMES)
    assert (perfect.accuracy, perfect.ece, perfect.entropy) == (1, 0, 0)
    assert perfect.precision_K.tolist() == perfect.recall_K.tolist() == [1, 1, 1]
    assert routing_scores(np.full((4, 3), 1 / 3), LABELS[:4], NAMES).entropy == pytest.approx(math.log(3))


def test_a_constant_gate_is_refused():
    labels = np.arange(400) % 3
    collapsed = routing_scores(sure([1] * 400, 0.4), labels, NAMES)
    assert collapsed.constant == "ocr"
    with pytest.raises(
        UserError, match=r"^the gate predicts 'ocr' for all 400 requests although 3 adapters .*first tok"
    ):
        check_not_constant(collapsed)


@pytest.mark.parametrize(
    ("found", "labels"), [([1, 1, 1], [1, 1, 1]), ([1], [0]), ([1, 1, 0], [1, 0, 0])], ids=["one class", "one", "two"]
)
def test_what_is_no_constant_gate(found, labels):
    fine = routing_scores(sure(found), np.array(labels), NAMES)
    assert fine.constant is None
    check_not_constant(fine)


@pytest.mark.parametrize(
    ("probabilities", "labels", "names", "message"),
    [
        (np.zeros((0, 3)), [], NAMES, "at least one row"),
        (sure([0, 1]) * 0.9, [0, 1], NAMES, "row 0 is no distribution"),
        (np.array([[1, 0, 0], [1.5, -0.5, 0]]), [0, 1], NAMES, "row 1 is no distribution"),
        (np.array([[1, 0, 0], [np.nan, 0.5, 0.5]]), [0, 1], NAMES, "row 1 is no distribution"),
        (sure([0, 1]), [0, 1], NAMES[:2], "expected at least one row of 2"),
        (sure([0, 1]), [0, 1], ("a", "b", "a"), "each must be different"),
        (sure([0, 1]), [0, 1], ("a", "b", "a->b"), "each must be different"),
    ],
)
def test_refused_inputs(probabilities, labels, names, message):
    with pytest.raises(ValueError, match=message):
        routing_scores(probabilities, np.array(labels), names)


def test_probabilities_of_a_half_precision_softmax_are_taken():
    weights_NK = np.exp(np.random.default_rng(0).normal(size=(200, 3)) * 3)
    routing_scores((weights_NK / weights_NK.sum(1, keepdims=True)).astype(np.float16), np.arange(200) % 3, NAMES)


def test_the_table_starts_with_the_accuracy_and_is_aligned(scores):
    text = table(scores, {"text only": 0.25})
    blocks = text.split("\n\n")
    assert blocks[0] == "routing accuracy 50.0%: 3 of 6 requests"
    assert [line.split("  ")[0] for line in blocks[1].splitlines()] == ["baseline", "majority (ocr)", "text only"]
    assert blocks[1].splitlines()[2].split()[-2:] == ["+25.0", "points"]
    assert blocks[2].splitlines()[3].split() == ["grounding", "0", "16.7%", "0.0%", "-"]  # recall of nothing
    assert [line.split()[-4:] for line in blocks[3].splitlines()[1:3]] == [
        ["chat", "2", "1", "1"],
        ["ocr", "1", "1", "0"],
    ]
    for block in blocks[1:4]:
        assert len({len(line) for line in block.splitlines()}) == 1


def test_json_holds_everything(scores):
    found = json.loads(json.dumps(as_json(scores, {"text only": np.float32(0.25)}), allow_nan=False))
    assert found["confusion"] == scores.confusion_KK.tolist() and found["names"] == list(NAMES)
    assert found["confusion_pairs"] == scores.confusion_pairs() and found["baselines"] == {"text only": 0.25}
    kept = [found[key] for key in ("accuracy", "total", "correct", "majority", "ece_bins", "constant")]
    assert kept == [0.5, 6, 3, "ocr", 15, None]
    assert {"support", "predicted", "precision", "recall", "majority_accuracy", "ece", "entropy"} < set(found)


@pytest.mark.parametrize("adapters", [1, 2, 5, 13])
def test_figures_are_drawn_for_any_number_of_adapters(adapters):
    labels, names = np.arange(40) % adapters, [f"adapter-with-a-long-name-{k}" for k in range(adapters)]
    probabilities_NK = sure(labels, 0.9, adapters) if adapters > 1 else np.ones((40, 1))
    scores = routing_scores(probabilities_NK, labels, names)
    for picture in (confusion_figure(scores), gate_histogram(probabilities_NK, names)):
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert picture[:3].min() == 255 and picture.min() < 60  # nothing touches the upper edge, and there is ink


def test_right_and_wrong_routes_differ_in_colour():
    labels = np.array([0, 1] * 20)
    right, wrong = (confusion_figure(routing_scores(sure(found), labels, NAMES)) for found in (labels, 1 - labels))
    for picture, blue in ((right, True), (wrong, False)):
        middle = picture[picture.max(2) - picture.min(2) > 100].mean(0)  # the strongly coloured cells
        assert (middle[2] > middle[0]) == blue


def test_the_probe_finds_a_separable_problem():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 4, 2000)
    features_ND = (draw.normal(size=(2000, 128)) + draw.normal(size=(4, 128))[labels]).astype(np.float32)
    start = time.monotonic()
    found = probe_accuracy(features_ND[:1500], labels[:1500], features_ND[1500:], labels[1500:])
    assert found > 0.95 and time.monotonic() - start < 20  # 0.3 s on an idle machine


def test_the_probe_finds_two_signals_among_126_columns_of_noise():
    """Without weight decay it reaches 0.7, and a gate seems better than its baseline for no reason."""
    features_ND = np.random.default_rng(0).normal(size=(2000, 128))
    labels = (features_ND[:, 0] > 0) + 2 * (features_ND[:, 1] > 0)
    assert probe_accuracy(features_ND[:1500], labels[:1500], features_ND[1500:], labels[1500:]) > 0.8


def test_the_probe_is_at_chance_on_noise_and_repeats_itself():
    draw = np.random.default_rng(0)
    features_ND, labels = draw.normal(size=(2000, 64)), draw.integers(0, 4, 2000)
    problem = features_ND[:1000], labels[:1000], features_ND[1000:], labels[1000:]
    found = probe_accuracy(*problem)
    assert probe_accuracy(*problem) == found != probe_accuracy(*problem, seed=1)
    assert found == pytest.approx(0.25, abs=0.06)  # 4 standard deviations of 1,000 draws


@pytest.mark.parametrize("rounding", [0, 1e-5])
def test_constant_features_give_the_majority_class(rounding):
    """The first token of a causal model: equal but for rounding, which must not be scaled up to a signal."""
    train, held_out = np.array([2] * 60 + [0] * 40), np.array([2] * 30 + [0] * 70)
    features = [3.0 + rounding * np.arange(len(labels))[:, None] * np.ones(8) / 100 for labels in (train, held_out)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe_accuracy(features[0], train, features[1], held_out) == 0.3


def test_the_probe_takes_one_class_and_ill_matched_columns():
    rows = np.random.default_rng(0).normal(size=(10, 3))
    assert probe_accuracy(rows, np.ones(10, int), rows, np.arange(10) % 2) == 0.5
    for wrong, labels in ((rows[:, :2], np.ones(10)), (rows, np.ones(9)), (rows[:0], []), (rows * np.nan, np.ones(10))):
        with pytest.raises(ValueError, match="features"):
            probe_accuracy(rows, np.ones(10, int), wrong, labels)


def partly_right(right, total):
    labels = np.arange(total) % 2
    found = np.where(np.arange(total) < right, labels, 1 - labels)
    return routing_scores(sure(found, 0.9, 2), labels, ("chat", "ocr"))


@pytest.mark.parametrize(("total", "chance"), [(87, True), (8700, False)])
def test_a_modality_that_alone_beats_the_gate_is_advised_in_words(total, chance):
    scores = partly_right(68 * total // 87, total)
    told = advice(scores, {"text only": 74 / 87, "vision only": 0.5}, "both")
    assert "sees text only routes 85.1% right, this gate (both) 78.2%" in told
    assert "set gate.modalities=text and train again" in told and ("chance alone" in told) == chance
    assert "gate.modalities=vision" in advice(scores, {"text only": 0.8, "vision only": 0.9}, "both")
    assert "gate.modalities=vision" in advice(scores, {"text only": 0.7, "vision only": 0.9}, "text")


def test_a_gate_of_the_better_modality_is_told_to_learn_and_a_good_one_nothing():
    scores = partly_right(78, 100)
    told = advice(scores, {"text only": 0.9, "vision only": 0.5}, "text")
    assert "has not learned" in told and "gate.modalities" not in told
    for baselines in ({}, {"text only": 0.78, "vision only": 0.5}, {"text only": 0.1}):
        assert advice(scores, baselines, "both") is None
