"""The z-score over the last 128 values against numpy, and what is skipped."""

import math

import numpy as np
import pytest

from training.outliers import WINDOW, OutlierWindow, is_outlier


def test_no_score_before_the_window_is_full() -> None:
    window = OutlierWindow()
    assert all(math.isnan(window.score(float(i))) for i in range(WINDOW))
    assert math.isfinite(window.score(0.0))


def test_scores_equal_numpy_s_over_the_window_with_the_new_value_in_it() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.1, 400)
    values[200] = 9.0  # an outlier, which stays in the window
    window = OutlierWindow()
    for i, value in enumerate(values):
        z = window.score(value)
        if i >= WINDOW:
            recent = values[i - WINDOW + 1 : i + 1]
            assert z == pytest.approx((value - recent.mean()) / recent.std(), rel=1e-9)


def test_equal_values_score_zero() -> None:
    window = OutlierWindow()
    assert [window.score(2.5) for _ in range(WINDOW + 1)][-1] == 0.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_is_an_outlier_and_leaves_no_trace(value: float) -> None:
    window = OutlierWindow(values=[1.0, 2.0])
    z = window.score(value)
    assert window.values == [1.0, 2.0]
    assert is_outlier(z, limit=0.0) and is_outlier(z, limit=5.0)


def test_only_scores_above_a_limit_that_is_set_are_outliers() -> None:
    assert is_outlier(5.1, limit=5.0)
    assert not is_outlier(4.9, limit=5.0)
    assert not is_outlier(-9.0, limit=5.0)
    assert not is_outlier(99.0, limit=0.0)
    assert not is_outlier(math.nan, limit=5.0)
