"""What the search promises: where steps end, what a tree counts, and that the engine below changes nothing.

    python -m pytest -q tests/test_mcts.py          # half a minute on one core, no download, no GPU needed

Trees come from three sources: steps written by hand (every expected number is worked out next to it), random
outcomes, and tiny random models (see tiny.py). The yardstick of the engine is `plain_logprobs`: one forward
of the bare model without any cache.
"""
import dataclasses
import doctest
import io
import json
import math
import os
import random
import sys

import numpy as np
import pytest
import torch
from pytest import approx as about

import tiny
import mcts
from mcts import MARKER, InputError, Job, Node, Sample, Tree

QUESTIONS = ["Add",                                                 # a prompt of one token
             "Add 3 to 4.", "What is 5 + 2?", "Take 5 from 12. Then double it.",
             "First, add 3 to 4. Then take 5 from 12 and multiply by 2. Is the sum even (as asked)? " * 2]
PROBLEMS = [{"question": q, "answer": "7"} for q in QUESTIONS]
SETTINGS = dict(iterations=25, breadth=3, depth=5, max_step_tokens=12)


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


def test_splitter_against_plain_text(lm, tok):
    """Fed token by token, the vocabulary flags must find the end that decoding the text so far finds."""
    size, rng = len(tok) + tiny.SPARE, random.Random(0)
    text = [tok.decode([i], skip_special_tokens=True) for i in range(size)]   # "" beyond the tokenizer
    spaces = [i for i in range(size) if "\n" in text[i] or not text[i].strip()]
    rows = [[rng.choice(spaces) if rng.random() < share else rng.randrange(size) for _ in range(14)]
            for share in (0.1, 0.3, 0.6, 0.9) for _ in range(250)]

    def end_of(tokens):                         # the rule: the first prefix with a blank line after some text
        for n in range(1, len(tokens) + 1):
            text = tok.decode(tokens[:n], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if "\n\n" in text.lstrip():
                return n
        return None

    splitter, found = mcts.StepSplitter(lm, tok, size, "cpu"), [None] * len(rows)
    started = newline = torch.zeros(len(rows), dtype=torch.bool)
    for n, token in enumerate(torch.tensor(rows).T, 1):
        blank, started, newline = splitter(token, started, newline)
        found = [f or n if b else f for f, b in zip(found, blank.tolist())]
    assert found == [end_of(row) for row in rows]
    assert None in found and len(set(found)) > 10, "too few different ends to prove anything"


@pytest.mark.parametrize("declared, expected", [([0, 1], [0, 1]), (1, [1]), (None, [0])])
def test_eos_ids(tok, declared, expected):
    """Every EOS of the generation config counts; without one, the tokenizer's."""
    lm = tiny.model()
    lm.generation_config.eos_token_id = declared
    assert mcts.StepSplitter(lm, tok, len(tok) + tiny.SPARE, "cpu").eos.nonzero()[:, 0].tolist() == expected


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
]


@pytest.mark.parametrize("whole", [False, True], ids=["step", "whole"])
@pytest.mark.parametrize("script, step, response", SCRIPTS)
def test_ends(lm, tok, monkeypatch, script, step, response, whole):
    """A policy that writes `script` and then " 7" for ever must stop where the table says."""
    ids = [i for piece in script for i in tok(piece).input_ids]
    words = iter(ids + tok(" 7").input_ids * LIMIT)
    monkeypatch.setattr(mcts, "pick", lambda logits, *_: (torch.tensor([next(words)]), torch.tensor([-0.5])))
    engine = mcts.Engine(lm, tok, slots=1, siblings=1, max_tokens=LIMIT, whole=whole)
    engine.submit(Job([(bytes(16), tok("Add 3.").input_ids)]))
    while not (done := engine.step()):
        pass
    sample, (end, used) = done[0].samples[0], response if whole else step
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


def play(policy, **settings):
    """Run `grow` on policy(name of the leaf) -> Samples. Returns the tree and the leaves in their order."""
    settings = dict(iterations=10, breadth=2, depth=8, c_puct=1.0) | settings
    tree, order = Tree("2 + 2?", "4", [0]), []
    search = mcts.grow(tree, reward, spell, **settings)
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


def test_an_eos_that_the_grader_accepts_without_a_marker_is_valid():
    tree, outcome = Tree("", "4", [0]), said("4, I think", 0.5, "eos")
    mcts.expand(tree, 0, [outcome], lambda text, answer: 1, spell, breadth=1, depth=8)
    assert tree.nodes[1].valid and tree.nodes[1].reward == 1


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


# Attention that differs: grouped heads, biases, normed queries, learned positions, windows (which count as
# the context: within them they hide nothing).
SERVED = {"llama": {}, "qwen2": {}, "qwen3": {}, "gpt2": {},
          "mistral": dict(sliding_window=32), "gemma3_text": dict(sliding_window=32, query_pre_attn_scalar=8)}


@pytest.mark.parametrize("kind", SERVED)
def test_stored_logprobs_are_those_of_the_bare_model(kind, tok, monkeypatch):
    """In float32, for every node of every tree; prompts of very different lengths share the batch. A larger
    difference means a wrong key, value or position. Linear layers multiply as those of larger models do."""
    if mcts.ONEDNN:
        monkeypatch.setattr(mcts, "LARGE", 0)
    lm, kept, inner, eos = tiny.model(kind, torch.float32, **SERVED[kind]), 0, 0, set()
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
            "nothing kept": dict(kv_budget=0), "little kept": dict(kv_budget=20_000, slots=2),
            "other order": dict(problems=PROBLEMS[::-1], slots=2), "alone": dict(problems=PROBLEMS[3:4])}


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_same_trees(variant, lm, tok, trees):
    """Neither the batch, nor the memory, nor the other questions change a tree."""
    for question, tree in grown(lm, tok, **VARIANTS[variant]).items():
        got, expected = json.loads(tree.to_json()), json.loads(trees[question].to_json())
        for a, b in zip(got["nodes"], expected["nodes"]):
            assert a.pop("logprob") == about(b.pop("logprob"), abs=1e-9)
        assert got == expected


# Three siblings at two a slot of the cache, whose parts then start and end on their own; the many small calls
# of attention that larger models take on a CPU.
SHAPES = {"SHARE": (mcts.Engine, 2), "RAGGED": (mcts.Slots, 0)}


@pytest.mark.parametrize("settings", [dict(), dict(kv_budget=0, slots=2)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_how_the_work_is_cut_changes_no_tree(name, settings, lm, tok, trees, monkeypatch):
    owner, value = SHAPES[name]
    monkeypatch.setattr(owner, name, value)
    for question, tree in grown(lm, tok, **settings).items():
        assert len(tree.nodes) == len(trees[question].nodes)
        for a, b in zip(tree.nodes, trees[question].nodes):
            assert (a.tokens, a.visits, a.logprob) == (b.tokens, b.visits, about(b.logprob, abs=1e-9))


@pytest.mark.skipif(not mcts.ONEDNN, reason="no oneDNN here")
def test_packed_weights_multiply_as_their_own(monkeypatch):
    """With any rows and biases; where a gradient is wanted, which oneDNN's product lacks, as torch does."""
    monkeypatch.setattr(mcts, "LARGE", 0)
    lm = tiny.model("qwen2")
    packed = mcts.pack_weights(lm, 2**30)
    for weight in packed:
        for rows, bias in (1, None), (7, torch.randn(len(weight))):
            x = torch.randn(1, rows, weight.shape[1])
            expected = mcts.torch_linear(x, weight, bias)
            assert mcts.multiply(packed, x, weight, bias).requires_grad
            with torch.no_grad():
                torch.testing.assert_close(mcts.multiply(packed, x, weight, bias), expected)


@pytest.mark.skipif(not mcts.ONEDNN, reason="no oneDNN here")
def test_which_weights_are_packed(monkeypatch):
    """The large ones of linear layers in float32, while the memory lasts."""
    lm = tiny.model()
    size = lambda name: lm.get_parameter(name).numel()
    linear = [name for name, p in lm.named_parameters() if p.ndim == 2 and "embed" not in name]
    large = [name for name in linear if size(name) >= size("model.layers.0.mlp.up_proj.weight")]
    names = lambda packed: [name for name, p in lm.named_parameters() if p in packed]
    monkeypatch.setattr(mcts, "LARGE", size("model.layers.0.mlp.up_proj.weight"))
    assert names(mcts.pack_weights(lm, 2**30)) == large != linear
    assert names(mcts.pack_weights(lm, 4 * sum(map(size, large[:3])))) == large[:3]
    assert not mcts.pack_weights(lm.double(), 2**30)


def test_the_models_own_forward_is_put_back(tok):
    lm = tiny.model()
    mcts.sample(lm, tok, ["1"], max_new_tokens=1)
    assert lm.config._attn_implementation == "sdpa" and torch.nn.functional.linear is mcts.torch_linear


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
            made.append(self)

        def step(self):
            jobs = super().step()
            assert self.stored == sum(kv.nbytes for kv in self.store.values()) <= self.budget
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
def test_what_all_prompts_begin_with_is_computed_once(whole, lm, engines):
    """An instruction, or worked examples: not once a question, and not forgotten with the first tree."""
    tok = tiny.tokenizer()
    tok.chat_template = "Start with 4. Add 3. {{ messages[-1].content }}"
    for budget in None, 0:
        if whole:
            prompts = [mcts.build_prompt(tok, q) for q in QUESTIONS[1:]]
            drawn = [[s.tokens for s in samples] for samples in mcts.sample(
                lm, tok, prompts, n=2, max_new_tokens=9, slots=1, kv_budget=budget)]
        else:
            trees = grown(lm, tok, PROBLEMS[1:], slots=1, kv_budget=budget)
            prompts = [tree.prompt for tree in trees.values()]
            drawn = {question: [n.tokens for n in tree.nodes] for question, tree in trees.items()}
        if budget is None:
            n, stats, expected = len(engines[0].opening[1]), engines[0].stats, drawn
            assert n > 5 and all(p[:n] == engines[0].opening[1] for p in prompts)
            assert stats["prefilled"] == n - 1 + sum(len(p) - n for p in prompts)
    assert drawn == expected


def test_siblings_are_one_row_until_they_differ(lm, tok, engines):
    """A forward has a row for every distinct beginning of the samples of a prompt, whoever shares it."""
    responses = mcts.sample(lm, tok, PROMPTS, n=8, max_new_tokens=30, slots=3)
    rows = sum(len({tuple(s.tokens[:i]) for s in samples for i in range(len(s.tokens))})
               for samples in responses)
    stats = engines[0].stats
    assert stats["rows"] == rows < stats["sampled"] == sum(len(s.tokens) for ss in responses for s in ss)
    for prompt, samples in zip(PROMPTS, responses):
        for s in samples:
            assert s.logprobs == about(plain_logprobs(lm, tok(prompt).input_ids, s.tokens), abs=1e-9)
    mcts.sample(lm, tok, PROMPTS, n=8, max_new_tokens=30, temperature=0)
    assert 8 * engines[1].stats["rows"] == engines[1].stats["sampled"]


def test_room_of_ended_samples_is_used_again():
    """A path of 3 columns; samples 0 and 1 add one each, 0 ends, 1 takes its column, then a new one."""
    slots = mcts.Slots(2)
    slots.clear(0, 3)
    slots.kv, slots.groups = [torch.zeros(2, 2, 1, slots.seen.shape[1], 4)], 1
    assert slots.focus(np.array([0, 0]), np.array([1, 2])).tolist() == [3, 4]
    slots.release(0, 0)
    assert slots.focus(np.array([0]), np.array([2])).tolist() == [3] and slots.used[0] == 5
    (_, _, _, mask), = slots.parts
    assert (mask[0, 0, 0, :5] == 0).all() and (mask[0, 0, 0, 5:] < 0).all()
    assert slots.focus(np.array([0]), np.array([2])).tolist() == [5]


@pytest.mark.parametrize("budget", [0, 20_000])
def test_memory_is_bounded(lm, tok, engines, budget):
    """What does not fit is dropped and computed again: the budget holds after every step (see Audited)."""
    grown(lm, tok, slots=2, kv_budget=budget)
    free, ample = engines[0].stats, grown(lm, tok, slots=2) and engines[1].stats
    assert free["prefilled"] > 2 * ample["prefilled"] and free["sampled"] == ample["sampled"]
    assert (engines[0].stored, free["reused"]) == (0, 0) if budget == 0 else free["reused"] > 0


def test_finished_trees_leave_nothing_behind(lm, tok, engines):
    """Keys and values of a finished tree are of no use; those of thousands of trees would fill the memory."""
    grown(lm, tok, slots=2)
    assert engines[0].stored == 0 and not engines[0].store


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
    engine = mcts.Engine(tiny.model(), tiny.tokenizer(), slots=1, siblings=1, max_tokens=1)
    path_keys = [mcts.hash_tokens(bytes(8), [i]) for i in range(paths)]
    keys = torch.cat([mcts.draw_keys(key, length, n).reshape(-1, 2) for key in path_keys])
    hashes = engine.token_hash[:len(logits)]
    rows = torch.zeros(len(keys), dtype=torch.long)
    token, logprob = mcts.pick(logits[None], rows, keys, hashes, temperature)
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
    assert torch.equal(mcts.draw_keys(key, 5, 3), mcts.draw_keys(key, 9, 3)[:, :5])
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


# Attention with a bias by distance, a state instead of it, sinks, a soft cap.
REFUSED = {"bloom": {}, "mamba": {}, "gpt_oss": dict(num_local_experts=4),
           "gemma2": dict(query_pre_attn_scalar=8)}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_be_served_are_refused(kind, tok):
    """Served, they would give plausible trees with wrong log-probs."""
    lm = tiny.model(kind, chances=None, **REFUSED[kind])
    own = lm.config._attn_implementation
    for use in (lambda: mcts.search(lm, tok, PROBLEMS, reward), lambda: mcts.sample(lm, tok, PROMPTS)):
        with pytest.raises(InputError, match=rf"cannot serve {type(lm).__name__}\b.*Llama"):
            use()
    assert lm.config._attn_implementation == own


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


@pytest.mark.parametrize("kind, limit", [("llama", "max_position_embeddings"), ("mistral", "sliding_window")])
def test_no_path_outgrows_the_context(kind, limit, tok):
    """A step that fills the context is cut: positions beyond were never trained; a learned table has none."""
    context, full = 20, 0
    lm = tiny.model(kind, torch.float64, **{limit: context})
    for seed in range(5):
        for tree in grown(lm, tok, PROBLEMS[:3], depth=9, seed=seed).values():
            for i in leaves(tree):
                size, node = len(tree.prompt) + len(path_tokens(tree, i)), tree.nodes[i]
                assert size <= context
                full += size == context
                assert size < context or node.terminal, "no step can follow"
    assert full > 5, "the limit was hardly reached"


def test_the_model_is_handed_back_between_trees(lm, tok):
    """Whoever takes a tree may train on it at once: the model's own attention, gradients, the same logits."""
    own, ids = lm.config._attn_implementation, torch.tensor([tok(QUESTIONS[1]).input_ids])
    expected = lm(ids).logits
    search = mcts.search(lm, tok, PROBLEMS[:3], reward, **SETTINGS)
    for _ in search:
        assert torch.is_grad_enabled() and lm.config._attn_implementation == own
        logits = lm(ids).logits
        assert logits.requires_grad and torch.equal(logits, expected)
    with torch.no_grad():
        mcts.sample(lm, tok, PROMPTS, max_new_tokens=2)
        assert not torch.is_grad_enabled()


def test_the_model_is_handed_back_after_an_error(lm, tok):
    def broken(text, answer):
        raise RuntimeError("the grader failed")

    own = lm.config._attn_implementation
    with pytest.raises(RuntimeError, match="grader"):
        list(mcts.search(lm, tok, PROBLEMS, broken, **SETTINGS))
    assert lm.config._attn_implementation == own and torch.is_grad_enabled()


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
    assert tok.decode(mcts.build_prompt(tok, "1 + 1?")) == expected.format(instruction=mcts.INSTRUCTION)


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
        "terminal": False, "valid": True, "text": ""})
    assert json.dumps(data["nodes"][3]) == json.dumps({
        "parent": 1, "tokens": [13, 1], "logprob": -0.25, "visits": 1, "value": 1.0, "reward": 1,
        "terminal": True, "valid": True, "text": "Final Answer: 2"})


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
                               max_step_tokens=12, tokenizer=mcts.fingerprint(tok))
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
        mcts.run_command(lambda: print("Add.\n" * 100_000))


def test_bad_settings_are_told_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(mcts, "load_model", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "questions.jsonl").write_text(json.dumps(PROBLEMS[0]))
    monkeypatch.setattr(sys, "argv", ["mcts.py", "--model", "M", "--data", str(tmp_path / "questions.jsonl"),
                                      "--out", str(tmp_path / "trees.jsonl"), "--slots", "0"])
    with pytest.raises(InputError, match="--slots is 0"):
        mcts.main()


def test_doctests():
    failed, tried = doctest.testmod(mcts)
    assert tried > 0 and failed == 0
