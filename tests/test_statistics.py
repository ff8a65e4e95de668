"""Differences over seeds: closed forms, and SciPy's own paired test."""

import math

import numpy as np
import pytest
from scipy import stats

from dpmambair_basicsr.results.statistics import paired_difference, spread


def test_two_seeds_have_the_closed_form_of_one_degree_of_freedom():
    """Student's t with one degree of freedom is Cauchy's: its quantile p is tan(pi (p - 1/2))."""
    found = paired_difference([3.0, 7.0], [1.0, 2.0])  # differences 2 and 5: mean 3.5, s / sqrt(2) = 1.5
    half = math.tan(math.pi * 0.475) * 1.5
    assert (found.mean, found.low, found.high) == pytest.approx((3.5, 3.5 - half, 3.5 + half), rel=1e-12)


@pytest.mark.parametrize('confidence', [0.8, 0.95, 0.99])
def test_the_interval_is_that_of_the_paired_t_test(confidence):
    rng = np.random.default_rng(0)
    values, baseline = rng.normal(20, 2, 7), rng.normal(20, 2, 7)
    wanted = stats.ttest_rel(values, baseline).confidence_interval(confidence)
    found = paired_difference(values, baseline, confidence)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)
    assert spread(values) == pytest.approx(np.std(values, ddof=1))


def test_common_effects_of_a_seed_cancel_in_pairs():
    seeds = np.array([0.0, 5.0, -3.0, 11.0])
    found = paired_difference(seeds + [1.0, 1.1, 0.9, 1.0], seeds)
    assert found.sign == 1 and found.high - found.low < 0.3 < spread(seeds)


def test_an_interval_decides_only_where_it_excludes_zero():
    assert paired_difference([1.0, 1.1], [0.0, 0.0]).sign == 1
    assert paired_difference([0.0, 0.0], [1.0, 1.1]).sign == -1
    assert paired_difference([1.0, 3.0], [0.0, 0.0]).sign == 0


def test_one_pair_has_no_interval_and_decides_nothing():
    found = paired_difference([2.0], [1.0])
    assert found.mean == 1 and math.isnan(found.low) and math.isnan(found.high) and found.sign == 0


def test_values_without_a_partner_are_refused():
    with pytest.raises(ValueError):
        paired_difference([1.0, 2.0], [1.0])


def test_values_that_are_not_finite_decide_nothing():
    difference = paired_difference([math.inf, 30.0], [20.0, 20.0])
    assert difference.sign == 0 and math.isnan(difference.mean) and math.isnan(spread([math.inf, 30.0]))
