# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""reproduce.py: what it calls true, and its statistics; the comparison itself takes an hour.

    python -m pytest -q tests/test_reproduce.py
"""
import doctest
import json

import pytest

import tiny                                                         # first: it puts the project on sys.path
import mcts
import reproduce


def test_doctests():
    result = doctest.testmod(reproduce)
    assert result.attempted > 0 and result.failed == 0


QUESTION = "Start with 9. Add 2. Multiply by 1. Subtract 3."


@pytest.mark.parametrize("steps, expected", [
    (["9 + 2 = 11.", "11 * 1 = 11.", "11 - 3 = 8.", "Final Answer: 8"], "clean"),
    (["9 + 2 = 11.", "11 * 1 - 3 = 8.", "Final Answer: 8"], "skipping"),
    (["9 + 2 = 11.", "11 * 1 = 12.", "11 - 3 = 8.", "Final Answer: 8"], "lucky"),      # a wrong result
    (["9 + 2 = 11.", "11 - 3 = 8.", "Final Answer: 8"], "lucky"),                      # an operation left out
    (["9 + 2 = 11.", "12 * 1 = 11.", "11 - 3 = 8.", "Final Answer: 8"], "lucky"),      # from a wrong value
    (["9 + 2 = 11.", "11 * 1 = 11.", "Final Answer: 8"], "lucky")])                    # too early
def test_kinds_of_correct_paths(steps, expected):
    tree = mcts.Tree(QUESTION, "8", prompt=[1])
    for i, text in enumerate(steps):
        tree.add(mcts.Node(i, [i], text=text + "\n\n"))
    assert reproduce.kind(tree, tree.path(len(steps))) == expected


def test_auc():
    assert reproduce.auc([1, 2], [3, 4]) == 1 and reproduce.auc([3, 4], [1, 2]) == 0
    assert reproduce.auc([1], [1, 1]) == 0.5 and reproduce.auc([1, 3], [2, 4]) == 0.75


def test_interval_of_paired_differences():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 4.30."""
    found = reproduce.paired([2, 4, 6], [1, 2, 3])
    assert found["mean"] == 2 and found["high"] - 2 == pytest.approx(4.30 / 3 ** 0.5)


class Results(reproduce.Cells):
    """Cells of a known landscape: development accuracy peaks at `best`."""

    def __init__(self, out, best):
        super().__init__(out, jobs=1)
        self.best, self.asked = best, []

    def run(self, kind, many):
        self.asked += [settings["lr"] for settings in many]
        return [{"dev": -abs(reproduce.math.log(s["lr"] / self.best)), "test": 0.5} for s in many]


@pytest.mark.parametrize("best", [1e-4, 9e-6, 1e-6, 3e-3])
def test_the_grid_is_widened_until_the_best_lies_inside(best, tmp_path):
    results = Results(tmp_path, best)
    rate, of_seeds = results.tuned([0, 1, 2], grid=[3e-5, 1e-4, 3e-4], method="dvo")
    assert rate == pytest.approx(best, rel=0.1) and len(of_seeds) == 3
    assert best == 1e-6 or min(results.asked) < rate < max(results.asked)


def test_a_report_runs_nothing_and_says_what_is_missing(tmp_path):
    cells = reproduce.Cells(tmp_path, jobs=1, run=False)
    settings = dict(seed=0, chain="long")
    assert cells.run("base", [settings]) == [None] and reproduce.spread([0.5, None]) is None
    path = tmp_path / "cells" / f"{cells.name('base', settings)}.json"
    path.write_text(json.dumps({"test": 0.5}))
    assert cells.run("base", [settings]) == [{"test": 0.5}]
