"""Confusions, labels and calibration, by hand."""

import pytest

from prelm_jax.finetuning import mistakes


def test_confusion():
    assert mistakes.confusion(["a", "b", "b", "c"], ["b", "b", "a", "b"], "abc").tolist() == [
        [0, 1, 0],
        [1, 1, 0],
        [0, 1, 0],
    ]


def test_by_label():
    found = mistakes.by_label("label", ["a", "a", "b"], ["a", "b", "b"], "abc")
    assert found == {"a": (1, 1 / 2, 1, 2 / 3), "b": (2, 1, 1 / 2, 2 / 3), "c": (0, 0, 0, 0)}
    found = mistakes.by_label("tags", [("B-A", "I-A", "B-B")], [("B-A", "I-A", "I-A")], ("B-A", "I-A", "B-B", "O"))
    assert found == {"A": (1, 0, 0, 0), "B": (0, 0, 0, 0)}


def test_calibration_by_hand():
    """15 bins: 0.5 and 0.52 are in the eighth, from 7/15 to 8/15; 0.9 and 0.91 in the fourteenth; 1 in the last."""
    found = mistakes.calibration([0.5, 0.52, 0.9, 0.91, 1.0], [True, False, True, True, False])
    assert found.error == pytest.approx((abs(1.02 - 1) + abs(1.81 - 2) + abs(1 - 0)) / 5)
    assert found.bins == [(2, pytest.approx(0.51), 0.5), (2, pytest.approx(0.905), 1.0), (1, 1.0, 0.0)]
    assert mistakes.calibration([], []).error == 0
