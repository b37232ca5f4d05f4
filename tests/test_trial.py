"""Intervals against Student's table, pairs by seed, and verdicts that say no more than the numbers."""

from __future__ import annotations

import math

import pytest

from qatlas.trial import Interval, Trial, Trials


def trials(metric: str, lower: bool, **scores: list[float]) -> Trials:
    made = [Trial(name, 2.0, seed, f"qatlas run {name}", name, {"bits": 2}, {"trained": {metric: x}}, 2.3, 1000, 9.0, 3, 96)
            for name, values in scores.items() for seed, x in enumerate(values)]
    return Trials("m", "d", metric, lower, {metric: 1.5}, 4000, "lsq", "qatlas compare", made, {"lsq": "", "other": "is better"})


def test_an_interval_is_students():
    found = Interval.of([1.0, 2.0, 3.0, 4.0])                      # t = 3.182, s = 1.29099, n = 4
    assert math.isclose(found.high - found.mean, 3.182 * 1.2909944 / 2, rel_tol=1e-6)
    assert Interval.of([5.0]) == Interval(5.0, -math.inf, math.inf) and Interval.of([5.0]).told == ""
    many = Interval.of([0.0, 1.0] * 10)
    assert math.isclose((many.high - many.mean) / (0.51298918 / math.sqrt(20)), 2.093, rel_tol=0.01)      # of 19 degrees of freedom


def test_a_perplexity_is_compared_as_a_ratio_seed_by_seed():
    found = trials("perplexity", True, lsq=[10.0, 20.0, 30.0], other=[5.0, 10.0, 15.0])
    interval, better, n = found.beside("other", 2.0)
    assert math.isclose(interval.mean, 0.5) and math.isclose(interval.low, 0.5) and (better, n) == (3, 3)
    assert found.verdict("other", 2.0) == "better" and found.verdict("lsq", 2.0) == "" and found.beside("lsq", 2.0) is None


def test_an_accuracy_is_compared_as_a_difference():
    found = trials("accuracy", False, lsq=[0.80, 0.81, 0.82], other=[0.70, 0.72, 0.71])
    interval, better, _ = found.beside("other", 2.0)
    assert math.isclose(interval.mean, -0.1) and better == 0 and found.verdict("other", 2.0) == "worse"


def test_what_is_not_sure_is_open():
    found = trials("perplexity", True, lsq=[10.0, 10.0, 10.0], other=[9.0, 12.0, 9.5])
    assert found.verdict("other", 2.0) == "open"
    assert trials("perplexity", True, lsq=[10.0], other=[1.0]).verdict("other", 2.0) == "open"          # one seed says nothing sure


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_is_not_compared(broken):
    found = trials("perplexity", True, lsq=[10.0, 10.0], other=[9.0, broken])
    assert found.beside("other", 2.0) is None and found.verdict("other", 2.0) == ""


def test_trials_go_to_json_and_back():
    import json

    found = trials("perplexity", True, lsq=[10.0, 11.0], other=[9.0, 9.5])
    assert Trials.from_json(json.loads(json.dumps(found.to_json()))) == found
