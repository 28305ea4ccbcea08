"""What the search promises: where steps end, what a tree counts, and that the engine below changes nothing.

    python -m pytest -q tests/test_mcts.py          # half a minute on one core, no download, no GPU needed

Trees come from three sources: steps written by hand (every expected number is worked out next to it), random
outcomes, and tiny random models (see tiny.py). The yardstick of the engine is `plain_logprobs`: one forward
of the bare model without any cache.
"""
import collections
import dataclasses
import doctest
import io
import json
import math
import os
import random
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
from pytest import approx as about
from safetensors.torch import load_file, save_file

import tiny
import eval as tasks
import mcts
from mcts import MARKER, Format, InputError, Job, Node, Sample, Tree

QUESTIONS = ["Add",                                                 # a prompt of one token
             "Add 3 to 4.", "What is 5 + 2?", "Take 5 from 12. Then double it.",
             "First, add 3 to 4. Then take 5 from 12 and multiply by 2. Is the sum even (as asked)? " * 2]
PROBLEMS = [{"question": q, "answer": "7"} for q in QUESTIONS]
BARE = Format(instruction="")                                     # the prompt is the question
SETTINGS = dict(iterations=25, breadth=3, depth=5, max_step_tokens=12, format=BARE)


def reward(text, answer):
    """A toy grader: right if the response names an answer and the gold one is somewhere in it."""
    return 1 if MARKER in text and answer in text else -1


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def lm():
    """In float64, where the batch cannot flip a token: results can be compared exactly."""
    return tiny.model("llama", torch.float64)


@pytest.fixture(scope="module")
def trees(lm, tok):
    """The trees of QUESTIONS, by question."""
    return grown(lm, tok)


def grown(lm, tok, problems=PROBLEMS, **settings):
    return {t.question: t for t in mcts.search(lm, tok, problems, reward, **{**SETTINGS, **settings})}


@torch.no_grad()
def plain_logprobs(lm, prompt, tokens):
    """log-prob of each of `tokens` after `prompt` by the bare model, no cache."""
    logits = lm(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1:-1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def leaves(tree):
    return [i for i, node in enumerate(tree.nodes) if i and not node.children]


def path_tokens(tree, i):
    return [t for j in tree.path(i) for t in tree.nodes[j].tokens]


# ---------------------------------------------------------------- where a step ends


def test_the_tokenizer_merges_blank_lines(tok):
    """The premise of the tests below: blank lines hide inside tokens, whole and in halves."""
    assert tok.tokenize("7.\n\n") == ["7", ".ĊĊ"] and tok.tokenize("7\n") == ["7", "Ċ"]
    assert tok.convert_ids_to_tokens(tok(f"{MARKER} 7\n\n").input_ids) == [MARKER, " 7", "ĊĊ"]


def row_of():
    return mcts.Row(Job([]), 0, 0, 0, None, 0)


@pytest.mark.parametrize("step_end", ["\n\n", "\n", ". "])
def test_step_ends_against_plain_text(lm, tok, step_end):
    """Fed token by token, the texts of single tokens must find the end that decoding the text so far finds."""
    ending = mcts.Engine(lm, tok, slots=1, siblings=1, max_tokens=99, format=Format(step_end=step_end)).ending
    size, rng = len(tok) + tiny.SPARE, random.Random(0)
    text = [tok.decode([i], skip_special_tokens=True) for i in range(size)]   # "" beyond the tokenizer
    spaces = [i for i in range(size) if step_end[0] in text[i] or not text[i].strip()]
    rows = [[rng.choice(spaces) if rng.random() < share else rng.randrange(size) for _ in range(14)]
            for share in (0.1, 0.3, 0.6, 0.9) for _ in range(250)]

    def end_of(tokens):                         # the rule: the first prefix that holds it after some text
        for n in range(1, len(tokens) + 1):
            text = tok.decode(tokens[:n], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if step_end in text.lstrip():
                return n
        return None

    def found(tokens):
        row = row_of()
        for n, row.newest in enumerate(tokens, 1):
            if ending.step_ends(row):
                return n
        return None

    assert list(map(found, rows)) == list(map(end_of, rows))
    assert None in map(found, rows) and len(set(map(found, rows))) > 10, "too few different ends"


@pytest.mark.parametrize("declared, expected", [([0, 1], {0, 1}), (1, {0, 1}), (None, {0}), (0, {0})])
def test_eos_ids(tok, declared, expected):
    """Every EOS of the generation config counts, and the tokenizer's."""
    lm = tiny.model()
    lm.generation_config.eos_token_id = declared
    assert mcts.eos_tokens(lm, tok) == expected


def only_sample(lm, tok, said="", prompt="Add 3.", limit=8, **settings):
    """The one sample that an engine draws after `prompt` and what was said."""
    engine = mcts.Engine(lm, tok, slots=1, siblings=1, max_tokens=limit, **settings)
    prompt, said = tok(prompt).input_ids, tok(said).input_ids
    path = [(bytes(16), prompt), (bytes(16), said)][:2 if said else 1]
    engine.submit(Job(path, said, mcts.thinking(tok, prompt)))
    while not (done := engine.step()):
        pass
    return done[0].samples[0]


# What the policy writes; how a step ends and how a whole response does: (end, tokens used).
LIMIT = 8
SCRIPTS = [
    # script                                               one step         whole response
    (["So", ".\n\n"],                                      ("step", 2),     ("cut", LIMIT)),   # merged
    (["So", "\n", "\n"],                                   ("step", 3),     ("cut", LIMIT)),   # in two tokens
    (["So", ".\n", "\n"],                                  ("step", 3),     ("cut", LIMIT)),
    (["So", "\n", " 7", "\n", " ", "\n", "\n"],            ("step", 7),     ("cut", LIMIT)),   # not "\n \n"
    (["\n\n", "So", "\n\n"],                               ("step", 3),     ("cut", LIMIT)),   # not the first
    (["\n", "\n", " ", "\n\n", "So", "\n\n"],              ("step", 6),     ("cut", LIMIT)),
    (["So", " 7", " 7", " 7", " 7", " 7", " 7", "\n\n"],   ("step", 8),     ("cut", 8)),       # just in time
    (["So"] * LIMIT,                                       ("cut", LIMIT),  ("cut", LIMIT)),
    (["\n\n"] * LIMIT,                                     ("cut", LIMIT),  ("cut", LIMIT)),
    (["So", tiny.END],                                     ("eos", 2),      ("eos", 2)),
    ([tiny.TURN],                                          ("eos", 1),      ("eos", 1)),       # the second
    (["So"] * 7 + [tiny.END],                              ("eos", 8),      ("eos", 8)),
    ([MARKER, " 7", ".\n\n"],                              ("answer", 3),   ("answer", 3)),
    (["Final", " Answer", ":", " 7", "\n", "\n"],          ("answer", 6),   ("answer", 6)),    # in pieces
    ([MARKER, "\n\n", " 7", "\n\n"],                       ("answer", 4),   ("answer", 4)),    # not the first
    ([MARKER, "\n", "\n", "\n\n", "7", "\n", "\n"],        ("answer", 7),   ("answer", 7)),
    ([MARKER] + ["\n\n"] * 7,                              ("cut", LIMIT),  ("cut", LIMIT)),   # still none
    ([MARKER, " 7", tiny.END],                             ("eos", 3),      ("eos", 3)),
    (["So", "\n\n", MARKER, " 7", "\n\n"],                 ("step", 2),     ("answer", 5)),
    ([MARKER, ":", "\n\n", " 7", "\n\n"],                  ("answer", 5),   ("answer", 5)),    # still to come
    ([MARKER, "\\", "[", "\n\n", "7", "\n\n"],             ("answer", 6),   ("answer", 6)),
]


@pytest.mark.parametrize("whole", [False, True], ids=["step", "whole"])
@pytest.mark.parametrize("script, step, response", SCRIPTS)
def test_ends(lm, tok, monkeypatch, script, step, response, whole):
    """A policy that writes `script` and then " 7" for ever must stop where the table says."""
    ids = [i for piece in script for i in tok(piece).input_ids]
    words = iter(ids + tok(" 7").input_ids * LIMIT)
    monkeypatch.setattr(mcts, "pick", lambda logits, *_: (torch.tensor([next(words)]), torch.tensor([-0.5])))
    sample, (end, used) = only_sample(lm, tok, whole=whole), response if whole else step
    assert (sample.end, len(sample.tokens)) == (end, used)
    assert sample.tokens[:len(ids)] == ids[:used]
    assert sample.text == tok.decode(sample.tokens, skip_special_tokens=True)
    assert sample.logprobs == [-0.5] * used and sample.logprob == -0.5 * used


# ---------------------------------------------------------------- the algorithm, on steps written by hand


WORDS = []                                      # a vocabulary in which every step is one token


def said(text, p, end="step"):
    """A Sample of one token of probability p, so that its prior is p."""
    if text not in WORDS:
        WORDS.append(text)
    return Sample([WORDS.index(text)], [math.log(p)], text, end)


def right(p):
    return said("Final Answer: 4", p, "answer")


def wrong(p):
    return said("Final Answer: 5", p, "answer")


def spell(tokens):
    return "".join(WORDS[t] for t in tokens)


def outcome(tokens):
    """(reward, valid) of a response to 2 + 2."""
    text = spell(tokens)
    return reward(text, "4"), MARKER in text


def play(policy, **settings):
    """Run `grow` on policy(name of the leaf) -> Samples. Returns the tree and the leaves in their order."""
    settings = dict(iterations=10, breadth=2, depth=8, c_puct=1.0) | settings
    tree, order = Tree("2 + 2?", "4", [0]), []
    search = mcts.grow(tree, outcome, **settings)
    try:
        leaf = next(search)
        while True:
            order.append(tree.nodes[leaf].text or "root")
            leaf = search.send(policy(order[-1]))
    except StopIteration:
        return tree, order


def counts(tree):
    """text -> (N, V) of the inner steps."""
    return {n.text or "root": (n.visits, n.value) for n in tree.nodes if not n.terminal}


def test_a_search_by_hand():
    """Depth limit 3: every visit, value, reward and flag, and the end of the search when nothing is left."""
    policy = {"root": [said("A", 0.5), said("B", 0.25)],
              "A": [right(0.5), said("A2", 0.25)],
              "A2": [said("too deep", 0.5), wrong(0.25)],
              "B": [said("I give up", 0.5, "eos"), right(0.25)]}
    tree, order = play(policy.get, depth=3, iterations=10)
    # 1 root gets A and B; nothing ended.                                              root N 0
    # 2 all scores are 0: A has the larger prior.                                      root N 1  V +1
    # 3 A 1 + 0.5 * 1/2 = 1.25, B 0.25 * 1: A; its answer is skipped: A2.              root N 3  V -1/3
    # 4 A has ended everywhere: B.                                                     root N 5  V -1/5
    # 5 nothing is left: the search ends, 6 iterations early.
    assert order == ["root", "A", "A2", "B"]
    assert counts(tree) == {"root": (5, about(-1 / 5)), "A": (3, about(-1 / 3)), "A2": (2, -1), "B": (2, 0)}
    ended = {n.text + " of " + tree.nodes[n.parent].text: (n.reward, n.valid, n.visits, n.value)
             for n in tree.nodes if n.terminal}
    assert ended == {"Final Answer: 4 of A": (1, True, 1, 1), "too deep of A2": (-1, False, 1, -1),
                     "Final Answer: 5 of A2": (-1, True, 1, -1), "I give up of B": (-1, False, 1, -1),
                     "Final Answer: 4 of B": (1, True, 1, 1)}
    assert [n.depth for n in tree.nodes] == [0, 1, 1, 2, 2, 3, 3, 2, 2]
    assert [n.reward for n in tree.nodes if not n.terminal] == [0] * 4
    # Credits of the path A, A2, wrong answer: -1/3 + 1/5,  -1 + 1/3,  -1 + 1
    assert [tree.credit(i) for i in tree.path(6)] == about([-2 / 15, -2 / 3, 0])


def two_branches(leaf):
    """L (prior 0.6) always fails and R (0.4) always succeeds, and either goes on for ever."""
    if leaf == "root":
        return [said("L", 0.6), said("R", 0.4)]
    return [wrong(0.5) if leaf[0] == "L" else right(0.5), said(leaf + "'", 0.25)]


@pytest.mark.parametrize("c_puct, expected", [
    # Scores V + c * prior * sqrt(N(root)) / (1 + N), after "root" and "L" (the larger prior):
    # c   3rd: L      R        4th: L      R        5th: L      R
    # 0       -1      0            -1      1            -1      1
    (0, ["root", "L", "R", "R'", "R''"]),
    # 1       -0.70   0.40         -0.58   1.28         -0.48   1.23
    (1, ["root", "L", "R", "R'", "R''"]),
    # 8        1.40   3.20          2.39   3.26          3.16   2.85   (below L only L' is open)
    (8, ["root", "L", "R", "R'", "L'"]),
])
def test_order_of_expansion(c_puct, expected):
    """A larger c returns to the failing branch with the larger prior earlier."""
    assert play(two_branches, c_puct=c_puct, iterations=5)[1] == expected


@pytest.mark.parametrize("c, N, children, chosen", [
    # (V, N, prior) a child                                    scores V + c * prior * sqrt(N) / (1 + N(child))
    (0, 9, [(0.5, 4, 0.1), (0.2, 5, 0.9)], 0),                 # 0.5    0.2
    (1, 9, [(0.5, 4, 0.1), (0.2, 5, 0.9)], 1),                 # 0.56   0.65
    (1, 9, [(0.5, 8, 0.6), (0.0, 0, 0.2)], 0),                 # 0.7    0.6: Q of an unvisited child is 0
    (1.5, 9, [(0.5, 8, 0.6), (0.0, 0, 0.2)], 1),               # 0.8    0.9
    (1, 9, [(-0.5, 8, 0.6), (0.0, 0, 0.1)], 1),                # -0.3   0.3
    (5, 0, [(0, 0, 0.25), (0, 0, 0.5), (0, 0, 0.125)], 1),     # all 0: the larger prior
    (1, 4, [(0.5, 1, 0.25), (0.25, 1, 0.5)], 1),               # 0.75 both: the larger prior
    (1, 4, [(0.25, 1, 0.5), (0.5, 1, 0.25)], 0),
    (1, 9, [(1, 1, 0.9, "terminal"), (-1, 8, 0.1)], 1),        # an ended child is never chosen, however good
    (1, 9, [(1, 4, 0.9, "exhausted"), (-1, 4, 0.1)], 1),
])
def test_select(c, N, children, chosen):
    tree = Tree("", "", [0])
    tree.nodes[0].visits = N
    for V, visits, prior, *flag in children:
        tree.add(Node(0, [0], math.log(prior), visits, V, **{f: True for f in flag}))
    assert mcts.select(tree, c) == 1 + chosen


def test_nothing_left_to_select():
    """A root whose children have all ended has no leaf; a fresh root is one."""
    tree = Tree("", "", [0])
    assert mcts.select(tree, 1.0) == 0
    tree, order = play(lambda leaf: [right(0.5), said("stuck", 0.25, "cut")])
    assert order == ["root"] and mcts.select(tree, 1.0) is None and counts(tree) == {"root": (2, 0)}


@pytest.mark.parametrize("iterations", [1, 3])
def test_iterations_are_expansions(iterations):
    assert len(play(two_branches, iterations=iterations)[1]) == iterations


@pytest.mark.parametrize("breadth, drawn, kept", [
    # Kept: the most probable, in the order in which they were drawn.
    (2, [("a", 0.1), ("b", 0.3), ("c", 0.2)], ["b", "c"]),
    (2, [("c", 0.2), ("a", 0.1), ("b", 0.3)], ["c", "b"]),
    (5, [("a", 0.1), ("b", 0.3)], ["a", "b"]),
    # A duplicate takes no place, but the same text with another ending is another action.
    (2, [("a", 0.5), ("a", 0.5), ("b", 0.1)], ["a", "b"]),
    (3, [("a", 0.5), ("a", 0.4, "eos"), ("a", 0.3, "cut"), ("a", 0.3, "cut")], ["a", "a", "a"]),
])
def test_which_samples_become_children(breadth, drawn, kept):
    tree, _ = play(lambda leaf: [said(*s) for s in drawn], breadth=breadth, iterations=1)
    assert [tree.nodes[i].text for i in tree.nodes[0].children] == kept


def test_the_most_probable_step_is_that_of_the_summed_logprob():
    """Four tokens of 0.7 are less probable (0.24) than one of 0.3, though their prior is larger."""
    long = Sample([0] * 4, [math.log(0.7)] * 4, "long", "step")
    tree, _ = play(lambda leaf: [long, said("short", 0.3)], breadth=1, iterations=1)
    assert tree.nodes[1].text == "short"
    assert Node(0, long.tokens, long.logprob).prior == about(0.7)


def test_duplicates_of_other_tokens_merge():
    """One text by two tokenisations is one action: the first drawn stands for both, with its own log-prob."""
    first, second = Sample([1, 2], [-1.0, -1.0], "same", "step"), Sample([3], [-0.5], "same", "step")
    tree, _ = play(lambda leaf: [first, second], iterations=1)
    assert [(n.tokens, n.logprob) for n in tree.nodes[1:]] == [([1, 2], -2.0)]


@pytest.mark.parametrize("sample, depth, expected", [
    # how a step ended                               depth limit    (terminal, reward, valid)
    (("So 4", "step"),                               2, (False, 0, True)),
    (("So 4", "step"),                               1, (True, -1, False)),    # no room for another step
    (("Final Answer: 4", "answer"),                  1, (True, 1, True)),      # the last step may be one
    (("Final Answer: 5", "answer"),                  2, (True, -1, True)),
    (("Final Answer: 4", "eos"),                     2, (True, 1, True)),
    (("Final Answer: 5", "eos"),                     2, (True, -1, True)),
    (("It is 5", "eos"),                             2, (True, -1, False)),    # EOS without an answer
    (("Final Answer: 4", "cut"),                     2, (True, -1, False)),    # who knows how it went on
])
def test_outcomes(sample, depth, expected):
    text, end = sample
    tree, _ = play(lambda leaf: [said(text, 0.5, end)], depth=depth, iterations=1)
    node = tree.nodes[1]
    assert (node.terminal, node.reward, node.valid) == expected
    assert (node.visits, tree.nodes[0].visits) == (int(node.terminal), int(node.terminal))
    assert node.value == tree.nodes[0].value == node.reward


def test_duplicates_are_counted():
    """They are one action, but what the policy would do stays known."""
    drawn = [said("a", 0.5), said("b", 0.2), said("a", 0.5), said("a", 0.5, "eos")]
    tree, _ = play(lambda leaf: drawn, breadth=3, iterations=1)
    assert [(n.text, n.count) for n in tree.nodes[1:]] == [("a", 2), ("b", 1), ("a", 1)]


# ---------------------------------------------------------------- what holds in every tree


def wild(seed):
    """A tree of random outcomes and random settings."""
    rng = random.Random(seed)
    kinds = [lambda p: said(f"step {rng.randrange(6)}", p)] * 4
    kinds += [right, wrong, lambda p: said("?", p, "eos"), lambda p: said("...", p, "cut")]
    policy = lambda leaf: [rng.choice(kinds)(rng.uniform(0.01, 1)) for _ in range(6)]
    return play(policy, iterations=rng.randint(1, 40), breadth=rng.randint(1, 5), depth=rng.randint(1, 6),
                c_puct=rng.choice([0, 0.5, 1.5, 10]))[0]


@pytest.mark.parametrize("source", ["random outcomes", "model"])
def test_identities(source, trees):
    """The two identities of the method, and the counts that they stand on."""
    trees = [wild(seed) for seed in range(60)] if source == "random outcomes" else list(trees.values())
    for tree in trees:
        nodes = tree.nodes
        assert nodes[0].visits == sum(n.terminal for n in nodes), "an outcome was lost or counted twice"
        for i, node in enumerate(nodes):
            credits = [tree.credit(j) for j in tree.path(i)]
            if node.terminal:
                assert (node.visits, node.value, node.children) == (1, node.reward, []), "visited again"
                assert sum(credits) == about(node.reward - nodes[0].value), "credits must telescope"
            else:
                assert sum(credits) == about(node.value - nodes[0].value) or i == 0
                visited = [nodes[j] for j in node.children if nodes[j].visits]
                assert node.visits == sum(n.visits for n in visited)
                if visited:                     # V(s) = sum_a N(s') (r + V(s')) / sum_a N(s')
                    after = sum(n.visits * (n.reward + (0 if n.terminal else n.value)) for n in visited)
                    assert node.value == about(after / node.visits)
            assert node.valid or node.terminal and node.reward == -1
            assert i == 0 or node.parent < i and i in nodes[node.parent].children
            done = node.children and all(nodes[j].terminal or nodes[j].exhausted for j in node.children)
            assert node.exhausted == bool(done)
    everything = [n for tree in trees for n in tree.nodes]
    kinds = {(n.terminal, n.reward, n.valid) for n in everything}
    assert kinds == {(False, 0, True), (True, 1, True), (True, -1, True), (True, -1, False)}
    assert any(-1 < n.value < 1 and n.visits for n in everything)


# ---------------------------------------------------------------- the engine: the numbers of the bare model


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_stored_logprobs_are_those_of_the_bare_model(kind, tok):
    """In float32, for every node of every tree; prompts of very different lengths share the batch. A larger
    difference means a wrong key, value or position. (Other architectures: test_models.py.)"""
    lm, kept, inner, eos = tiny.model(kind, torch.float32), 0, 0, set()
    for tree in grown(lm, tok, slots=3).values():
        for i in leaves(tree):
            logprobs = plain_logprobs(lm, tree.prompt, path_tokens(tree, i))
            for j in tree.path(i):
                tokens = tree.nodes[j].tokens
                assert sum(logprobs[:len(tokens)]) == about(tree.nodes[j].logprob, abs=1e-3)
                logprobs = logprobs[len(tokens):]
                kept, inner, eos = kept + 1, inner + (tree.nodes[j].depth > 2), eos | {tokens[-1]} & {0, 1}
    assert kept > 60 and inner > 10 and eos, "too little was grown to prove anything"


VARIANTS = {"1 slot": dict(slots=1), "3 slots": dict(slots=3), "16 slots": dict(slots=16),
            "one job at a time": dict(kv_budget=90_000), "little kept": dict(kv_budget=150_000, slots=2),
            "other order": dict(problems=PROBLEMS[::-1], slots=2), "alone": dict(problems=PROBLEMS[3:4])}


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_same_trees(variant, lm, tok, trees):
    """Neither the batch, nor the memory, nor the other questions change a tree."""
    for question, tree in grown(lm, tok, **VARIANTS[variant]).items():
        got, expected = json.loads(tree.to_json()), json.loads(trees[question].to_json())
        for a, b in zip(got["nodes"], expected["nodes"]):
            assert a.pop("logprob") == about(b.pop("logprob"), abs=1e-9)
        assert got == expected


@pytest.mark.parametrize("settings", [dict(), dict(kv_budget=90_000, slots=2)], ids=str)
def test_how_the_work_is_cut_changes_no_tree(settings, lm, tok, trees, monkeypatch):
    """Three siblings at two a slot of the cache, whose parts then start and end on their own; hardly any room
    at the start, so that slots are widened and jobs sent back again and again."""
    monkeypatch.setattr(mcts.Engine, "SHARE", 2)
    monkeypatch.setattr(mcts.Scheduler, "HEADROOM", 1)
    for question, tree in grown(lm, tok, **settings).items():
        assert len(tree.nodes) == len(trees[question].nodes)
        for a, b in zip(tree.nodes, trees[question].nodes):
            assert (a.tokens, a.visits, a.logprob) == (b.tokens, b.visits, about(b.logprob, abs=1e-9))


def test_other_seed_other_trees(lm, tok, trees):
    for question, tree in grown(lm, tok, seed=1).items():
        assert [n.tokens for n in tree.nodes] != [n.tokens for n in trees[question].nodes]


def test_more_iterations_continue_the_same_tree(lm, tok, trees):
    """A short search is the beginning of a long one: the randomness belongs to the path, not to the clock."""
    for question, tree in grown(lm, tok, iterations=4).items():
        tokens = [n.tokens for n in tree.nodes]
        assert tokens == [n.tokens for n in trees[question].nodes[:len(tokens)]]


@pytest.fixture
def engines(monkeypatch):
    """Every Engine made in a test; each checks its books at every step."""
    made = []

    class Audited(mcts.Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.bytes = 0                      # of keys and values, at most
            made.append(self)

        def step(self):
            jobs = super().step()
            kept = sum(block.nbytes for segment in self.store.segments.values() for block in segment)
            assert self.store.stored == kept
            self.bytes = max(self.bytes, kept + self.cache.nbytes)
            return jobs

    monkeypatch.setattr(mcts, "Engine", Audited)
    return made


def test_nothing_is_computed_twice(lm, tok, engines):
    """With memory to spare a prompt is prefilled once, all but its last token, and a step never."""
    trees = grown(lm, tok, PROBLEMS[1:], slots=2)
    stats = engines[0].stats
    assert stats["prefilled"] == sum(len(tree.prompt) - 1 for tree in trees.values())
    assert stats["reused"] > 5 * stats["prefilled"]
    assert stats["sampled"] >= sum(len(node.tokens) for tree in trees.values() for node in tree.nodes)


@pytest.mark.parametrize("whole", [False, True])
def test_what_all_prompts_begin_with_is_computed_once(whole, lm, tok, engines):
    """An instruction, or worked examples: not once a question, and not forgotten with the first tree."""
    format = Format(prompt=lambda tokenizer, question: f"Start with 4. Add 3. {question}")
    prompts = [mcts.build_prompt(tok, q, format=format) for q in QUESTIONS[1:]]
    if whole:
        mcts.sample(lm, tok, prompts, n=2, max_new_tokens=9, slots=1)
    else:
        grown(lm, tok, PROBLEMS[1:], slots=1, format=format)
    key, opening = engines[0].opening
    n = len(opening)
    assert n > 5 and all(p[:n] == opening for p in prompts)
    assert engines[0].stats["prefilled"] >= n - 1 + sum(len(p) - n for p in prompts[:2])
    if not whole:                               # those read later had another start
        assert engines[0].stats["prefilled"] == n - 1 + sum(len(p) - n for p in prompts)
    assert list(engines[0].store.segments) == [key]


def test_slots_move_without_a_loss():
    """What they hold survives every change of their width and number, and nothing else may be NaN."""
    rng = random.Random(0)
    cache = mcts.Cache([((2, 3), (2, 3)), ((1, 4), (2, 3))], slots=6, siblings=2, columns=120,
                       dtype=torch.float32, device=torch.device("cpu"))
    assert [tuple(block.shape) for block in cache.blocks] == [(3, 2, 120, 3), (1, 1, 120, 4)]
    for block in cache.blocks:
        block[:] = math.nan
    held = {}                                   # slot -> what it holds
    for _ in range(200):
        used = {slot: segment[0].shape[2] for slot, segment in held.items()}
        width = rng.randint(max(used.values(), default=1), 120 // max(1, len(held)))
        numbers = cache.resize(width, used)
        held = {numbers[slot]: segment for slot, segment in held.items()}
        for slot in list(held):
            if rng.random() < 0.4:
                del held[slot]
        free = [slot for slot in range(cache.room()) if slot not in held]
        if free:
            slot, n = rng.choice(free), rng.randint(1, width)
            held[slot] = [torch.randn(3, 2, n, 3), torch.randn(1, 1, n, 4)]
            cache.put(slot * width, [held[slot]])
        for slot, segment in held.items():
            for a, b in zip(cache.take(slot * width, segment[0].shape[2]), segment):
                assert torch.equal(a, b)
        assert not any(block[:, :, :cache.room() * width].isnan().any() for block in cache.blocks)


LONG = {"question": "Add 3 to 4. Then double it. " * 20, "answer": "7"}         # twenty times the others
SHORT = [{"question": f"Add {i} to 4.", "answer": "7"} for i in range(12)]


@pytest.mark.parametrize("columns", [350, 600, 5000])
def test_memory_is_bounded(lm, tok, engines, columns):
    """Live and stored, at every step, whatever the questions: a long one narrows the batch for a while."""
    budget = columns * 2 * 2 * 2 * 8 * 8        # bytes of a column: layers, K and V, heads, width, float64
    got = grown(lm, tok, SHORT + [LONG] + SHORT[:4], slots=4, kv_budget=budget)
    assert 0 < engines[0].bytes <= budget and len(got) == 13
    assert engines[0].store.stored == 0, "finished trees leave nothing behind"
    alone = grown(lm, tok, [LONG])[LONG["question"]]
    assert [n.tokens for n in got[LONG["question"]].nodes] == [n.tokens for n in alone.nodes]


def test_what_cannot_fit_alone_is_skipped(lm, tok, capsys):
    """With one sentence; the others are searched."""
    got = grown(lm, tok, [SHORT[0], LONG, SHORT[1]], slots=4, kv_budget=150 * 512)
    assert set(got) == {SHORT[0]["question"], SHORT[1]["question"]}
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "does not fit into the KV memory" in err and LONG["question"][:40] in err
    assert mcts.sample(lm, tok, [SHORT[0]["question"]], kv_budget=0) == [[]]


def test_jobs_that_gave_up_their_slot_draw_the_same(lm, tok, engines, monkeypatch):
    """Eight whole responses in memory for three: the youngest start again, and nobody can tell."""
    draw = lambda budget: [[s.tokens for s in samples] for samples in mcts.sample(
        lm, tok, PROMPTS, n=2, max_new_tokens=40, slots=4, kv_budget=budget)]
    monkeypatch.setattr(mcts.Scheduler, "HEADROOM", 4)
    backs = []
    monkeypatch.setattr(mcts.heapq, "heappush", lambda heap, item, push=mcts.heapq.heappush: (
        backs.append(item), push(heap, item)))
    assert draw(200 * 512) == draw(None)
    assert len(backs) > 2 * len(PROMPTS), "none was sent back"
    assert engines[0].stats["sampled"] == engines[1].stats["sampled"]


def test_finished_trees_leave_nothing_behind(lm, tok, engines):
    """Keys and values of a finished tree are of no use; those of thousands of trees would fill the memory."""
    grown(lm, tok, slots=2)
    assert engines[0].store.stored == 0
    assert set(engines[0].store.segments) <= {engines[0].opening[0]}


# ---------------------------------------------------------------- whole responses


PROMPTS = [QUESTIONS[1], QUESTIONS[4], QUESTIONS[0], QUESTIONS[3]]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_greedy_is_that_of_transformers(kind, tok):
    """Temperature 0 must write what `generate` writes, to the EOS or the answer."""
    ends, likely = set(), tiny.CHANCES | {MARKER: 12, tiny.END: 12, tiny.TURN: 12}
    for seed in range(3):
        lm = tiny.model(kind, torch.float64, seed, likely)
        responses = mcts.sample(lm, tok, PROMPTS, temperature=0, max_new_tokens=24)
        for prompt, (sample,) in zip(PROMPTS, responses):
            ids = tok(prompt, return_tensors="pt").input_ids
            out = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
                              pad_token_id=0)
            expected = out[0, ids.shape[1]:].tolist()
            assert sample.tokens == expected[:len(sample.tokens)]
            assert sample.end == "answer" or len(sample.tokens) == len(expected)
            assert (sample.end == "eos") == (sample.tokens[-1] in (0, 1))
            assert sample.logprobs == about(plain_logprobs(lm, ids[0].tolist(), sample.tokens), abs=1e-9)
            ends.add(sample.end)
    assert ends >= {"eos", "cut"}, "too few different ends to prove anything"


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampled_responses(temperature, lm, tok):
    """At any temperature log-probs are those at 1, EOS has one and comes last, and slots change nothing."""
    draw = lambda slots: mcts.sample(lm, tok, PROMPTS, n=8, temperature=temperature, max_new_tokens=30,
                                     slots=slots)
    responses, ends, eos = draw(3), set(), set()
    assert [len(samples) for samples in responses] == [8] * len(PROMPTS)
    for prompt, samples in zip(PROMPTS, responses):
        for s in samples:
            assert s.logprobs == about(plain_logprobs(lm, tok(prompt).input_ids, s.tokens), abs=1e-9)
            assert not {0, 1} & set(s.tokens[:-1]) and (s.tokens[-1] in (0, 1)) == (s.end == "eos")
            assert s.end != "cut" or len(s.tokens) == 30
            ends, eos = ends | {s.end}, eos | {s.tokens[-1]} & {0, 1}
    assert ends >= {"answer", "eos"} and eos == {0, 1}
    written = lambda responses: [[(s.tokens, s.end) for s in samples] for samples in responses]
    assert written(draw(1)) == written(draw(16)) == written(responses)


def test_prompts_as_text_or_tokens(lm, tok):
    ids = [tok(p).input_ids for p in PROMPTS]
    assert mcts.sample(lm, tok, PROMPTS, max_new_tokens=8) == mcts.sample(lm, tok, ids, max_new_tokens=8)
    assert mcts.sample(lm, tok, []) == []


def test_a_prompt_given_again_draws_other_samples(lm, tok):
    """The first draws what it would alone, the second is independent of it, and both are reproducible."""
    draw = lambda prompts: [[s.tokens for s in samples] for samples in mcts.sample(
        lm, tok, prompts, n=3, max_new_tokens=12)]
    first, other, second = draw([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert [first, other] == draw(PROMPTS[:2]) and draw([PROMPTS[0]] * 2) == [first, second]
    assert not any(tokens in first for tokens in second)


# ---------------------------------------------------------------- random numbers by key


def far(freedom):
    """The chi-squared value that chance exceeds once in 10,000 (by Wilson and Hilferty). Keys are fixed."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_squared(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def keyed_draws(logits, temperature=1.0, paths=5, length=50, n=80):
    """(paths, n, length) tokens drawn from one distribution, under the keys that a search would use."""
    path_keys = [mcts.hash_tokens(bytes(8), [i]) for i in range(paths)]
    words = [torch.tensor(mcts.draw_words(key, length, n)).reshape(-1, 2) for key in path_keys]
    hashes = mcts.hash_vocabulary(len(logits), "cpu")
    token, logprob = mcts.pick(logits.expand(paths * length * n, -1), torch.cat(words), hashes, temperature)
    assert torch.allclose(logprob, logits.log_softmax(-1)[token]), "log-probs are those at temperature 1"
    return token.view(paths, n, length)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [2, 8, 300])
def test_draws_follow_the_softmax(size, temperature):
    """20,000 keyed draws against softmax(logits / temperature)."""
    logits = 0.7 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    counts = keyed_draws(logits, temperature).flatten().bincount(minlength=size)
    assert chi_squared(counts, 20_000 * (logits / temperature).softmax(-1)) < far(size - 1)


@pytest.mark.parametrize("neighbours", ["siblings", "positions", "paths"])
def test_draws_of_neighbours_are_independent(neighbours):
    """Pairs of tokens one sibling, position or question apart fill a 4 x 4 table evenly; correlated siblings
    would be one sample counted five times."""
    axis = {"paths": 0, "siblings": 1, "positions": 2}[neighbours]
    tokens = keyed_draws(torch.zeros(4), paths=6).movedim(axis, 0)
    pairs = (4 * tokens[0::2] + tokens[1::2]).flatten().bincount(minlength=16)
    assert chi_squared(pairs, torch.full((16,), pairs.sum() / 16)) < far(15)


def test_a_key_does_not_depend_on_the_limit():
    """A longer step limit, or another batch, draws the same tokens."""
    key = mcts.hash_tokens(bytes(8), [1, 2, 3])
    assert np.array_equal(mcts.draw_words(key, 5, 3), mcts.draw_words(key, 9, 3)[:, :5])
    assert key != mcts.hash_tokens(bytes(8), [1, 2]) != mcts.hash_tokens(bytes(8), [2, 1])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_first_tokens_follow_the_model(temperature, lm, tok):
    """End to end: 4,000 samples of one token against the model's own distribution (rare tokens pooled)."""
    prompt = tok(QUESTIONS[1]).input_ids
    drawn = mcts.sample(lm, tok, [prompt], n=4000, temperature=temperature, max_new_tokens=1)[0]
    counts = torch.tensor([s.tokens[0] for s in drawn]).bincount(minlength=lm.config.vocab_size).double()
    with torch.no_grad():
        expected = 4000 * (lm(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    common = expected > 10
    pool = lambda x: torch.cat((x[common], x[~common].sum()[None]))
    assert chi_squared(pool(counts), pool(expected)) < far(int(common.sum()))
    assert common.sum() > 5


# ---------------------------------------------------------------- what is refused, and what is left as it was


@pytest.mark.parametrize("settings", [
    dict(breadth=0), dict(depth=0), dict(iterations=0), dict(candidates=2, breadth=3), dict(c_puct=-0.1),
    dict(c_puct=math.nan), dict(slots=0), dict(max_step_tokens=0), dict(kv_budget=-1)], ids=str)
def test_settings_out_of_range(settings, lm, tok):
    """Told at the call, not at the first tree, and by the name of the flag."""
    flag = "--" + next(iter(settings)).replace("_", "-")
    with pytest.raises(InputError, match=f"{flag} is"):
        mcts.search(lm, tok, PROBLEMS, reward, **settings)


@pytest.mark.parametrize("settings", [dict(n=0), dict(temperature=-1), dict(max_new_tokens=0), dict(slots=0)],
                         ids=str)
def test_sampling_settings_out_of_range(settings, lm, tok):
    with pytest.raises(InputError, match="must be at least"):
        mcts.sample(lm, tok, PROMPTS, **settings)


def test_prompts_longer_than_the_context_are_skipped(tok, capsys):
    """One of two prompts fills the context: it is named on stderr, and the other is searched all the same."""
    lm = tiny.model("llama", torch.float64, max_position_embeddings=48)
    short, long = PROBLEMS[1], PROBLEMS[4]
    assert list(grown(lm, tok, [long, short])) == [short["question"]]
    assert capsys.readouterr().err.count("\n") == 1
    empty, one = mcts.sample(lm, tok, [long["question"], short["question"]], max_new_tokens=4)
    assert empty == [] and len(one) == 1
    err = capsys.readouterr().err
    assert err.startswith("skipped: ") and "context of 48" in err and long["question"][:40] in err


def test_no_path_outgrows_the_context(tok):
    """A step that fills the context is cut: positions beyond were never trained; a learned table has none."""
    context, full = 20, 0
    lm = tiny.model("llama", torch.float64, max_position_embeddings=context)
    for seed in range(5):
        for tree in grown(lm, tok, PROBLEMS[:3], depth=9, seed=seed).values():
            for i in leaves(tree):
                size, node = len(tree.prompt) + len(path_tokens(tree, i)), tree.nodes[i]
                assert size <= context
                full += size == context
                assert size < context or node.terminal, "no step can follow"
    assert full > 5, "the limit was hardly reached"


def test_the_model_stays_as_it_is(lm, tok):
    """Between two trees and after an error: its own attention, gradients, the same logits."""
    def broken(text, answer):
        raise RuntimeError("the grader failed")

    own, ids = lm.config._attn_implementation, torch.tensor([tok(QUESTIONS[1]).input_ids])
    expected = lm(ids).logits
    for _ in mcts.search(lm, tok, PROBLEMS[:3], reward, **SETTINGS):
        logits = lm(ids).logits
        assert lm.config._attn_implementation == own
        assert logits.requires_grad and torch.equal(logits, expected)
    with pytest.raises(RuntimeError, match="grader"):
        list(mcts.search(lm, tok, PROBLEMS, broken, **SETTINGS))
    with torch.no_grad():
        mcts.sample(lm, tok, PROMPTS, max_new_tokens=2)
        assert not torch.is_grad_enabled()
    assert lm.config._attn_implementation == own and torch.is_grad_enabled()


def test_half_a_tree_by_other_weights_is_none(tok):
    """Training between two trees of one search is refused; between two searches it is not."""
    lm = tiny.model("llama", torch.float64)
    searching = mcts.search(lm, tok, PROBLEMS, reward, **SETTINGS)
    next(searching)
    with torch.no_grad():
        lm.lm_head.weight.mul_(1.01)
    with pytest.raises(InputError, match="weights changed"):
        list(searching)
    before = grown(lm, tok)
    engine = mcts.Engine(lm, tok, slots=3, siblings=3, max_tokens=12, format=BARE)
    again = dict(iterations=25, breadth=3, depth=5, engine=engine)
    assert len(list(mcts.search(lm, tok, PROBLEMS, reward, **again))) == len(PROBLEMS)
    lm.lm_head.weight.data.mul_(0.5)
    for layer in lm.model.layers:
        layer.self_attn.k_proj.weight.data.mul_(1.5)
    for tree in mcts.search(lm, tok, PROBLEMS, reward, **again):    # nothing old is used
        assert [n.tokens for n in tree.nodes] == [n.tokens for n in grown(lm, tok)[tree.question].nodes]
    assert [t.nodes[1].tokens for t in before.values()] != [t.nodes[1].tokens for t in grown(lm, tok).values()]


def test_threads_share_a_model(tok, trees):
    """Three searches at once, on a model that none of them has checked yet, find what one finds."""
    lm, found = tiny.model("llama", torch.float64), {}

    def work(n):
        found[n] = grown(lm, tok, slots=n + 1)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokens = lambda trees: {q: [n.tokens for n in tree.nodes] for q, tree in trees.items()}
    assert len(found) == 3 and all(tokens(f) == tokens(trees) for f in found.values())


def test_a_ready_engine(lm, tok, trees):
    """It can be looked at, serves one search after the other, and says for itself what it was made for."""
    engine = mcts.Engine(lm, tok, slots=3, siblings=3, max_tokens=12, format=BARE)
    settings = dict(iterations=25, breadth=3, depth=5)
    for _ in range(3):
        next(mcts.search(lm, tok, PROBLEMS, reward, engine=engine, **settings))     # and no more of it
        for tree in mcts.search(lm, tok, PROBLEMS, reward, engine=engine, **settings):
            expected = trees[tree.question]
            assert tree.config == expected.config
            assert [n.tokens for n in tree.nodes] == [n.tokens for n in expected.nodes]
    assert engine.stats["forwards"] > 50


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode(inside, lm, tok, trees):
    """A search that is made in inference mode goes on outside of it, and the other way round."""
    with torch.inference_mode(inside):
        searching = mcts.search(lm, tok, PROBLEMS, reward, **SETTINGS)
    with torch.inference_mode(not inside):
        for tree in searching:
            assert [n.tokens for n in tree.nodes] == [n.tokens for n in trees[tree.question].nodes]


class Wrapper(torch.nn.Module):
    """As dvo.Policy: a module whose forward is that of the LM in it."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.config, self.generation_config = lm, lm.config, lm.generation_config
        self.device = lm.device

    def forward(self, **inputs):
        return self.lm(**inputs)


def test_a_wrapped_model(lm, tok, trees):
    for question, tree in grown(Wrapper(lm), tok).items():
        assert [n.tokens for n in tree.nodes] == [n.tokens for n in trees[question].nodes]


def causal(T):
    seen = torch.ones(1, T, T, dtype=torch.bool).tril()
    return mcts.tree_attention(seen, torch.arange(T)[None])


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_our_attention_under_activation_checkpointing(kind):
    """The backward pass runs the layers again when the call has returned: with our attention, not its own."""
    lm = tiny.model(kind, torch.float64, **(dict(sliding_window=4) if kind == "mistral" else {}))
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens, T = torch.arange(5, 17)[None], torch.arange(12)
    seen = (T[:, None] >= T) & ((T[:, None] - T) % 2 == 0)          # not causal: its own would be wrong
    attention = mcts.tree_attention(seen[None], T[None])
    weights, gradients = list(lm.parameters()), []
    for checkpointing in False, True:
        lm.train()
        if checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        hidden = mcts.hidden_states(lm, tokens, T[None], attention)[0]
        loss = mcts.logits_of(lm)(hidden).log_softmax(-1)[:, 7].sum()
        gradients.append(torch.autograd.grad(loss, weights))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients))
    plain = torch.autograd.grad(lm(tokens).logits.log_softmax(-1)[0, :, 7].sum(), weights)
    assert not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients[0], plain))


def broken(lm, how):
    if how == "NaN":
        with torch.no_grad():
            lm.model.layers[1].mlp.up_proj.weight[3, 3] = math.nan
    if how == "eager":
        lm.set_attn_implementation("eager")
    if how == "dropout":
        lm.train()
        for layer in lm.model.layers:
            layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.5))
    return lm


@pytest.mark.parametrize("how, reason", [
    ("NaN", "NaN"), ("dropout", "train mode with dropout"), ("eager", "'eager', not PyTorch's sdpa"),
    ("autocast", "torch.autocast is on")])
def test_the_true_reason_of_a_refusal(how, reason, tok):
    lm = broken(tiny.model(), how)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        with pytest.raises(InputError, match=f"LlamaForCausalLM can be neither searched nor .*{reason}"):
            mcts.sample(lm, tok, PROMPTS)
    assert "served" not in vars(lm)


def test_logits_that_turn_to_nan(tok):
    """They would draw token 0 for ever and write NaN into the trees."""
    lm = tiny.model()
    mcts.check_model(lm)
    with pytest.raises(InputError, match="logits are not finite"):
        list(mcts.search(broken(lm, "NaN"), tok, PROBLEMS, reward, **SETTINGS))


def test_an_eos_beyond_the_logits(tok):
    lm = tiny.model()
    lm.generation_config.eos_token_id = [0, 999]
    with pytest.raises(InputError, match="EOS token is 999, but the model has only 370"):
        mcts.sample(lm, tok, PROMPTS)


# ---------------------------------------------------------------- formats, thoughts, rewards


CHAIN = tiny.CHANCES | {"\n": 14, "\n\n": 1, ".\n\n": 1}


@pytest.mark.parametrize("name, format", [
    ("single newline", Format(step_end="\n", instruction="")),
    ("fixed", Format(step_tokens=4, instruction="")),
    ("marker", Format(marker=" So", instruction="")),
    ("prompt", Format(prompt=lambda tokenizer, question: f"Problem: {question}")),
    ("prompt of ids", Format(prompt=lambda tokenizer, question: tokenizer(question).input_ids[:3]))])
def test_a_format_keeps_its_negatives(name, format, tok):
    """Whatever ends a step and announces an answer: right and wrong training paths of several steps remain."""
    lm = tiny.model("llama", torch.float64, chances=CHAIN if name == "single newline" else tiny.CHANCES)
    endings, depths = collections.Counter(), set()
    grade = lambda text, answer, marker: 1 if "7" in text.rpartition(marker)[2] else -1
    settings = SETTINGS | dict(format=format, iterations=40)
    for tree in mcts.search(lm, tok, PROBLEMS, grade, **settings):
        endings += tree.endings()
        depths |= {node.depth for node in tree.nodes if node.valid and node.terminal}
        for i, node in enumerate(tree.nodes):
            end = tree.ending(i) if node.terminal else "step"
            if end in ("right", "wrong"):
                assert format.marker in "".join(tree.nodes[j].text for j in tree.path(i)) or node.reward > 0
            if name == "fixed":
                assert len(node.tokens) == 4 or node.terminal or i == 0
            elif end == "step" and i:
                assert node.text.endswith(format.step_end) or format.step_end in node.text
    assert endings["right"] >= 3 and endings["wrong"] > 5 and max(depths) > 1, endings


def test_a_marker_between_two_steps_of_fixed_length(lm, tok, monkeypatch):
    """It is found, and so is a blank line whose halves lie in two steps."""
    words = iter(tok(" Answer: 7\n\n").input_ids + [9] * 99)
    monkeypatch.setattr(mcts, "pick", lambda logits, *_: (torch.tensor([next(words)]), torch.tensor([-0.5])))
    format = Format(step_tokens=30, instruction="")
    sample = only_sample(lm, tok, said="So. Final", format=format, limit=40)
    assert (sample.end, sample.text) == ("answer", " Answer: 7\n\n")
    words = iter(tok("\n").input_ids + [9] * 99)
    sample = only_sample(lm, tok, said="Final Answer: 7\n", format=format, limit=40)
    assert (sample.end, sample.text) == ("answer", "\n")


@pytest.mark.parametrize("prompt, text, end", [
    ("Add.", "<think> I end with Final Answer: 7\n\n", "step"),
    ("Add.", "<think> So </think>Final Answer: 7\n\n", "answer"),
    ("Add. <think>\n", "Final Answer: 7\n\n", "step"),            # the template has opened the thought
    ("Add. <think>\n", " So </think>Final Answer: 7\n\n", "answer")])
def test_a_thought_announces_nothing(prompt, text, end, lm, tok, monkeypatch):
    words = iter(tok(text).input_ids)
    monkeypatch.setattr(mcts, "pick", lambda logits, *_: (torch.tensor([next(words)]), torch.tensor([-0.5])))
    assert only_sample(lm, tok, prompt=prompt, limit=60).end == end


def test_a_thought_that_lasts_for_several_steps(lm, tok, monkeypatch):
    words = iter(tok("Final Answer: 7\n\n").input_ids)
    monkeypatch.setattr(mcts, "pick", lambda logits, *_: (torch.tensor([next(words)]), torch.tensor([-0.5])))
    assert only_sample(lm, tok, said="<think> Add.\n\n", limit=30).end == "step"


@pytest.mark.parametrize("reward", [0, 0.5, True, False, None, "1", torch.tensor(1.0), math.nan, 2])
def test_rewards_are_plus_or_minus_one(reward, lm, tok):
    """At the first other one the search ends with a sentence: 0 for wrong would lose every negative."""
    with pytest.raises(InputError, match="the reward function returned .*a reward is"):
        list(mcts.search(lm, tok, PROBLEMS, lambda text, answer: reward, **SETTINGS))


def test_a_reward_function_gets_what_it_asks_for(lm, tok):
    """Further fields of the problem and the marker, by name."""
    seen = set()

    def grade(text, answer, unit, marker, level=3):
        seen.add((answer, unit, marker, level))
        return np.int64(1)
    problems = [dict(question=QUESTIONS[1], answer="7", unit="cm", other=5)]
    (tree,) = mcts.search(lm, tok, problems, grade, **SETTINGS)
    assert seen == {("7", "cm", MARKER, 3)} and type(tree.nodes[-1].reward) is int
    json.loads(tree.to_json())


@pytest.mark.parametrize("bad", [dict(step_tokens=0), dict(step_end=""), dict(marker="")], ids=str)
def test_formats_that_are_none(bad):
    with pytest.raises(InputError):
        Format(**bad)


# ---------------------------------------------------------------- around the search


def test_problems_are_read_as_slots_become_free(lm, tok):
    """An endless stream of questions can be searched: two trees a slot are open at a time."""
    taken = []

    def stream():
        for n in range(10**9):
            taken.append(n)
            yield {"question": f"Add {n} to 4.", "answer": "7"}

    first = next(mcts.search(lm, tok, stream(), reward, slots=2, **SETTINGS))
    assert len(taken) == 4 and first.question in {f"Add {n} to 4." for n in taken}


def test_progress_counts_every_iteration(lm, tok):
    """Trees that end early count their rest, so that a bar of len(problems) * iterations fills."""
    done = []
    trees = grown(lm, tok, progress=done.append)
    assert sum(done) == len(trees) * SETTINGS["iterations"]
    assert any(tree.nodes[0].exhausted for tree in trees.values()), "no tree ended early"


def test_the_grader_sees_whole_responses(lm, tok):
    """From the first step to the last, special tokens left out, with the gold answer."""
    seen = set()
    spy = lambda text, answer: seen.add((text, answer)) or -1
    trees = list(mcts.search(lm, tok, PROBLEMS, spy, **SETTINGS))
    ended = {(tok.decode(path_tokens(tree, i), skip_special_tokens=True), "7")
             for tree in trees for i in leaves(tree) if tree.nodes[i].terminal and tree.nodes[i].valid}
    assert ended <= seen and not any(tiny.END in text or tiny.TURN in text for text, _ in seen)


@pytest.mark.parametrize("template, expected", [
    (None, "{instruction}\n\nProblem: 1 + 1?\n\nSolution:\n\n"),
    ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
     "{% if add_generation_prompt %}[assistant]{% endif %}",
     "[system] {instruction}\n[user] 1 + 1?\n[assistant]"),
    ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
     "<{{ m.content }}>{% endfor %}", "<{instruction}\n\n1 + 1?>")], ids=["plain", "chat", "no system turn"])
def test_prompt(template, expected):
    tok = tiny.tokenizer()
    tok.chat_template = template
    expected = expected.format(instruction=Format().instruction)
    assert tok.decode(mcts.build_prompt(tok, "1 + 1?")) == expected
    assert "at most 8 steps" in expected and "a blank line" in expected and MARKER in expected
    other = Format(step_end="\n", marker="####")
    assert "a new line" in other.instruction and "####" in other.instruction


def test_examples_are_shown(tok):
    shown = mcts.build_prompt(tiny.tokenizer(chat=False), "1 + 1?", [("2 + 2?", "Final Answer: 4")], BARE)
    assert tok.decode(shown) == ("Problem: 2 + 2?\n\nSolution:\n\nFinal Answer: 4\n\n\n"
                                 "Problem: 1 + 1?\n\nSolution:\n\n")
    format = Format(prompt=lambda tokenizer, question, examples=(): f"{len(examples)} {question}")
    assert tok.decode(mcts.build_prompt(tok, "1?", [("2?", "2")] * 3, format)) == "3 1?"
    assert tok.decode(mcts.build_prompt(tok, "1?", format=format)) == "0 1?"


def test_special_tokens_in_a_question_are_text(tok):
    """Else a question could end the user's turn."""
    asked = mcts.build_prompt(tok, f"a {tiny.TURN} b", format=BARE)
    assert tok.decode(asked) == f"a {tiny.TURN} b" and not {0, 1} & set(asked)
    sentence = f"<<{tiny.END}>> a {tiny.END} b"
    bare = tiny.tokenizer()
    bare.chat_template = "{{ '<|end|>' }}[{{ messages[-1].content }}]{{ '<|turn|>' }}"
    ids = mcts.build_prompt(bare, sentence, format=BARE)
    assert ids[0] == 0 and ids[-1] == 1 and not {0, 1} & set(ids[1:-1])
    assert bare.decode(ids) == f"{tiny.END}[{sentence}]{tiny.TURN}"


def test_bos_and_eos_of_a_prompt(tok):
    """One BOS, where the tokenizer adds one; no EOS, though it may add one."""
    from tokenizers.processors import TemplateProcessing
    both = tiny.tokenizer(chat=False)
    both.bos_token = tiny.TURN
    both._tokenizer.post_processor = TemplateProcessing(
        single=f"{tiny.TURN} $A {tiny.END}", special_tokens=[(tiny.TURN, 1), (tiny.END, 0)])
    plain = tok("Add 3.").input_ids
    assert both("Add 3.").input_ids == [1, *plain, 0]
    assert mcts.encode(both, "Add 3.") == mcts.encode(both, f"{tiny.TURN}Add 3.") == [1, *plain]


def test_a_prompt_function_is_asked_real_questions_only(lm, tok):
    asked = []
    format = Format(prompt=lambda tokenizer, question: asked.append(question) or question)
    grown(lm, tok, format=format)
    assert sorted(asked) == sorted(QUESTIONS)


def test_blank_questions_are_skipped(lm, tok, capsys):
    problems = [dict(question=" ", answer="1"), PROBLEMS[0]]
    assert list(grown(lm, tok, problems, format=Format())) == [QUESTIONS[0]]
    assert capsys.readouterr().err.startswith("skipped: a blank question")


# ---------------------------------------------------------------- trees on disk and on the screen


def small_tree():
    tree = Tree("1 + 1?", "2", [5, 6], {"seed": 0})
    tree.nodes[0].visits, tree.nodes[0].value = 3, -1 / 3
    tree.add(Node(0, [10, 11], -0.5, 2, 0.0, text="Add.\n\n"))
    tree.add(Node(0, [12], -1.5, 1, -1.0, text="Guess,\nthen see.\n\n"))
    tree.add(Node(1, [13, 1], -0.25, 1, 1.0, 1, True, text="Final Answer: 2"))
    tree.add(Node(1, [14], -2.0, 1, -1.0, -1, True, False, text="naïve"))
    tree.add(Node(2, [15], -0.125, 1, -1.0, -1, True, text="Final Answer: 3\n\n"))
    tree.add(Node(0, [16], -3.0, text="Later.\n\n"))
    return tree


def test_the_file_format():
    """Others read these lines: names, order and spelling are fixed."""
    line = small_tree().to_json()
    assert line.count("\n") == 0 and "naïve" in line
    data = json.loads(line)
    assert list(data) == ["question", "answer", "prompt", "config", "nodes"]
    assert [data[name] for name in list(data)[:4]] == ["1 + 1?", "2", [5, 6], {"seed": 0}]
    assert json.dumps(data["nodes"][0]) == json.dumps({
        "parent": -1, "tokens": [], "logprob": 0.0, "visits": 3, "value": -1 / 3, "reward": 0,
        "terminal": False, "valid": True, "text": "", "count": 1})
    assert json.dumps(data["nodes"][3]) == json.dumps({
        "parent": 1, "tokens": [13, 1], "logprob": -0.25, "visits": 1, "value": 1.0, "reward": 1,
        "terminal": True, "valid": True, "text": "Final Answer: 2", "count": 1})


def test_round_trip(trees, tmp_path):
    """Nothing of a tree is lost on disk but what the search alone needs (exhausted)."""
    written = [small_tree(), *trees.values()]
    (tmp_path / "trees.jsonl").write_text("".join(t.to_json() + "\n" for t in written), encoding="utf-8")
    read = list(mcts.read_trees(tmp_path / "trees.jsonl"))
    assert [t.to_json() for t in read] == [t.to_json() for t in written]
    for a, b in zip(read, written):
        assert a.nodes == [dataclasses.replace(n, exhausted=False) for n in b.nodes]


def test_what_a_search_writes_into_a_tree(lm, tok, trees):
    tree = trees[QUESTIONS[1]]
    assert tree.prompt == tok(QUESTIONS[1]).input_ids and tree.answer == "7"
    assert tree.config == dict(iterations=25, breadth=3, depth=5, c_puct=1.5, candidates=3, seed=0,
                               max_step_tokens=12, tokenizer=mcts.fingerprint(tok), step_end="\n\n",
                               step_tokens=None, marker=MARKER, eos=[0, 1])
    assert all(n.text == tok.decode(n.tokens, skip_special_tokens=True) for n in tree.nodes)
    assert max(len(n.children) for n in tree.nodes) == 3 and max(n.depth for n in tree.nodes) <= 5
    assert max(len(n.tokens) for n in tree.nodes) <= 12


GOOD = small_tree().to_json().encode()
BROKEN = {"not JSON": b"{", "empty": b"", "list": b"[]", "number": b"7", "no fields": b"{}",
          "torn": GOOD[:-9], "not UTF-8": b"\xff" + GOOD,
          "no nodes": GOOD[:GOOD.index(b'[{"parent"')] + b"[]}",
          "parent is itself": GOOD.replace(b'"parent": 1', b'"parent": 3', 1),
          "parent comes later": GOOD.replace(b'"parent": 1', b'"parent": 5', 1),
          "two roots": GOOD.replace(b'"parent": 1', b'"parent": -1', 1),
          "parent unknown": GOOD.replace(b'"parent": 1', b'"parent": 9'),
          "field missing": GOOD.replace(b'"visits"', b'"visit"')}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_line_is_named(broken, tmp_path):
    """By file and line, so that it can be deleted by hand; never with a traceback."""
    path = tmp_path / "trees.jsonl"
    path.write_bytes(GOOD + b"\n" + BROKEN[broken] + b"\n" + GOOD + b"\n")
    with pytest.raises(InputError, match="trees.jsonl, line 2: not a search tree"):
        list(mcts.read_trees(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot read trees from .*nowhere.jsonl"):
        list(mcts.read_trees(tmp_path / "nowhere.jsonl"))


DRAWING = """\
V -0.33  N 3   1 + 1? -> 2
├─ +0.33 ─ V +0.00  N 2     Add.
│  ├─ +1.00 ─ V +1.00  N 1   + Final Answer: 2
│  └─ -1.00 ─ V -1.00  N 1   x naïve
└─ -0.67 ─ V -1.00  N 1     Guess, then see.
   └─ +0.00 ─ V -1.00  N 1   - Final Answer: 3"""


def test_drawing(capsys, monkeypatch):
    """Plain text, where stdout is no terminal. On the edges credits: +0.33 is 0 + 1/3, -0.67 is -1 + 1/3."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\n".join(mcts.draw(small_tree())) == DRAWING
    lines = list(mcts.draw(small_tree(), unvisited=True))
    assert len(lines) == 7 and lines[-1] == "└─ +0.33 ─ V +0.00  N 0     Later."
    narrow = list(mcts.draw(small_tree(), width=38))
    assert narrow[-2] == "└─ -0.67 ─ V -1.00  N 1     Guess, th…" and max(map(len, narrow)) == 38


def test_colours(monkeypatch):
    """Red to green in a terminal, unless NO_COLOR is set."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert mcts.paint("x", -1) == "\033[38;5;196mx\033[0m" and mcts.paint("x", 1) == "\033[38;5;46mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert mcts.paint("x", -1) == "x"


def test_a_reader_who_has_seen_enough(monkeypatch):
    """`mcts.py --show trees.jsonl | head` ends without a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        tasks.run_command(lambda: print("Add.\n" * 100_000))


def test_page():
    """It needs nothing from elsewhere, no text of a tree can become markup, and every node is there, below its
    parent, the unvisited ones in a fold of their own."""
    tree = small_tree()
    tree.nodes[1].text = "</pre><script>&\n\n"
    page = mcts.page([tree, tree])
    assert "<script" not in page and "http" not in page and "src=" not in page
    first, second = page.partition("</p>")[2].split("\n<details>")
    assert first == "<details>" + second and "1 + 1?" in first and "-&gt; 2 · 1 right, 1 cut, 1 wrong" in first
    assert first.count("<details>") == first.count("</details>") == 4
    order = ["V -0.33", "&lt;/pre&gt;&lt;script&gt;&amp;", '<i>+1.00</i>', 'class="right">+ Final Answer: 2',
             'class="failed">x cut: naïve', "</details>", "Guess,\nthen see.",
             'class="wrong">- Final Answer: 3', "</details>", "1 unvisited", "Later.", "</details></details>"]
    for text in order:
        _, found, first = first.partition(text)
        assert found, text


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["mcts.py", *map(str, args)])
    mcts.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and questions."""
    folder = tmp_path_factory.mktemp("search")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    lines = [json.dumps(dict(question=f"Add {n} to 4.", answer="7")) + "\n" for n in (3, 4, 6, 5)]
    (folder / "questions.jsonl").write_text("".join(lines))
    return folder


def flags(folder, out, *more):
    return ("--model", folder / "model", "--data", folder / "questions.jsonl", "--out", out, "--iterations", 3,
            "--max-step-tokens", 8, "--slots", 2, *more)


def test_the_command_goes_on(folder, tmp_path, monkeypatch, capsys):
    """Trees that are there are not searched again, and a torn line is dropped."""
    out = tmp_path / "trees.jsonl"
    command(monkeypatch, *flags(folder, out, "--limit", 2))
    assert len(list(mcts.read_trees(out))) == 2
    whole = out.read_text()
    out.write_text(whole + whole[:100])
    command(monkeypatch, *flags(folder, out))
    assert sorted(t.question for t in mcts.read_trees(out)) == sorted(f"Add {n} to 4." for n in (3, 4, 6, 5))
    assert out.read_text().startswith(whole)
    command(monkeypatch, *flags(folder, out))
    assert len(list(mcts.read_trees(out))) == 4
    assert "searched 0 questions, 4 in all" in capsys.readouterr().err
    with pytest.raises(InputError, match="trees of iterations 3, not 5: choose another --out"):
        command(monkeypatch, *flags(folder, out, "--iterations", 5))


def test_each_rank_has_its_share_and_file(folder, tmp_path, monkeypatch):
    for rank in 0, 1:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        command(monkeypatch, *flags(folder, tmp_path / "trees.jsonl"))
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["trees.0.jsonl", "trees.1.jsonl"]
    questions = [sorted(t.question for t in mcts.read_trees(path)) for path in files]
    assert questions == [["Add 3 to 4.", "Add 6 to 4."], ["Add 4 to 4.", "Add 5 to 4."]]


def test_show_and_html(folder, tmp_path, monkeypatch, capsys):
    """As many trees as asked for, as wide as the terminal is."""
    out = tmp_path / "trees.jsonl"
    command(monkeypatch, *flags(folder, out))
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "44")
    command(monkeypatch, "--show", out, "--limit", 2)
    text = capsys.readouterr().out
    assert text.count("-> 7") == 2 and max(map(len, text.splitlines())) <= 44
    command(monkeypatch, "--html", out)
    assert capsys.readouterr().out.startswith("<!DOCTYPE html>")


# ---------------------------------------------------------------- loading a model, or saying why not


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_without_generation_config(device, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    model, tok = mcts.load_model(str(tmp_path / "model"), device)
    assert model.device.type == device and not model.training
    assert mcts.eos_tokens(model, tok) == {0}


def test_free_memory(monkeypatch):
    """What is available, not what is free, and no more than the container may have."""
    files = {"/proc/meminfo": "MemFree: 10 kB\nMemAvailable:   9000 kB\n"}
    monkeypatch.setattr(mcts, "read", lambda path: files.get(path, ""))
    cpu = torch.device("cpu")
    assert mcts.free_memory(cpu) == 9000 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "max\n"}
    assert mcts.free_memory(cpu) == 9000 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "5000\n", "/sys/fs/cgroup/memory.current": "4000\n",
              "/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 300\nfile 7"}
    assert mcts.free_memory(cpu) == 1300


def test_progress_of_responses_counts_tokens(lm, tok):
    """From the first token on, to the last that a response might have had."""
    done = []
    for index, samples in mcts.stream(lm, tok, [*PROMPTS, " "], n=3, max_new_tokens=20, progress=done.append):
        assert len(samples) == (0 if index == 4 else 3)
    assert sum(done) == 5 * 3 * 20 and len(done) > 20


def test_doctests():
    failed, tried = doctest.testmod(mcts)
    assert tried > 0 and failed == 0


def test_a_model_may_be_trained_after_the_last_tree_and_between_batches():
    """Nothing is half drawn then: only where samples are in flight are other weights refused."""
    model = tiny.model(dtype=torch.float64)
    for response in mcts.stream(model, tiny.tokenizer(), [[5, 6, 7]], max_new_tokens=4):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)


def test_steps_longer_than_their_limit_are_refused():
    with pytest.raises(InputError, match="--max-step-tokens is 8, but must be at least 9"):
        mcts.search(tiny.model(), tiny.tokenizer(), [], None, max_step_tokens=8, format=Format(step_tokens=9))


def test_a_reward_function_with_any_keywords_gets_the_other_fields():
    seen = []

    def reward_fn(text, answer, **fields):
        seen.append(fields)
        return -1
    problems = [{"question": "Add 3 to 4.", "answer": "7", "level": 2}]
    list(mcts.search(tiny.model(), tiny.tokenizer(), problems, reward_fn, iterations=8, max_step_tokens=12))
    assert seen and all(fields == {"level": 2} for fields in seen)
