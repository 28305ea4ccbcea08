# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""reproduce.py: what it calls true, what it changes in the examples, how it tunes, and its statistics; the
comparison itself takes hours.

    python -m pytest -q tests/test_reproduce.py
"""
import contextlib
import doctest
import json
import math

import numpy as np
import pytest
import torch

import tiny                                                         # noqa: F401  puts the project on sys.path
import dvo
import mcts
import reproduce
from reproduce import Settings


def test_doctests():
    result = doctest.testmod(reproduce)
    assert result.attempted > 0 and result.failed == 0


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
    assert fine == [True] * right + [False] * (len(steps) - right)


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
    demonstrated = {p["question"] for p in reproduce.demonstrated(0, 0, 7000)}
    assert demonstrated < seen


# ---------------------------------------------------------------- changes of what is trained on


def a_tree():
    """The root; below it step 1, drawn three times, with a right and a wrong end, and step 4, a wrong end
    that was drawn twice."""
    tree = mcts.Tree("q", "a", prompt=[1])
    tree.add(mcts.Node(0, [2, 3], -1.0, text="x", count=3))
    for parent, reward, count in ((1, 1, 1), (1, -1, 4), (0, -1, 2)):
        i = tree.add(mcts.Node(parent, [4], -2.0, reward=reward, terminal=True, count=count))
        mcts.backup(tree, i)
    return tree


def test_values_that_weigh_as_often_as_drawn():
    means = reproduce.weighed(a_tree())
    assert means[1:] == pytest.approx([(1 - 4) / 5, 1, -1, -1])
    assert means[0] == pytest.approx((3 * means[1] - 2) / 5)
    assert a_tree().nodes[0].value == pytest.approx(-1 / 3)         # merged


def test_soft_value():
    """beta_1 log mean exp(r / beta_1), the right end having chance 3/5 * 1/5; it tends to the mean."""
    chance = 3 / 25
    expected = 0.5 * math.log(chance * math.exp(2) + (1 - chance) * math.exp(-2))
    assert reproduce.soft_value(a_tree(), 0.5) == pytest.approx(expected)
    assert reproduce.soft_value(a_tree(), 1000) == pytest.approx(2 * chance - 1, abs=1e-3)


def grown(iterations):
    """A tree of the search without a model: the samples of a leaf depend on its path only."""
    tree = mcts.Tree("q", "a", prompt=[1])

    def outcome(tokens):
        return (1 if sum(tokens) % 3 == 0 else -1), True

    leaves = mcts.grow(tree, outcome, iterations=iterations, breadth=4, depth=5, c_puct=1.5)
    leaf = next(leaves, None)
    while leaf is not None:
        rng = dvo.generator(0, *(tree.nodes[i].tokens for i in tree.path(leaf)))
        tokens = rng.integers(2, 9, size=4).tolist()
        ends = rng.choice(["step", "answer"], size=4).tolist()
        samples = [mcts.Sample([t], [-0.1 * t], str(t), end) for t, end in zip(tokens, ends)]
        leaf = next(iter_of(leaves, samples), None)
    return tree


def iter_of(leaves, samples):
    """The next leaf that `leaves` asks for, if any."""
    with contextlib.suppress(StopIteration):
        yield leaves.send(samples)


@pytest.fixture(scope="module")
def tree():
    found = grown(20)
    assert min(map(len, reproduce.ended_paths(found, 4, 0))) >= 4
    return found


def test_a_longer_search_goes_on_with_the_same_tree(tree):
    for iterations in (1, 5, 12):
        younger = reproduce.cut(tree, iterations)
        assert len(younger.nodes) < len(tree.nodes)
        assert list(map(vars_of, younger.nodes)) == list(map(vars_of, grown(iterations).nodes))


def vars_of(node):
    return [getattr(node, name) for name in mcts.STORED]


def test_paths_apart_keep_their_credits(tree):
    """Same credits along each path; so nothing but the credits differs in the controls."""
    right, wrong = dvo.draw_paths(tree, 4, seed=0)
    apart = reproduce.apart(tree, right + wrong, rearrange=list)
    new_right, new_wrong = reproduce.ended_paths(apart, 4, seed=0)
    assert sum(map(len, new_right + new_wrong)) == len(apart.nodes) - 1
    for old, new in zip(right + wrong, new_right + new_wrong):
        assert [apart.credit(i) for i in new] == pytest.approx([tree.credit(i) for i in old])
        assert [apart.nodes[i].tokens for i in new] == [tree.nodes[i].tokens for i in old]


@pytest.mark.parametrize("method", ["dvo-even", "dvo-permuted"])
def test_controls_of_the_place_keep_the_sum(tree, method):
    usual = reproduce.make_example(tree, Settings())
    example = reproduce.make_example(tree, Settings(method))
    assert example.path @ example.credit == pytest.approx(usual.path @ usual.credit, abs=1e-6)
    per_path = [example.credit[on_path > 0] for on_path in example.path]
    before = [usual.credit[on_path > 0] for on_path in usual.path]
    for credits, old in zip(per_path, before):
        if method == "dvo-even":
            assert credits.tolist() == pytest.approx([float(old.mean())] * len(old), abs=1e-6)
        else:
            assert sorted(credits.tolist()) == pytest.approx(sorted(old.tolist()), abs=1e-6)
    moved = [not torch.allclose(credits, old, atol=1e-3) for credits, old in zip(per_path, before)]
    assert any(moved)


def test_the_form_of_a_star(tree):
    """The response level with V* at the root: its targets are r - V*."""
    example = reproduce.make_example(tree, Settings("a-star", beta_1=0.5))
    soft = reproduce.soft_value(tree, 0.5)
    assert example.path @ example.credit == pytest.approx(example.outcome - soft, abs=1e-6)


def test_paths_of_few_iterations_with_the_values_of_many(tree):
    younger = reproduce.cut(tree, 12)
    example = reproduce.make_example(tree, Settings(), source=younger)
    assert example is not None and len(example.value) == len(younger.nodes) < len(tree.nodes)
    for i, node in enumerate(younger.nodes):
        assert float(example.value[i]) == pytest.approx(0 if node.terminal else tree.nodes[i].value)


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
        return -abs(math.log(s.lr / self.best)) - (s.beta != liked) / 10


@pytest.mark.parametrize("best", [1e-4, 1e-3, 3e-5, 3e-6, 3e-3, 1e-6])
def test_the_grid_is_widened_until_the_best_lies_inside(best, tmp_path):
    cells = Landscape(tmp_path, best)
    chosen = reproduce.tune(cells, [0, 1, 2, 3, 4], Settings())
    rates = {s.lr for s in cells.asked}
    assert chosen.lr == best and chosen.beta == 0.1
    assert best == reproduce.GRID[0] or min(rates) < best < max(rates)


def test_all_seeds_choose(tmp_path):
    """The two tuning seeds like beta 0.03 better, the other three 0.1."""
    cells = Landscape(tmp_path, 3e-4, beta=0.03)
    best = reproduce.tune(cells, [0, 1, 2, 3, 4], Settings())
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
        return {"right": (rng.random(400) < share).astype(int).tolist()}

    def base(self, s):
        return self.test(Settings("rft", seed=s.seed))

    def train(self, s):
        return {"dev": -abs(math.log(s.lr / 1e-4)), "tokens": 1000, "curve": [[0.0, 0.0]]}

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
        for i, fresh in enumerate((0.0, 0.5, 1.0)):
            place = {"question": "q", "parent": -1, "depth": 0, "fresh": fresh}
            states.append(place | {"search": fresh, "multiplicity": fresh, "critic": 0.1 * i + s.seed / 10})
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
    assert reproduce.auc([1, 2], [3, 4]) == 1 and reproduce.auc([3, 4], [1, 2]) == 0
    assert reproduce.auc([1], [1, 1]) == 0.5 and reproduce.auc([1, 3], [2, 4]) == 0.75


def test_interval_of_paired_differences():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 4.303."""
    found = reproduce.interval([1, 2, 3])
    half = 4.303 / 3 ** 0.5
    assert found["mean"] == 2
    assert found["high"] - 2 == pytest.approx(half)


def test_bootstrap_draws_questions():
    """Of n questions a share p differs by one: the interval is that of a binomial share."""
    a = np.zeros((3, 400))
    a[:, :100] = 1
    low, high = reproduce.bootstrap(a, np.zeros_like(a))
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (low, high) == (pytest.approx(0.25 - half, abs=0.005), pytest.approx(0.25 + half, abs=0.005))


def test_value_accuracy_of_known_states():
    root = {"question": "q", "parent": -1, "depth": 0, "fresh": 0.5, "search": 0.25}
    states = [root]
    for fresh, search in ((0.0, 0.5), (0.5, 0.4), (1.0, 1.0)):
        states.append({"question": "q", "parent": 0, "depth": 1, "fresh": fresh, "search": search})
    assert reproduce.pairs_ranked(states, "search") == pytest.approx(2 / 3)
    assert reproduce.absolute_error(states, "search") == pytest.approx((0.5 + 0.1 + 0 + 0.25) / 4)
    assert reproduce.root_error(states, "search") == -0.25


def test_a_report_runs_nothing_and_says_what_is_missing(tmp_path):
    cells = reproduce.Cells(tmp_path, may_run=False)
    with pytest.raises(reproduce.Missing):
        cells.each("base", [Settings()])
    assert reproduce.summarise(cells, [0, 1], reproduce.PARTS) == {}
    lines = [*reproduce.table_of_methods({}), *reproduce.table_of_claims({})]
    assert all("not run" in line for line in lines if line[2:].startswith(("DVO", "KTO", "also")))
    cells.path("base", Settings()).write_text(json.dumps({"right": [1, 0]}))
    assert cells.each("base", [Settings()]) == [{"right": [1, 0]}]
    cells.path("train", Settings(lr=1e-3)).write_text(json.dumps({"dev": 0.5}))
    assert reproduce.sweep(cells) == {"train lr=0.001": 0.5}
