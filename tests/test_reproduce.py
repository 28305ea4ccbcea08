# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""reproduce.py: what it calls true, what it changes in the examples, how it tunes, and its statistics; the
comparison itself takes hours.

    python -m pytest -q tests/test_reproduce.py
"""
import contextlib
import doctest
import json
import math
from pathlib import Path

import numpy as np
import pytest
from pytest import approx as about

import tiny                                                         # noqa: F401  puts the project on sys.path
import dvo
import mcts
import reproduce
from reproduce import Settings


def test_doctests():
    result = doctest.testmod(reproduce)
    assert result.attempted > 0
    assert result.failed == 0


QUESTION = "Start with 9. Add 2. Multiply by 1. Subtract 3."


@pytest.mark.parametrize("steps, right", [
    (["9 + 2 = 11.", "11 * 1 = 11.", "11 - 3 = 8.", "Final Answer: 8"], 4),
    (["9 + 2 = 11.", "11 * 1 - 3 = 8.", "Final Answer: 8"], 3),                 # two at once, yet right
    (["9 + 2 = 11.", "11 * 1 = 12.", "11 - 3 = 8.", "Final Answer: 8"], 1),     # a wrong result
    (["9 + 2 = 11.", "11 - 3 = 8.", "Final Answer: 8"], 1),                     # an operation left out
    (["9 + 2 = 11.", "12 * 1 = 11.", "11 - 3 = 8.", "Final Answer: 8"], 1),     # from a wrong value
    (["9 + 2 = 11.", "11 * 1 = 11.", "Final Answer: 8"], 2)])                   # too early
def test_right_steps_before_the_first_wrong_one(steps, right):
    fine = [fine for fine, _ in reproduce.follow(QUESTION, steps)]
    wrong = len(steps) - right
    assert fine == [True] * right + [False] * wrong


def test_questions_of_development_and_test_are_new():
    """Also where there are so few chains that bases have seen many of them."""
    seen = reproduce.trained_on()
    for chain in reproduce.CHAINS:
        asked = []
        for part, size in reproduce.SIZES.items():
            problems = reproduce.unseen_questions(chain, part)
            assert len(problems) == size
            asked += [p["question"] for p in problems]
        assert len(set(asked)) == len(asked)
        assert not seen & set(asked)
    demonstrated = reproduce.demonstrated(seed=0, part=0, n=7000)
    assert {p["question"] for p in demonstrated} < seen


# ---------------------------------------------------------------- changes of what is trained on


def a_tree():
    """The root; below it step 1, drawn three times, with a right and a wrong end, and step 4, a wrong end
    that was drawn twice."""
    tree = mcts.Tree("q", "a", prompt=[1])
    step = mcts.Node(parent=0, tokens=[2], count=3)
    right = mcts.Node(parent=1, tokens=[3], reward=1, count=1)
    wrong = mcts.Node(parent=1, tokens=[4], reward=-1, count=4)
    other = mcts.Node(parent=0, tokens=[5], reward=-1, count=2)
    tree.add(step)
    for end in right, wrong, other:
        end.terminal = True
        mcts.backup(tree, tree.add(end))
    return tree


def test_values_that_weigh_as_often_as_drawn():
    tree = a_tree()
    root, step, *ends = reproduce.weighed(tree)
    assert ends == [1, -1, -1]
    assert step == about((1 - 4) / 5)
    assert root == about((3 * step - 2) / 5)
    assert tree.nodes[0].value == about(-1 / 3)                     # merged


def test_soft_value():
    """beta_1 log mean exp(r / beta_1), the right end having chance 3/5 * 1/5; it tends to the mean."""
    tree = a_tree()
    chance = 3 / 25
    mean = chance - (1 - chance)
    mean_exp = chance * math.exp(2) + (1 - chance) * math.exp(-2)
    assert reproduce.soft_value(tree, 0.5) == about(0.5 * math.log(mean_exp))
    assert reproduce.soft_value(tree, 1000) == about(mean, abs=1e-3)


def grown(iterations):
    """A tree of the search without a model: the samples of a leaf depend on its path only."""
    tree = mcts.Tree("q", "a", prompt=[1])

    def outcome(tokens):
        return (1 if sum(tokens) % 3 == 0 else -1), True

    settings = dict(iterations=iterations, breadth=4, depth=5, c_puct=1.5)
    search = mcts.grow(tree, outcome, **settings)
    samples = None
    with contextlib.suppress(StopIteration):
        while True:
            leaf = search.send(samples)
            path = [tree.nodes[i].tokens for i in tree.path(leaf)]
            samples = samples_after(path)
    return tree


def samples_after(path):
    rng = dvo.generator(0, *path)
    tokens = rng.integers(2, 9, size=4).tolist()
    ends = rng.choice(["step", "answer"], size=4).tolist()
    return [mcts.Sample([token], [-0.1 * token], str(token), end) for token, end in zip(tokens, ends)]


@pytest.fixture(scope="module")
def tree():
    found = grown(20)
    right, wrong = reproduce.ended_paths(found, 4, seed=0)
    assert len(right) >= 4
    assert len(wrong) >= 4
    return found


def test_a_longer_search_goes_on_with_the_same_tree(tree):
    for iterations in (1, 5, 12):
        younger = reproduce.cut(tree, iterations)
        assert len(younger.nodes) < len(tree.nodes)
        assert stored(younger) == stored(grown(iterations))


def stored(tree):
    """Of each node what a file has."""
    return [[getattr(node, name) for name in mcts.STORED] for node in tree.nodes]


def test_paths_apart_keep_their_credits(tree):
    """Same credits along each path; so nothing but the credits differs in the controls."""
    right, wrong = dvo.draw_paths(tree, 4, seed=0)
    apart = reproduce.apart(tree, right + wrong, rearrange=list)
    new_right, new_wrong = reproduce.ended_paths(apart, 4, seed=0)
    lengths = [len(path) for path in new_right + new_wrong]
    assert sum(lengths) == len(apart.nodes) - 1
    for old, new in zip(right + wrong, new_right + new_wrong, strict=True):
        for i, j in zip(old, new, strict=True):
            assert apart.credit(j) == about(tree.credit(i))
            assert apart.nodes[j].tokens == tree.nodes[i].tokens


@pytest.mark.parametrize("method", ["dvo-even", "dvo-permuted"])
def test_controls_of_the_place_keep_the_sum(tree, method):
    usual = credits_by_path(tree, Settings())
    changed = credits_by_path(tree, Settings(method))
    for credits, old in zip(changed, usual, strict=True):
        assert len(credits) == len(old)
        assert sum(credits) == about(sum(old), abs=1e-6)
        if method == "dvo-even":
            mean = sum(old) / len(old)
            assert credits == about([mean] * len(old), abs=1e-6)
        else:
            assert sorted(credits) == about(sorted(old), abs=1e-6)
    assert sum(changed, []) != about(sum(usual, []), abs=1e-3)


def credits_by_path(tree, settings):
    example = reproduce.make_example(tree, settings)
    return [example.credit[on_path > 0].tolist() for on_path in example.path]


def test_the_form_of_a_star(tree):
    """The response level with V* at the root: its targets are r - V*."""
    example = reproduce.make_example(tree, Settings("a-star", beta_1=0.5))
    soft = reproduce.soft_value(tree, 0.5)
    targets = example.path @ example.credit
    assert targets.tolist() == about([r - soft for r in example.outcome.tolist()], abs=1e-6)


def test_paths_of_few_iterations_with_the_values_of_many(tree):
    younger = reproduce.cut(tree, 12)
    example = reproduce.make_example(tree, Settings(), source=younger)
    assert len(younger.nodes) < len(tree.nodes)
    expected = [0 if node.terminal else of_all.value for node, of_all in zip(younger.nodes, tree.nodes)]
    assert example.value.tolist() == about(expected)
    assert example.value.tolist() != about([0 if node.terminal else node.value for node in younger.nodes])


# ---------------------------------------------------------------- tuning and statistics


class Landscape(reproduce.Cells):
    """Cells whose development accuracy falls from a best rate and beta; for all seeds, other than the tuning
    seeds, a beta of 0.1 is better. There are no tests."""

    def __init__(self, out, best, beta=0.1):
        super().__init__(out)
        self.best = best
        self.beta = beta
        self.asked = []

    def each(self, kind, many):
        assert kind == "train", "only development questions choose"
        self.asked += many
        return [{"dev": self.score(s)} for s in many]

    def score(self, s):
        liked = self.beta if s.seed < reproduce.TUNING_SEEDS else 0.1
        distance = abs(math.log(s.lr / self.best))
        return -distance if s.beta == liked else -distance - 0.1


@pytest.mark.parametrize("best", [1e-4, 1e-3, 3e-5, 3e-6, 3e-3, 1e-6])
def test_the_grid_is_widened_until_the_best_lies_inside(best, tmp_path):
    cells = Landscape(tmp_path, best)
    chosen = reproduce.tune(cells, reproduce.SEEDS, Settings())
    rates = {s.lr for s in cells.asked}
    assert chosen.lr == best
    assert chosen.beta == 0.1
    assert best < max(rates)
    assert best > min(rates) or best == reproduce.GRID[0]


def test_all_seeds_choose(tmp_path):
    """The two tuning seeds like beta 0.03 better, the other three 0.1."""
    cells = Landscape(tmp_path, 3e-4, beta=0.03)
    best = reproduce.tune(cells, reproduce.SEEDS, Settings())
    assert reproduce.chosen(best) == {"lr": 3e-4, "beta": 0.1}


def test_what_is_a_methods_own_is_tuned_too(tmp_path):
    cells = Landscape(tmp_path, 3e-4)
    reproduce.tune(cells, [0, 1, 2], Settings("oreo"))
    assert {s.value_lr for s in cells.asked} == {3e-4, 1e-3, 3e-3}
    assert {s.alpha for s in cells.asked} == {0.0, 0.01, 0.1}


class MadeUp(reproduce.Cells):
    """Cells of every kind, in which step-level DVO with the values of the search has the better policy."""

    def each(self, kind, many):
        return [getattr(self, kind)(s) for s in many]

    def test(self, s):
        better = s.method == "dvo" and s.beta == 0.1 and s.iterations == 40
        share = 0.9 if better else 0.6
        rng = np.random.default_rng(s.seed)
        right = rng.random(100) < share
        return {"right": right.astype(int).tolist()}

    def base(self, s):
        return self.test(Settings("rft", seed=s.seed))

    def train(self, s):
        distance = abs(math.log(s.lr / 1e-4))
        return {"dev": -distance, "tokens": 1000, "curve": [[0.0, 0.0]]}

    def rewards(self, s):
        sign = 1 if s.method == "dvo" else -1
        reward = sign * (1 + s.seed / 10)
        row = {"reward": reward, "target": 1.0, "attainable": 2.0}
        return {"correct": row, "incorrect": row}

    def credit(self, s):
        learned = 0.8 - s.seed / 100
        return {"learned": learned, "target": 0.9, "base log-prob": 0.9, "mean log-prob": 0.9, "wrong": 9}

    def values(self, s):
        states = []
        for fresh in 0.0, 0.5, 1.0:
            place = {"question": "q", "parent": -1, "depth": 0, "fresh": fresh}
            critic = fresh / 5 + s.seed / 10
            states.append(place | {"search": fresh, "multiplicity": fresh, "critic": critic})
        return {"states": states}


def test_the_report_of_made_up_results(tmp_path):
    """Every part is summarised, every claim has its verdict."""
    cells = MadeUp(tmp_path)
    found = reproduce.summarise(cells, reproduce.SEEDS, reproduce.PARTS)
    assert list(found) == list(reproduce.PARTS)
    json.dumps(found)
    rows = list(reproduce.table_of_methods(found["methods"]))[2:]
    assert len(rows) == 1 + len(reproduce.METHODS)
    assert not any("not run" in row for row in rows)
    verdicts = {}
    for row in list(reproduce.table_of_claims(found))[2:]:
        claim, _, word = row.strip("| ").split(" | ")
        verdicts[claim] = word
    words = list(verdicts.values())
    assert verdicts["DVO is better than RFT, DPO and KTO on the same trees (Table 1)"] == "reproduced"
    rewards = [claim for claim in verdicts if "(Fig. 5)" in claim]
    assert [verdicts[claim] for claim in rewards] == ["reproduced"]
    credit = [claim for claim in verdicts if "(Fig. 6)" in claim]
    assert [verdicts[claim] for claim in credit] == ["opposite"]    # the base's log-prob finds it better
    assert set(words) <= {"reproduced", "not reproduced", "opposite", "unclear"}


def test_auc():
    assert reproduce.auc([1, 2], [3, 4]) == 1
    assert reproduce.auc([3, 4], [1, 2]) == 0
    assert reproduce.auc([1], [1, 1]) == 0.5
    assert reproduce.auc([1, 3], [2, 4]) == 0.75


def test_interval_of_paired_differences():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 4.303."""
    found = reproduce.interval([1, 2, 3])
    half = 4.303 / 3 ** 0.5
    assert found["mean"] == 2
    assert found["high"] - 2 == about(half)
    assert 2 - found["low"] == about(half)


def test_bootstrap_draws_questions():
    """Of n questions a share p differs by one: the interval is that of a binomial share."""
    a = np.zeros((3, 400))
    a[:, :100] = 1
    low, high = reproduce.bootstrap(a, np.zeros_like(a))
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert low == about(0.25 - half, abs=0.005)
    assert high == about(0.25 + half, abs=0.005)


def test_value_accuracy_of_known_states():
    root = {"question": "q", "parent": -1, "depth": 0, "fresh": 0.5, "search": 0.25}
    states = [root]
    for fresh, search in (0.0, 0.5), (0.5, 0.4), (1.0, 1.0):
        values = {"fresh": fresh, "search": search}
        states.append(values | {"question": "q", "parent": 0, "depth": 1})
    errors = 0.5 + 0.1 + 0 + 0.25
    assert reproduce.pairs_ranked(states, "search") == about(2 / 3)
    assert reproduce.absolute_error(states, "search") == about(errors / 4)
    assert reproduce.root_error(states, "search") == -0.25


def test_a_report_runs_nothing_and_says_what_is_missing(tmp_path):
    cells = reproduce.Cells(tmp_path, may_run=False)
    with pytest.raises(reproduce.Missing):
        cells.each("base", [Settings()])
    assert reproduce.summarise(cells, [0, 1], reproduce.PARTS) == {}
    for table in reproduce.table_of_methods({}), reproduce.table_of_claims({}):
        _, _, *rows = table
        assert len(rows) > 10
        assert all("not run" in row for row in rows)
    base = cells.path("base", Settings())
    base.write_text('{"right": [1, 0]}')
    assert cells.each("base", [Settings()]) == [{"right": [1, 0]}]
    trained = cells.path("train", Settings(lr=1e-3))
    trained.write_text('{"dev": 0.5}')
    assert reproduce.sweep(cells) == {"train lr=0.001": 0.5}


def test_the_tables_of_the_repository_are_those_of_its_numbers():
    assets = Path(reproduce.__file__).parents[1] / "assets"
    found = json.loads((assets / "results.json").read_text())
    text = (assets / "results.md").read_text(encoding="utf-8")
    for line in (*reproduce.table_of_methods(found["methods"]), *reproduce.table_of_claims(found)):
        assert line in text
