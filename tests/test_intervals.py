"""lm/intervals.py: statistics with known answers."""

import numpy as np
import pytest

from lm.intervals import (
    bootstrap,
    gap_closed,
    of_sums,
    paired_steps,
    pairs_of,
    protocol_title,
    written_steps,
)


def test_bootstrap_covers_the_mean_of_normal_data():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap(rng.normal(0.3, 1, 40), seed=trial, n=1000)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199  # 95 % nominal, a little less with 40 passages
    assert bootstrap(np.full(10, 0.5), 0) == [0.5, 0.5]


def test_a_ratio_of_sums():
    """Not the mean of ratios; and without an interval where a draw of the passages divides by
    nothing."""
    ratio = lambda sums: sums[1] / sums[0]  # noqa: E731
    found = of_sums(ratio, [[1.0, 1.0], [3.0, 0.0], [4.0, 3.0]], 0)
    assert found["value"] == 0.5 and found["ci95"][0] == 0.0 and 0.7 < found["ci95"][1] <= 1.0
    assert of_sums(ratio, [[0.0, 0.0], [1.0, 0.5]], 0) == {"value": 0.5, "ci95": None}


def test_differences_are_those_on_the_same_passages():
    base = np.linspace(0, 0.8, 20)  # passages differ a lot, the step up is the same in each
    rows = {"base": base, "passage": base + 0.1, "noise": base[::-1] + 0.1}
    one, two = paired_steps(rows, [("base", "passage"), ("base", "noise")], seed=0)
    assert (one["from"], one["to"]) == ("base", "passage")
    assert one["delta"] == pytest.approx(0.1) and one["ci95"] == pytest.approx([0.1, 0.1])
    assert two["delta"] == pytest.approx(0.1) and two["ci95"][0] < -0.05 < 0.25 < two["ci95"][1]


def test_pairs():
    rows = ["base", "passage", "seal-1", "seal-2", "in-context"]
    pairs, seal = pairs_of(rows, [("base", "passage"), ("base", "seal-1")])
    assert seal == ["seal-2"] and pairs == [
        ("base", "passage"),
        ("passage", "seal-1"),
        ("seal-1", "seal-2"),
        ("seal-2", "in-context"),
        ("base", "seal-1"),
        ("base", "seal-2"),
        ("passage", "seal-2"),
    ]
    assert pairs_of(["a", "b"]) == ([("a", "b")], [])


def test_how_much_of_a_gap_is_closed():
    noise = np.random.default_rng(0).normal(0, 0.02, 50)
    low, high = 0.2 + noise, 0.7 + noise
    closed = gap_closed(low, high, low + 0.2, seed=0)
    assert closed["share"] == pytest.approx(0.4) and closed["ci95"] == pytest.approx([0.4, 0.4])
    nothing = {"share": None, "ci95": None}
    assert gap_closed(high, low, high, seed=0) == nothing  # there is none
    unsure = low + np.where(np.arange(50) % 2, 0.5, -0.45)
    assert gap_closed(low, unsure, low, seed=0) == nothing


def test_steps_as_text():
    rows = [{"method": m} for m in ("base", "passage", "seal-1")]
    steps = []
    for a, b, delta in (
        ("base", "passage", 0.1),
        ("passage", "seal-1", -0.02),
        ("base", "seal-1", 0),
    ):
        steps.append({"from": a, "to": b, "delta": delta, "ci95": [delta - 0.01, delta + 0.01]})
    above, others = written_steps(rows, steps)
    assert above == {"passage": "+10.0 [+9.0, +11.0]", "seal-1": " -2.0 [-3.0, -1.0]"}
    assert others == {("base", "seal-1"): " +0.0 [-1.0, +1.0]"}


def test_how_many_steps_in_words():
    settings = {"epochs": 6, "steps": 9, "recipes": None}
    titles = {}
    for protocol, recipes in (
        ("none", None),
        ("epochs", "r"),
        ("steps", "r.json"),
        ("steps", None),
    ):
        result = {"protocol": protocol, "settings": settings | {"recipes": recipes}}
        titles[protocol, recipes] = protocol_title(result)
    assert list(titles.values()) == [
        "nothing learnt",
        "equal epochs, 6 in every row (the paper's protocol)",
        "optimiser steps as suits each row best",
        "9 optimiser steps in every row",
    ]
