# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
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
import re
import shutil
import sys
import threading
from itertools import chain, repeat
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from pytest import approx as about
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import tiny
import eval as tasks
import mcts
from mcts import MARKER, Format, InputError, Job, Node, Sample, Tree

LONGEST = "First, add 3 to 4. Then take 5 from 12 and multiply by 2. Is the sum even (as asked)? " * 2
QUESTIONS = ["Add",                                                 # a prompt of one token
             "Add 3 to 4.",
             "What is 5 + 2?",
             "Take 5 from 12. Then double it.",
             LONGEST]
PROBLEMS = [dict(question=question, answer="7") for question in QUESTIONS]
BARE = Format(instruction="")                                       # the prompt is the question
SETTINGS = dict(iterations=15, breadth=3, depth=5, max_step_tokens=12, format=BARE)
EOS = {0, 1}                                                        # tiny.END and tiny.TURN


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


def searching(lm, tok, problems=PROBLEMS, reward_fn=reward, **settings):
    return mcts.search(lm, tok, problems, reward_fn, **SETTINGS | settings)


def by_question(trees):
    return {tree.question: tree for tree in trees}


def grown(lm, tok, problems=PROBLEMS, **settings):
    """The trees by question, of which there is one at least."""
    found = by_question(searching(lm, tok, problems, **settings))
    assert found
    return found


def steps(tree):
    return [node.tokens for node in tree.nodes]


def are_equal(found, expected):
    """Whether each tree that was found has the steps of the one expected for its question."""
    return found and all(steps(found[question]) == steps(expected[question]) for question in found)


def ready_engine(lm, tok):
    """An engine for SETTINGS, and the rest of them."""
    engine = mcts.Engine(lm, tok, slots=3, siblings=3, max_tokens=12, format=BARE)
    return engine, dict(iterations=15, breadth=3, depth=5, engine=engine)


def drawn(lm, tok, prompts, **settings):
    """The tokens of the responses to each prompt."""
    responses = mcts.sample(lm, tok, prompts, **settings)
    return [[sample.tokens for sample in samples] for samples in responses]


@torch.no_grad()
def plain_logprobs(lm, prompt, tokens):
    """log-prob of each of `tokens` after `prompt` by the bare model, no cache."""
    ids = torch.tensor([prompt + tokens])
    logits = lm(ids, use_cache=False).logits[0, len(prompt) - 1:-1]
    logprobs = logits.double().log_softmax(-1)
    return logprobs.gather(1, ids[0, len(prompt):, None])[:, 0].tolist()


def leaves(tree):
    return [i for i, node in enumerate(tree.nodes) if i and not node.children]


def path_tokens(tree, i):
    return [token for j in tree.path(i) for token in tree.nodes[j].tokens]


def table(text):
    """The rows of a table, without its heading: lists of cells, which two blanks or more keep apart."""
    _, *lines = text.strip().splitlines()
    return [re.split("  +", line.strip()) for line in lines]


# ---------------------------------------------------------------- where a step ends


def test_the_tokenizer_merges_blank_lines(tok):
    """The premise of the tests below: blank lines hide inside tokens, whole and in halves."""
    assert tok.tokenize("7.\n\n") == ["7", ".ĊĊ"]
    assert tok.tokenize("7\n") == ["7", "Ċ"]
    assert tok.tokenize(f"{MARKER} 7\n\n") == [MARKER, " 7", "ĊĊ"]


@pytest.mark.parametrize("step_end", ["\n\n", "\n", ". ", "So"])
def test_step_ends_against_plain_text(lm, tok, step_end):
    """Fed token by token, an end must be found where decoding the text so far finds it.
    Ends that a step begins with, as "So" may, are none."""
    format = Format(step_end=step_end)
    ending = mcts.Engine(lm, tok, slots=1, siblings=1, max_tokens=99, format=format).ending
    size = len(tok) + tiny.SPARE
    text = [tok.decode([i], skip_special_tokens=True) for i in range(size)]     # "" beyond the tokenizer
    likely = [i for i in range(size) if step_end[0] in text[i] or not text[i].strip()]
    rng = random.Random(0)
    rows = []                                   # of 14 tokens, a share of which may belong to an end
    for share in (0.1, 0.3, 0.6, 0.9):
        for _ in range(250):
            kinds = [likely if rng.random() < share else range(size) for _ in range(14)]
            rows.append([rng.choice(kind) for kind in kinds])

    def end_of(tokens):                         # the rule: the first prefix that holds it after some text
        opening = re.compile(rf"(?:\s|{re.escape(step_end)})*")
        for n in range(1, len(tokens) + 1):
            text = tok.decode(tokens[:n], **mcts.PLAIN)
            if step_end in text[opening.match(text).end():]:
                return n
        return None

    def found(tokens):
        draft = mcts.Draft(Job([]), 0, 0, 0, None, 0)
        for n, draft.newest in enumerate(tokens, 1):
            draft.tokens.append(draft.newest)
            if ending.step_ends(draft):
                return n
        return None

    ends = [found(row) for row in rows]
    assert ends == [end_of(row) for row in rows]
    assert None in ends and len(set(ends)) > 8, "too few different ends"


@pytest.mark.parametrize("declared, expected", [
    ([0, 1], {0, 1}),
    (1, {0, 1}),
    (None, {0}),
    (0, {0})])
def test_eos_ids(tok, declared, expected):
    """Every EOS of the generation config counts, and the tokenizer's."""
    lm = tiny.model()
    lm.generation_config.eos_token_id = declared
    assert mcts.eos_tokens(lm, tok) == expected


@pytest.fixture
def written(lm, tok, monkeypatch):
    """written(pieces, said, prompt, limit, ...): the one sample that an engine draws after `prompt` and what
    was said, where the policy writes `pieces` and then " 7" for ever, each with a log-prob of -0.5."""
    def draw(pieces, said="", prompt="Add 3.", limit=8, **settings):
        (seven,) = tok(" 7").input_ids
        ids = [i for piece in pieces for i in tok(piece).input_ids]
        words = chain(ids, repeat(seven))

        def pick(*_):
            return torch.tensor([next(words)]), torch.tensor([-0.5])
        monkeypatch.setattr(mcts, "pick", pick)
        engine = mcts.Engine(lm, tok, slots=1, siblings=1, max_tokens=limit, **settings)
        prompt, said = tok(prompt).input_ids, tok(said).input_ids
        path = [(bytes(16), tokens) for tokens in (prompt, said) if tokens]
        engine.submit(Job(path, said, mcts.thinking(tok, prompt)))
        while not (done := engine.advance()):
            pass
        return done[0].samples[0]
    return draw


# How a step ends and how a whole response does, after how many tokens, where the policy writes these.
ENDS = table(r"""
a step    a response  tokens, and the limit is 8
step 2    cut 8       So/.\n\n                                   the end is part of a token
step 3    cut 8       So/\n/\n                                   or in two of them
step 3    cut 8       So/.\n/\n
step 7    cut 8       So/\n/ 7/\n/ /\n/\n                        "\n \n" is none
step 3    cut 8       \n\n/So/\n\n                               at the start it is none
step 6    cut 8       \n/\n/ /\n\n/So/\n\n
step 8    cut 8       So/ 7/ 7/ 7/ 7/ 7/ 7/\n\n                  just in time
cut 8     cut 8       So/So/So/So/So/So/So/So
cut 8     cut 8       \n\n/\n\n/\n\n/\n\n/\n\n/\n\n/\n\n/\n\n
eos 2     eos 2       So/<|end|>
eos 1     eos 1       <|turn|>                                   the second EOS
eos 8     eos 8       So/So/So/So/So/So/So/<|end|>
answer 3  answer 3    Final Answer:/ 7/.\n\n
answer 6  answer 6    Final/ Answer/:/ 7/\n/\n                   the marker in pieces
answer 4  answer 4    Final Answer:/\n\n/ 7/\n\n                 the answer is still to come
answer 7  answer 7    Final Answer:/\n/\n/\n\n/7/\n/\n
cut 8     cut 8       Final Answer:/\n\n/\n\n/\n\n/\n\n/\n\n/\n\n/\n\n
eos 3     eos 3       Final Answer:/ 7/<|end|>
step 2    answer 5    So/\n\n/Final Answer:/ 7/\n\n
answer 5  answer 5    Final Answer:/:/\n\n/ 7/\n\n               a colon announces more
answer 6  answer 6    Final Answer:/\/[/\n\n/7/\n\n              and so does what opens a formula
""")


@pytest.mark.parametrize("whole", [False, True], ids=["step", "whole"])
@pytest.mark.parametrize("step, response, script", [row[:3] for row in ENDS])
def test_ends(tok, written, step, response, script, whole):
    pieces = script.replace(r"\n", "\n").split("/")
    ids = [i for piece in pieces for i in tok(piece).input_ids]
    end, used = (response if whole else step).split()
    used = int(used)
    sample = written(pieces, whole=whole)
    assert (sample.end, len(sample.tokens)) == (end, used)
    assert sample.tokens[:len(ids)] == ids[:used]
    assert sample.text == tok.decode(sample.tokens, skip_special_tokens=True)
    assert sample.logprobs == [-0.5] * used
    assert sample.logprob == -0.5 * used


@pytest.mark.parametrize("end, text, settings", [
    # A blank line in the middle of steps of fixed length ends an answer; also where its halves lie in two.
    ("answer", " Answer: 7\n\n", dict(said="So. Final", format=Format(step_tokens=30))),
    ("answer", "\n", dict(said="Final Answer: 7\n", format=Format(step_tokens=30))),
    ("answer", "\n\n", dict(said="\n\n\n\nFinal Answer: So", format=Format(step_tokens=30))),
    # In a thought a marker is quoted, whoever opened it: the step, an earlier one, or the template.
    ("step", "<think> I end with Final Answer: 7\n\n", {}),
    ("answer", "<think> So </think>Final Answer: 7\n\n", {}),
    ("step", "Final Answer: 7\n\n", dict(prompt="Add. <think>\n")),
    ("step", "Final Answer: 7\n\n", dict(prompt="Add. [THINK]")),
    ("answer", " So ◁/think▷Final Answer: 7\n\n", dict(prompt="Add. ◁think▷")),
    ("answer", " So </think>Final Answer: 7\n\n", dict(prompt="Add. <think>\n")),
    ("step", "Final Answer: 7\n\n", dict(said="<think> Add.\n\n")),
    # An answer that is opened is still to come, whatever opens it; a marker that is quoted announces none.
    ("answer", "Final Answer: $\n\n7\n\n", {}),
    ("answer", "Final Answer: -\n\n7\n\n", {}),
    ("answer", "Final Answer: The answer is\n\n7\n\n", {}),
    ("answer", "Final Answer: Therefore,\n\n7\n\n", {}),
    ("answer", "Final Answer: \\begin{align}\n\n7\n\n", {}),
    ("answer", "Final Answer:\n```\n\n7\n```\n\n", {}),
    ("answer", "Final Answer:`7`\n\n", {}),
    ("answer", "Final Answer: $18\n\n", {}),
    ("answer", "2. **Final Answer**: 7\n\n", {}),
    ("answer", "**Final answer:** 7\n\n", {}),
    ("step", "So the final answer is next.\n\n", {}),
    ("step", "result: 7\n\n", dict(format=Format(marker="Result:"))),
    ("step", 'I end with "Final Answer:" and 7.\n\n', {}),
    ("answer", "So 7.\n\n", dict(said='I end with "Final Answer:".\n\nFinal Answer: ')),
    # A step's end that is not blank is none at the start, where the step before has left it.
    ("step", "Step 1. Add. Step", dict(format=Format(step_end="Step"))),
    ("step", "###\n ### Add.###", dict(format=Format(step_end="###"))),
    ("step", "。Add 3。", dict(format=Format(step_end="。"))),          # of three tokens
    ("answer", "Final Answer: <\n\n", {}),
    ("answer", "Step 2. Final Answer: 7 Step", dict(format=Format(step_end="Step")))])
def test_ends_in_longer_texts(written, end, text, settings):
    sample = written([text], limit=60, **settings)
    assert (sample.end, sample.text) == (end, text)


# ---------------------------------------------------------------- the algorithm, on steps written by hand


WORDS = []                                      # a vocabulary in which every step is one token


def said(text, p, end="step"):
    """A Sample of one token of probability p, so that its prior is p."""
    if text not in WORDS:
        WORDS.append(text)
    token = WORDS.index(text)
    return Sample([token], [math.log(p)], text, end)


def right(p):
    return said("Final Answer: 4", p, "answer")


def wrong(p):
    return said("Final Answer: 5", p, "answer")


def outcome(tokens):
    """(reward, valid) of a response to 2 + 2."""
    text = "".join(WORDS[token] for token in tokens)
    return reward(text, "4"), MARKER in text


def play(policy, **settings):
    """Run `grow` on policy(name of the leaf) -> Samples. Returns the tree and the leaves in their order."""
    settings = dict(iterations=10, breadth=2, depth=8, c_puct=1.0) | settings
    tree = Tree("2 + 2?", "4", [0])
    order = []
    search = mcts.grow(tree, outcome, **settings)
    samples = None
    while True:
        try:
            leaf = search.send(samples)
        except StopIteration:
            return tree, order
        order.append(tree.nodes[leaf].text or "root")
        samples = policy(order[-1])


def first_children(samples, **settings):
    """The nodes that these samples become below a root, and the root."""
    tree, _ = play(lambda leaf: samples, **settings, iterations=1)
    root, *children = tree.nodes
    return children, root


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
    assert counts(tree) == {"root": (5, about(-1 / 5)),
                            "A": (3, about(-1 / 3)),
                            "A2": (2, -1),
                            "B": (2, 0)}
    ended = {}
    for node in tree.nodes:
        if node.terminal:
            name = f"{node.text} of {tree.nodes[node.parent].text}"
            ended[name] = node.reward, node.valid, node.visits, node.value
    assert ended == {"Final Answer: 4 of A": (1, True, 1, 1),
                     "too deep of A2": (-1, False, 1, -1),
                     "Final Answer: 5 of A2": (-1, True, 1, -1),
                     "I give up of B": (-1, False, 1, -1),
                     "Final Answer: 4 of B": (1, True, 1, 1)}
    assert [n.depth for n in tree.nodes] == [0, 1, 1, 2, 2, 3, 3, 2, 2]
    assert [n.reward for n in tree.nodes if not n.terminal] == [0] * 4
    # Credits of the path A, A2, wrong answer: -1/3 + 1/5,  -1 + 1/3,  -1 + 1
    assert [tree.credit(i) for i in tree.path(6)] == about([-2 / 15, -2 / 3, 0])


def two_branches(leaf):
    """L (prior 0.6) always fails and R (0.4) always succeeds, and either goes on for ever."""
    if leaf == "root":
        return [said("L", 0.6), said("R", 0.4)]
    ended = wrong(0.5) if leaf[0] == "L" else right(0.5)
    return [ended, said(leaf + "'", 0.25)]


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
    """A larger c returns to the failing branch of larger prior earlier. An iteration is one expansion."""
    for iterations in 1, 3, 5:
        _, order = play(two_branches, c_puct=c_puct, iterations=iterations)
        assert order == expected[:iterations]


SELECTED = table("""
chosen  c    N(s)  V, N and prior of each child        scores: V + c * prior * sqrt(N(s)) / (1 + N(child))
0       0    9     0.5 4 0.1, 0.2 5 0.9                0.5    0.2
1       1    9     0.5 4 0.1, 0.2 5 0.9                0.56   0.65
0       1    9     0.5 8 0.6, 0.0 0 0.2                0.7    0.6: Q of an unvisited child is 0
1       1.5  9     0.5 8 0.6, 0.0 0 0.2                0.8    0.9
1       1    9     -0.5 8 0.6, 0.0 0 0.1               -0.3   0.3
1       5    0     0 0 0.25, 0 0 0.5, 0 0 0.125        all 0: the larger prior
1       1    4     0.5 1 0.25, 0.25 1 0.5              0.75 both: the larger prior
0       1    4     0.25 1 0.5, 0.5 1 0.25
1       1    9     1 1 0.9 terminal, -1 8 0.1          an ended child is never chosen, however good
1       1    9     1 4 0.9 exhausted, -1 4 0.1
""")


@pytest.mark.parametrize("chosen, c, N, children", [row[:4] for row in SELECTED])
def test_select(chosen, c, N, children):
    tree = Tree("", "", [0])
    tree.nodes[0].visits = int(N)
    for child in children.split(", "):
        V, visits, prior, *flags = child.split()
        node = Node(0, [0], math.log(float(prior)), int(visits), float(V))
        for flag in flags:
            setattr(node, flag, True)
        tree.add(node)
    assert mcts.select(tree, float(c)) == 1 + int(chosen)


def test_nothing_left_to_select():
    """A root whose children have all ended has no leaf; a fresh root is one."""
    assert mcts.select(Tree("", "", [0]), 1.0) == 0
    tree, order = play(lambda leaf: [right(0.5), said("stuck", 0.25, "cut")])
    assert order == ["root"]
    assert mcts.select(tree, 1.0) is None
    assert counts(tree) == {"root": (2, 0)}


CHILDREN = table("""
breadth  drawn: text, probability, ending              kept, and how often it was drawn
2        a 0.1 step, b 0.3 step, c 0.2 step            b 1, c 1           the most probable, in their order
2        c 0.2 step, a 0.1 step, b 0.3 step            c 1, b 1
5        a 0.1 step, b 0.3 step                        a 1, b 1
2        a 0.5 step, a 0.5 step, b 0.1 step            a 2, b 1           a duplicate takes no place
3        a 0.5 step, a 0.4 eos, a 0.3 cut, a 0.3 cut   a 1, a 1, a 2      another ending: another action
3        a 0.5 step, b 0.2 step, a 0.5 step, a 0.5 eos  a 2, b 1, a 1
""")


@pytest.mark.parametrize("breadth, samples, kept", [row[:3] for row in CHILDREN])
def test_which_samples_become_children(breadth, samples, kept):
    samples = [sample.split() for sample in samples.split(", ")]
    samples = [said(text, float(p), end) for text, p, end in samples]
    children, _ = first_children(samples, breadth=int(breadth))
    assert ", ".join(f"{node.text} {node.count}" for node in children) == kept


def test_the_most_probable_step_is_that_of_the_summed_logprob():
    """Four tokens of 0.7 are less probable (0.24) than one of 0.3, though their prior is larger."""
    long = Sample([0] * 4, [math.log(0.7)] * 4, "long", "step")
    (child,), _ = first_children([long, said("short", 0.3)], breadth=1)
    assert child.text == "short"
    assert Node(0, long.tokens, long.logprob).prior == about(0.7)


def test_duplicates_of_other_tokens_merge():
    """One text by two tokenisations is one action: the first drawn stands for both, with its own log-prob."""
    first = Sample([1, 2], [-1.0, -1.0], "same", "step")
    second = Sample([3], [-0.5], "same", "step")
    (child,), _ = first_children([first, second])
    assert (child.tokens, child.logprob) == ([1, 2], -2.0)


OUTCOMES = table("""
depth limit  ending  text               terminal, reward, valid
2            step    So 4               False 0 True
1            step    So 4               True -1 False      no room for another step
1            answer  Final Answer: 4    True 1 True        the last step may be one
2            answer  Final Answer: 5    True -1 True
2            eos     Final Answer: 4    True 1 True
2            eos     Final Answer: 5    True -1 True
2            eos     It is 5            True -1 False      EOS without an answer
2            cut     Final Answer: 4    True -1 False      who knows how it went on
""")


@pytest.mark.parametrize("depth, end, text, expected", [row[:4] for row in OUTCOMES])
def test_outcomes(depth, end, text, expected):
    (node,), root = first_children([said(text, 0.5, end)], depth=int(depth))
    assert f"{node.terminal} {node.reward} {node.valid}" == expected
    assert node.visits == root.visits == int(node.terminal)
    assert node.value == root.value == node.reward


# ---------------------------------------------------------------- what holds in every tree


def wild(seed):
    """A tree of random outcomes and random settings."""
    rng = random.Random(seed)
    kinds = ["step"] * 4 + ["right", "wrong", "eos", "cut"]

    def sample():
        kind = rng.choice(kinds)
        p = rng.uniform(0.01, 1)
        if kind == "step":
            return said(f"step {rng.randrange(6)}", p)
        if kind in ("eos", "cut"):
            return said("?", p, kind)
        return right(p) if kind == "right" else wrong(p)

    def policy(leaf):
        return [sample() for _ in range(6)]
    iterations = rng.randint(1, 40)
    breadth = rng.randint(1, 5)
    depth = rng.randint(1, 6)
    c_puct = rng.choice([0, 0.5, 1.5, 10])
    tree, _ = play(policy, iterations=iterations, breadth=breadth, depth=depth, c_puct=c_puct)
    return tree


def check_node(tree, i):
    """The two identities of the method, and the counts that they stand on."""
    nodes, node = tree.nodes, tree.nodes[i]
    children = [nodes[j] for j in node.children]
    credits = sum(tree.credit(j) for j in tree.path(i))
    before = nodes[0].value
    if node.terminal:
        assert (node.visits, node.value, children) == (1, node.reward, []), "visited again"
        assert credits == about(node.reward - before), "credits must telescope"
    else:
        assert i == 0 or credits == about(node.value - before)
        assert node.visits == sum(child.visits for child in children)
    if any(child.visits for child in children):
        after = 0
        for child in children:
            value = 0 if child.terminal else child.value
            after += child.visits * (child.reward + value)
        assert node.value == about(after / node.visits), "V = sum_a N(s') (r + V(s')) / sum_a N(s')"
    assert node.valid or node.terminal and node.reward == -1
    assert i == 0 or node.parent < i and i in nodes[node.parent].children
    have_ended = [child.terminal or child.exhausted for child in children]
    assert node.exhausted == (all(have_ended) and bool(children))


@pytest.mark.parametrize("source", ["random outcomes", "model"])
def test_identities(source, trees):
    grown = map(wild, range(60)) if source == "random outcomes" else trees.values()
    everything = []
    for tree in grown:
        assert tree.nodes[0].visits == sum(node.terminal for node in tree.nodes), "an outcome lost, or twice"
        for i in range(len(tree.nodes)):
            check_node(tree, i)
        everything += tree.nodes
    kinds = {(node.terminal, node.reward, node.valid) for node in everything}
    assert kinds == {
        (False, 0, True),
        (True, 1, True),
        (True, -1, True),
        (True, -1, False)}
    assert any(-1 < node.value < 1 and node.visits for node in everything)


# ---------------------------------------------------------------- the engine: the numbers of the bare model


def test_stored_logprobs_are_those_of_the_bare_model(lm, trees):
    """For every node of every tree; prompts of very different lengths share the batch. A larger difference
    means a wrong key, value or position. (Other architectures: test_models.py; types: test_precision.py.)"""
    depths = []
    last = set()
    for tree in trees.values():
        for i in leaves(tree):
            logprobs = plain_logprobs(lm, tree.prompt, path_tokens(tree, i))
            for j in tree.path(i):
                node = tree.nodes[j]
                n = len(node.tokens)
                assert sum(logprobs[:n]) == about(node.logprob, abs=1e-9)
                logprobs = logprobs[n:]
                depths.append(node.depth)
                last.add(node.tokens[-1])
    assert len(depths) > 60 and sum(depth > 2 for depth in depths) > 10, "too little to prove anything"
    assert last & EOS


VARIANTS = {"1 slot": dict(slots=1),
            "3 slots": dict(slots=3),
            "16 slots": dict(slots=16),
            "one job at a time": dict(kv_budget=90_000),
            "little kept": dict(kv_budget=150_000, slots=2),
            "other order": dict(problems=PROBLEMS[::-1], slots=2),
            "alone": dict(problems=PROBLEMS[3:4])}


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_same_trees(variant, lm, tok, trees):
    """Neither the batch, nor the memory, nor the other questions change a tree."""
    for question, tree in grown(lm, tok, **VARIANTS[variant]).items():
        got, expected = tree.record(), trees[question].record()
        for node, twin in zip(got["nodes"], expected["nodes"]):
            assert node.pop("logprob") == about(twin.pop("logprob"), abs=1e-9)
        assert got == expected


@pytest.mark.parametrize("settings", [dict(), dict(kv_budget=90_000, slots=2)], ids=str)
def test_how_the_work_is_cut_changes_no_tree(settings, lm, tok, trees, monkeypatch):
    """Three siblings at two a lane, whose parts then start and end on their own; hardly any room at first, so
    that lanes are widened and jobs sent back again and again."""
    monkeypatch.setattr(mcts.Engine, "SHARE", 2)
    monkeypatch.setattr(mcts.Scheduler, "HEADROOM", 1)
    found = grown(lm, tok, **settings)
    assert are_equal(found, trees)
    for question, tree in found.items():
        for node, twin in zip(tree.nodes, trees[question].nodes):
            assert (node.visits, node.logprob) == (twin.visits, about(twin.logprob, abs=1e-9))


@pytest.mark.parametrize("call", [-math.inf, math.inf], ids=["lane by lane", "together"])
def test_how_lanes_are_attended_to_changes_no_tree(call, lm, tok, trees, monkeypatch):
    """Each by itself, as wide as it is, by its live samples; or all in one call, padded to the widest."""
    monkeypatch.setattr(mcts.Cache, "CALL", call)
    assert are_equal(grown(lm, tok, PROBLEMS[:3]), trees)


def test_other_seed_other_trees(lm, tok, trees):
    for question, tree in grown(lm, tok, seed=1).items():
        assert steps(tree) != steps(trees[question])


def test_more_iterations_continue_the_same_tree(lm, tok, trees):
    """A short search is the beginning of a long one: the randomness belongs to the path, not to the clock."""
    for question, tree in grown(lm, tok, iterations=4).items():
        assert steps(tree) == steps(trees[question])[:len(tree.nodes)]


@pytest.fixture
def engines(monkeypatch):
    """Every Engine made in a test; each checks its books whenever it advances."""
    made = []

    class Audited(mcts.Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.bytes = 0                      # of keys and values, at most
            made.append(self)

        def advance(self):
            jobs = super().advance()
            kept = sum(block.nbytes for segment in self.store.segments.values() for block in segment)
            assert self.store.stored == kept
            self.bytes = max(self.bytes, kept + self.cache.nbytes)
            return jobs

    monkeypatch.setattr(mcts, "Engine", Audited)
    return made


def test_nothing_is_computed_twice(lm, tok, engines):
    """With memory to spare a prompt is prefilled once, all but its last token, and a step never; of finished
    trees nothing stays, since the keys and values of thousands would fill the memory."""
    trees = grown(lm, tok, PROBLEMS[1:], slots=2)
    (engine,) = engines
    nodes = [node for tree in trees.values() for node in tree.nodes]
    prefilled = engine.stats["prefilled"]
    assert prefilled == sum(len(tree.prompt) - 1 for tree in trees.values())
    assert engine.stats["reused"] > 5 * prefilled
    assert engine.stats["sampled"] >= sum(len(node.tokens) for node in nodes)
    assert not engine.store.segments


def test_lanes_move_without_a_loss():
    """What they hold survives every change of their stride and number, and nothing else may be NaN."""
    rng = random.Random(0)
    common = 2, 3                               # heads, and their size
    other = 1, 4
    layers = [(common, common), (other, common)]
    cache = mcts.Cache(layers, torch.float32, torch.device("cpu"), max_lanes=6, siblings=2, columns=120)
    three, one = cache.blocks
    assert (three.shape, one.shape) == ((3, 2, 120, 3), (1, 1, 120, 4))
    for block in cache.blocks:
        block[:] = math.nan
    held = {}                                   # lane -> what it holds
    for _ in range(200):
        used = {lane: segment[0].shape[2] for lane, segment in held.items()}
        least = max(used.values(), default=1)
        most = 120 // max(1, len(held))
        stride = rng.randint(least, most)
        numbers = cache.resize(stride, used)
        held = {numbers[lane]: segment for lane, segment in held.items() if rng.random() < 0.6}
        free = [lane for lane in range(cache.room()) if lane not in held]
        if free:
            lane = rng.choice(free)
            n = rng.randint(1, stride)
            held[lane] = [torch.randn(3, 2, n, 3), torch.randn(1, 1, n, 4)]
            cache.put(lane * stride, [held[lane]])
        for lane, segment in held.items():
            kept = cache.take(lane * stride, segment[0].shape[2])
            assert all(torch.equal(a, b) for a, b in zip(kept, segment))
        room = cache.room() * stride
        assert not any(block[:, :, :room].isnan().any() for block in cache.blocks)


LONG = dict(question="Add 3 to 4. Then double it. " * 20, answer="7")           # twenty times the others
SHORT = [dict(question=f"Add {i} to 4.", answer="7") for i in range(8)]
COLUMN = 2 * 2 * 2 * 8 * 8                      # bytes: of layers, K and V, heads, their size, float64


@pytest.mark.parametrize("columns", [350, 600, 5000])
def test_memory_is_bounded(lm, tok, engines, columns):
    """Live and stored, all the time, whatever the questions: a long one narrows the batch for a while."""
    budget = columns * COLUMN
    got = grown(lm, tok, SHORT + [LONG] + SHORT[:4], slots=4, kv_budget=budget)
    assert len(got) == len(SHORT) + 1
    assert 0 < engines[0].bytes <= budget
    assert engines[0].store.stored == 0, "finished trees leave nothing behind"
    assert are_equal(grown(lm, tok, [LONG]), got)


def test_what_cannot_fit_alone_is_skipped(lm, tok, capsys):
    """With one sentence; the others are searched."""
    got = grown(lm, tok, [SHORT[0], LONG, SHORT[1]], slots=4, kv_budget=150 * COLUMN)
    assert got.keys() == {SHORT[0]["question"], SHORT[1]["question"]}
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not fit into the KV memory" in line and LONG["question"][:40] in line
    assert mcts.sample(lm, tok, [SHORT[0]["question"]], kv_budget=0) == [[]]


def test_jobs_that_gave_up_their_lane_draw_the_same(lm, tok, engines, monkeypatch):
    """Eight whole responses in memory for three: the last in order start again, and nobody can tell."""
    settings = dict(n=2, max_new_tokens=40, slots=4)
    monkeypatch.setattr(mcts.Scheduler, "HEADROOM", 4)
    starts = []
    begin = mcts.Engine.begin

    def counted(*args):
        starts.append(args)
        begin(*args)
    monkeypatch.setattr(mcts.Engine, "begin", counted)
    narrow = drawn(lm, tok, PROMPTS, kv_budget=200 * COLUMN, **settings)
    assert len(starts) > len(PROMPTS), "none was sent back"
    assert narrow == drawn(lm, tok, PROMPTS, **settings)
    assert engines[0].stats["sampled"] == engines[1].stats["sampled"]


# ---------------------------------------------------------------- whole responses


PROMPTS = [QUESTIONS[1], QUESTIONS[4], QUESTIONS[0], QUESTIONS[3]]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_greedy_is_that_of_transformers(kind, tok):
    """Temperature 0 must write what `generate` writes, to the EOS or the answer."""
    likely = tiny.CHANCES | {MARKER: 12, tiny.END: 12, tiny.TURN: 12}
    ends = set()
    for seed in range(3):
        lm = tiny.model(kind, torch.float64, seed, likely)
        responses = mcts.sample(lm, tok, PROMPTS, temperature=0, max_new_tokens=24)
        for prompt, (sample,) in zip(PROMPTS, responses):
            inputs = tok(prompt, return_tensors="pt")
            (generated,) = lm.generate(**inputs, do_sample=False, max_new_tokens=24, pad_token_id=0).tolist()
            prompt = inputs.input_ids[0].tolist()
            expected = generated[len(prompt):]
            used = len(sample.tokens)
            assert sample.tokens == expected[:used]
            assert sample.end == "answer" or used == len(expected)
            assert (sample.end == "eos") == (sample.tokens[-1] in EOS)
            assert sample.logprobs == about(plain_logprobs(lm, prompt, sample.tokens), abs=1e-9)
            ends.add(sample.end)
    assert ends >= {"eos", "cut"}, "too few different ends to prove anything"


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampled_responses(temperature, lm, tok):
    """At any temperature log-probs are those at 1, EOS has one and comes last, and slots change nothing."""
    settings = dict(n=8, temperature=temperature, max_new_tokens=30)
    responses = mcts.sample(lm, tok, PROMPTS, slots=3, **settings)
    one_slot = mcts.sample(lm, tok, PROMPTS, slots=1, **settings)
    all_slots = mcts.sample(lm, tok, PROMPTS, slots=16, **settings)
    ends = set()
    last = set()
    for prompt, samples in zip(PROMPTS, responses):
        assert len(samples) == 8
        for sample in samples:
            expected = plain_logprobs(lm, tok(prompt).input_ids, sample.tokens)
            *others, final = sample.tokens
            assert sample.logprobs == about(expected, abs=1e-9)
            assert not EOS & {*others}
            assert (final in EOS) == (sample.end == "eos")
            assert sample.end != "cut" or len(sample.tokens) == 30
            ends.add(sample.end)
            last.add(final)
    assert ends >= {"answer", "eos"} and last >= EOS
    for samples in zip(chain(*responses), chain(*one_slot), chain(*all_slots)):
        assert len({(*sample.tokens, sample.end) for sample in samples}) == 1


def test_prompts_as_text_or_tokens(lm, tok):
    ids = [tok(prompt).input_ids for prompt in PROMPTS]
    responses = mcts.sample(lm, tok, PROMPTS, max_new_tokens=8)
    assert responses == mcts.sample(lm, tok, ids, max_new_tokens=8)
    assert mcts.sample(lm, tok, []) == []


def test_a_prompt_given_again_draws_other_samples(lm, tok):
    """The first draws what it would alone, the second is independent of it, and both are reproducible."""
    settings = dict(n=3, max_new_tokens=12)
    one, two = PROMPTS[:2]
    first, other, second = drawn(lm, tok, [one, two, one], **settings)
    assert [first, other] == drawn(lm, tok, [one, two], **settings)
    assert [first, second] == drawn(lm, tok, [one, one], **settings)
    assert not any(tokens in first for tokens in second)


# ---------------------------------------------------------------- random numbers by key


def far(freedom):
    """The chi-squared value that chance exceeds once in 10,000 (by Wilson and Hilferty). Keys are fixed."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.72 * math.sqrt(spread)) ** 3


def chi_squared(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def keyed_draws(logits, temperature=1.0, paths=5, length=50, n=80):
    """(paths, n, length) tokens drawn from one distribution, under the keys that a search would use."""
    words = []
    for i in range(paths):
        key = mcts.hash_tokens(bytes(8), [i])
        words.append(torch.tensor(mcts.random_words(key, length, n)).reshape(-1, 2))
    hashes = mcts.hash_vocabulary(len(logits), "cpu")
    rows = logits.expand(paths * length * n, -1)
    token, logprob = mcts.pick(rows, torch.cat(words), hashes, temperature)
    assert torch.allclose(logprob, logits.log_softmax(-1)[token]), "log-probs are those at temperature 1"
    return token.view(paths, n, length)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [2, 8, 300])
def test_draws_follow_the_softmax(size, temperature):
    """20,000 keyed draws against softmax(logits / temperature)."""
    logits = 0.7 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    counts = keyed_draws(logits, temperature).flatten().bincount(minlength=size)
    expected = 20_000 * (logits / temperature).softmax(-1)
    assert chi_squared(counts, expected) < far(size - 1)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["paths", "siblings", "positions"])
def test_draws_of_neighbours_are_independent(axis):
    """Pairs of tokens one question, sibling or position apart fill a 4 x 4 table evenly; correlated siblings
    would be one sample counted five times."""
    tokens = keyed_draws(torch.zeros(4), paths=6).movedim(axis, 0)
    pairs = 4 * tokens[0::2] + tokens[1::2]
    counts = pairs.flatten().bincount(minlength=16)
    assert chi_squared(counts, counts.sum() / 16) < far(15)


def test_a_key_does_not_depend_on_the_limit():
    """A longer step limit, or another batch, draws the same tokens."""
    key = mcts.hash_tokens(bytes(8), [1, 2, 3])
    short = mcts.random_words(key, 5, 3)
    long = mcts.random_words(key, 9, 3)
    assert np.array_equal(short, long[:, :5])
    shorter = mcts.hash_tokens(bytes(8), [1, 2])
    swapped = mcts.hash_tokens(bytes(8), [2, 1])
    assert len({key, shorter, swapped}) == 3


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_first_tokens_follow_the_model(temperature, lm, tok):
    """End to end: 2,000 samples of one token against the model's own distribution (rare tokens pooled)."""
    prompt = tok(QUESTIONS[1]).input_ids
    (samples,) = drawn(lm, tok, [prompt], n=2000, temperature=temperature, max_new_tokens=1)
    counts = torch.tensor(samples).flatten().bincount(minlength=lm.config.vocab_size).double()
    with torch.no_grad():
        logits = lm(torch.tensor([prompt])).logits[0, -1]
    expected = 2000 * (logits / temperature).softmax(-1)
    common = expected > 10
    assert common.sum() > 5

    def pooled(x):
        rare = x[~common].sum()
        return torch.cat((x[common], rare[None]))
    assert chi_squared(pooled(counts), pooled(expected)) < far(int(common.sum()))


# ---------------------------------------------------------------- what is refused, and what is left as it was


@pytest.mark.parametrize("name, value", table("""
setting          value
breadth          0
depth            0
iterations       0
candidates       4
c_puct           -0.1
c_puct           nan
slots            0
max_step_tokens  0
kv_budget        -1
"""))
def test_settings_out_of_range(name, value, lm, tok):
    """Told at the call, not at the first tree, and by the name of the flag."""
    flag = name.replace("_", "-")
    with pytest.raises(InputError, match=f"--{flag} is"):
        mcts.search(lm, tok, PROBLEMS, reward, **{name: float(value)})


def test_steps_longer_than_their_limit_are_refused(lm, tok):
    with pytest.raises(InputError, match="--max-step-tokens is 8, but must be at least 9"):
        mcts.search(lm, tok, PROBLEMS, reward, max_step_tokens=8, format=Format(step_tokens=9))


@pytest.mark.parametrize("name", ["n", "temperature", "max_new_tokens", "slots"])
def test_sampling_settings_out_of_range(name, lm, tok):
    value = -1 if name == "temperature" else 0
    with pytest.raises(InputError, match="must be at least"):
        mcts.sample(lm, tok, PROMPTS, **{name: value})


def test_prompts_longer_than_the_context_are_skipped(tok, capsys):
    """One of two prompts fills the context: it is named on stderr, and the other is searched all the same."""
    lm = tiny.model("llama", torch.float64, max_position_embeddings=48)
    short, long = QUESTIONS[1], LONGEST
    assert list(grown(lm, tok, [PROBLEMS[4], PROBLEMS[1]])) == [short]
    assert capsys.readouterr().err.count("\n") == 1
    empty, one = mcts.sample(lm, tok, [long, short], max_new_tokens=4)
    assert empty == [] and len(one) == 1
    err = capsys.readouterr().err
    assert err.startswith("skipped: ") and "context of 48" in err and long[:40] in err


def test_no_path_outgrows_the_context(tok):
    """A step that fills the context is cut: positions beyond were never trained; a learned table has none."""
    context = 20
    lm = tiny.model("llama", torch.float64, max_position_embeddings=context)
    full = 0
    for seed in range(3):
        for tree in grown(lm, tok, PROBLEMS[:3], depth=9, seed=seed).values():
            for i in leaves(tree):
                size = len(tree.prompt) + len(path_tokens(tree, i))
                assert size <= context
                assert size < context or tree.nodes[i].terminal, "no step can follow"
                full += size == context
    assert full > 5, "the limit was hardly reached"


def test_the_model_stays_as_it_is(lm, tok):
    """Between two trees and after an error: its own attention, gradients, the same logits."""
    def broken(text, answer):
        raise RuntimeError("the grader failed")

    own = lm.config._attn_implementation
    ids = torch.tensor([tok(QUESTIONS[1]).input_ids])
    expected = lm(ids).logits
    for _ in searching(lm, tok, PROBLEMS[:3]):
        logits = lm(ids).logits
        assert lm.config._attn_implementation == own
        assert logits.requires_grad and torch.equal(logits, expected)
    with pytest.raises(RuntimeError, match="grader"):
        list(searching(lm, tok, reward_fn=broken))
    with torch.no_grad():
        mcts.sample(lm, tok, PROMPTS, max_new_tokens=2)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert lm.config._attn_implementation == own


def test_half_a_tree_by_other_weights_is_none(tok):
    """Training between two trees of one search is refused, as others are half grown."""
    lm = tiny.model("llama", torch.float64)
    half = searching(lm, tok)
    next(half)
    with torch.no_grad():
        lm.lm_head.weight.mul_(1.01)
    with pytest.raises(InputError, match="weights changed"):
        list(half)


def test_a_model_may_be_trained_after_the_last_tree_and_between_batches(tok):
    """Nothing is half drawn then: only where samples are in flight are other weights refused."""
    lm = tiny.model(dtype=torch.float64)
    for _ in mcts.stream(lm, tok, [[5, 6, 7]], max_new_tokens=4):
        lm.lm_head.weight.data.mul_(1.01)


def test_a_ready_engine_forgets_what_other_weights_have_computed(tok):
    lm = tiny.model("llama", torch.float64)
    engine, settings = ready_engine(lm, tok)
    few = PROBLEMS[:3]
    before = by_question(mcts.search(lm, tok, few, reward, **settings))
    assert len(before) == 3
    lm.lm_head.weight.data.mul_(0.5)
    for layer in lm.model.layers:
        layer.self_attn.k_proj.weight.data.mul_(1.5)
    after = by_question(mcts.search(lm, tok, few, reward, **settings))
    assert are_equal(after, grown(lm, tok, few))
    assert not are_equal(before, after)


def test_threads_share_a_model(tok, trees):
    """Three searches at once, on a model that none of them has checked yet, find what one finds."""
    lm = tiny.model("llama", torch.float64)
    found = []

    def work(slots):
        found.append(grown(lm, tok, PROBLEMS[:3], slots=slots))
    threads = [threading.Thread(target=work, args=(slots,)) for slots in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(are_equal(one, trees) and len(one) == 3 for one in found)


def test_a_ready_engine(lm, tok, trees):
    """It can be looked at, serves one search after the other, and says for itself what it was made for."""
    engine, settings = ready_engine(lm, tok)
    for _ in range(2):
        next(mcts.search(lm, tok, PROBLEMS, reward, **settings))    # and no more of it
        found = by_question(mcts.search(lm, tok, PROBLEMS, reward, **settings))
        assert found.keys() == trees.keys() and are_equal(found, trees)
        assert all(found[question].config == trees[question].config for question in trees)
    assert engine.stats["forwards"] > 50


def test_an_engine_serves_one_search_at_a_time(lm, tok, trees):
    """The one that began last is served as if alone; the one before is refused when it would go on."""
    _, settings = ready_engine(lm, tok)
    first = mcts.search(lm, tok, PROBLEMS, reward, **settings)
    second = mcts.search(lm, tok, PROBLEMS, reward, **settings)
    next(first)
    found = [next(second)]
    with pytest.raises(InputError, match="another search has begun on this engine"):
        list(first)
    found += second
    assert len(found) == len(trees)
    assert are_equal(by_question(found), trees)
    last = mcts.search(lm, tok, PROBLEMS[:1], reward, **settings)
    next(last)
    list(mcts.search(lm, tok, PROBLEMS, reward, **settings))
    assert not list(last), "nothing was left to do"


@pytest.mark.parametrize("how", [{"whole": True}, {"temperature": 0.5}, {}], ids=str)
def test_an_engine_made_for_something_else(how, lm, tok):
    engine = mcts.Engine(lm, tok, siblings=3, max_tokens=12, **how)
    with pytest.raises(InputError, match="draws for another model, whole responses, or not at temperature 1"):
        mcts.search(lm if how else tiny.model(), tok, PROBLEMS, reward, engine=engine)


def test_the_text_of_a_token_keeps_its_space():
    """Some decoders drop that of the first."""
    words = models.WordLevel({"<unk>": 0, "\u2581a": 1, "\u2581b": 2, "b": 3}, unk_token="<unk>")
    core = tokenizers.Tokenizer(words)
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    assert mcts.tokens_with(tokenizer, 4, " ") == {1, 2}


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode(inside, lm, tok, trees):
    """A search that is made in inference mode goes on outside of it, and the other way round."""
    with torch.inference_mode(inside):
        search = searching(lm, tok, PROBLEMS[:3])
    with torch.inference_mode(not inside):
        assert are_equal(by_question(search), trees)


class Wrapper(torch.nn.Module):
    """As dvo.Policy: a module whose forward is that of the LM in it."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.config = lm.config
        self.generation_config = lm.generation_config
        self.device = lm.device

    def forward(self, **inputs):
        return self.lm(**inputs)


def test_a_wrapped_model(lm, tok, trees):
    assert are_equal(grown(Wrapper(lm), tok, PROBLEMS[:3]), trees)


@pytest.mark.parametrize("kind, settings", [
    ("llama", {}),
    ("mistral", dict(sliding_window=4)),
    ("gpt2", {})])
def test_our_attention_under_activation_checkpointing(kind, settings):
    """The backward pass runs the layers again when the call has returned: with our attention, not its own."""
    lm = tiny.model(kind, torch.float64, **settings)
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens = torch.arange(5, 17)[None]
    T = torch.arange(12)
    behind = T[:, None] - T
    seen = (behind >= 0) & (behind % 2 == 0)                        # not causal: its own would be wrong
    attention = mcts.tree_attention(seen[None], T[None])
    weights = list(lm.parameters())

    def gradient():
        hidden = mcts.hidden_states(lm, tokens, T[None], attention)[0]
        logits = mcts.logits_of(lm)(hidden)
        return torch.autograd.grad(logits.log_softmax(-1)[:, 7].sum(), weights)

    lm.train()
    expected = gradient()
    enable = getattr(lm, "activation_checkpointing_enable", None)
    enable = enable or lm.gradient_checkpointing_enable             # its name in older transformers
    enable(dict(use_reentrant=False))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradient(), expected))
    logprobs = lm(tokens).logits.log_softmax(-1)
    causal = torch.autograd.grad(logprobs[0, :, 7].sum(), weights)
    assert not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(causal, expected))


def broken(lm, how):
    if how == "NaN":
        lm.model.layers[1].mlp.up_proj.weight.data[3, 3] = math.nan
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
        with pytest.raises(InputError, match=f"LlamaForCausalLM .* as it is: .*{reason}") as refusal:
            mcts.sample(lm, tok, PROMPTS)
    assert "take a decoder" not in str(refusal.value)               # its kind is not to blame
    assert "served" not in vars(lm)


def test_dropout_or_autocast_that_come_after_the_check():
    lm = tiny.model()
    mcts.check_model(lm)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="autocast is on"):
        mcts.check_model(lm)
    with pytest.raises(InputError, match="train mode with dropout"):
        mcts.check_model(broken(lm, "dropout"))
    mcts.check_model(lm.eval())


def test_logits_that_turn_to_nan(tok):
    """They would draw token 0 for ever and write NaN into the trees."""
    lm = tiny.model()
    mcts.check_model(lm)
    with pytest.raises(InputError, match="logits are not finite"):
        list(searching(broken(lm, "NaN"), tok))


def test_an_eos_beyond_the_logits(tok):
    lm = tiny.model()
    lm.generation_config.eos_token_id = [0, 999]
    with pytest.raises(InputError, match="EOS token is 999, but the model has only 370"):
        mcts.sample(lm, tok, PROMPTS)


# ---------------------------------------------------------------- formats and rewards


def as_text(tokenizer, question):
    return f"Problem: {question}"


def as_ids(tokenizer, question):
    return tokenizer(question).input_ids[:3]


FORMATS = {"single newline": Format(step_end="\n", instruction=""),
           "fixed": Format(step_tokens=4, instruction=""),
           "marker": Format(marker=" So", instruction=""),
           "prompt": Format(prompt=as_text),
           "prompt of ids": Format(prompt=as_ids)}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_keeps_its_negatives(name, tok):
    """Whatever ends a step or announces an answer, right and wrong training paths of several steps remain."""
    format = FORMATS[name]
    newlines = {"\n": 14, "\n\n": 1, ".\n\n": 1} if name == "single newline" else {}
    lm = tiny.model("llama", torch.float64, chances=tiny.CHANCES | newlines)

    def grade(text, answer, marker):
        return 1 if "7" in text.rpartition(marker)[2] else -1
    endings = collections.Counter()
    deepest = 0
    for tree in searching(lm, tok, reward_fn=grade, format=format, iterations=40):
        endings += tree.endings()
        for i, node in enumerate(tree.nodes[1:], 1):
            if not node.terminal:
                fixed = len(node.tokens) == format.step_tokens
                assert fixed if format.step_tokens else format.step_end in node.text
            elif node.valid:
                response = "".join(tree.nodes[j].text for j in tree.path(i))
                assert format.marker in response or node.reward > 0
                deepest = max(deepest, node.depth)
    assert endings["right"] >= 3 and endings["wrong"] > 5 and deepest > 1, endings


@pytest.mark.parametrize("name, value", [("step_tokens", 0), ("step_end", ""), ("marker", "")])
def test_formats_that_are_none(name, value):
    with pytest.raises(InputError):
        Format(**{name: value})


@pytest.mark.parametrize("reward", [0, 0.5, True, False, None, "1", torch.tensor(1.0), math.nan, 2])
def test_rewards_are_plus_or_minus_one(reward, lm, tok):
    """At the first other one the search ends with a sentence: 0 for wrong would lose every negative."""
    with pytest.raises(InputError, match="the reward function returned .*a reward is"):
        list(searching(lm, tok, reward_fn=lambda text, answer: reward))


def test_a_reward_function_gets_what_it_asks_for(lm, tok):
    """Further fields of the problem and the marker, by name."""
    problem = dict(question=QUESTIONS[1], answer="7", unit="cm", other=5)
    seen = set()

    def grade(text, answer, unit, marker, level=3):
        seen.add((answer, unit, marker, level))
        return np.int64(1)
    (tree,) = searching(lm, tok, [problem], grade)
    assert seen == {("7", "cm", MARKER, 3)}
    assert type(tree.nodes[-1].reward) is int
    json.loads(tree.to_json())


def test_a_reward_function_with_any_keywords_gets_the_other_fields(lm, tok):
    problem = dict(question=QUESTIONS[1], answer="7", level=2)
    seen = []

    def grade(text, answer, **fields):
        seen.append(fields)
        return -1
    list(searching(lm, tok, [problem], grade, iterations=8))
    assert seen and all(fields == {"level": 2} for fields in seen)


# ---------------------------------------------------------------- around the search


def test_problems_are_read_as_slots_become_free(lm, tok):
    """An endless stream of questions can be searched: two trees a slot are open at a time."""
    taken = []

    def endless():
        while True:
            taken.append(f"Add {len(taken)} to 4.")
            yield dict(question=taken[-1], answer="7")

    first = next(searching(lm, tok, endless(), slots=2))
    assert len(taken) == 4 and first.question in taken


def test_progress_counts_every_iteration(lm, tok):
    """Trees that end early count their rest, so that a bar of len(problems) * iterations fills."""
    done = []
    trees = grown(lm, tok, progress=done.append)
    assert sum(done) == len(trees) * SETTINGS["iterations"]
    assert any(tree.nodes[0].exhausted for tree in trees.values()), "no tree ended early"


def test_progress_of_responses_counts_tokens(lm, tok):
    """From the first token on, to the last that a response might have had."""
    done = []
    prompts = [*PROMPTS, " "]
    responses = mcts.stream(lm, tok, prompts, n=3, max_new_tokens=20, progress=done.append)
    for index, samples in responses:
        assert len(samples) == (0 if index == 4 else 3)
    assert sum(done) == len(prompts) * 3 * 20
    assert len(done) > 20


def test_the_grader_sees_whole_responses(lm, tok):
    """From the first step to the last, special tokens left out, with the gold answer."""
    seen = set()

    def spy(text, answer):
        seen.add((text, answer))
        return -1
    ended = set()
    for tree in searching(lm, tok, reward_fn=spy):
        for i in leaves(tree):
            if tree.nodes[i].terminal and tree.nodes[i].valid:
                text = tok.decode(path_tokens(tree, i), skip_special_tokens=True)
                ended.add((text, "7"))
    assert ended and ended <= seen
    assert not any(tiny.END in text or tiny.TURN in text for text, _ in seen)


PLAIN = "{instruction}\n\nProblem: 1 + 1?\n\nSolution:\n\n"
CHAT = """{% for m in messages %}[{{ m.role }}] {{ m.content }}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
NO_SYSTEM = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}
<{{ m.content }}>{% endfor %}"""


@pytest.mark.parametrize("template, expected", [
    (None, PLAIN),
    (CHAT, "[system] {instruction}\n[user] 1 + 1?\n[assistant]"),
    (NO_SYSTEM, "<{instruction}\n\n1 + 1?>")], ids=["plain", "chat", "no system turn"])
def test_prompt(template, expected):
    tok = tiny.tokenizer()
    tok.chat_template = template
    instruction = Format().instruction
    prompt = tok.decode(mcts.build_prompt(tok, "1 + 1?"))
    assert prompt == expected.format(instruction=instruction)
    assert "at most 8 steps" in instruction and "a blank line" in instruction and MARKER in instruction
    other = Format(step_end="\n", marker="####").instruction
    assert "a new line" in other and "####" in other


@pytest.mark.parametrize("said", ["content[:20]", "content | upper", "role"])
def test_a_template_that_changes_what_is_said_is_refused(said):
    tok = tiny.tokenizer()
    tok.chat_template = "{% for m in messages %}{{ m." + said + " }}{% endfor %}"
    with pytest.raises(InputError, match="chat template .it leaves out .*; repair it, or give Format a prompt"):
        mcts.build_prompt(tok, "Add 3 to the number of days in a week.")


def test_a_template_that_tells_the_date(tok):
    """The same prompt every day."""
    dated = tiny.tokenizer()
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    assert tok.decode(mcts.build_prompt(dated, "1?", format=BARE)) == "26 Jul 2024: 1?"


def test_examples_are_shown(tok):
    bare = tiny.tokenizer(chat=False)
    ids = mcts.build_prompt(bare, "1 + 1?", [("2 + 2?", "Final Answer: 4")], BARE)
    first = "Problem: 2 + 2?\n\nSolution:\n\nFinal Answer: 4\n\n\n"
    assert tok.decode(ids) == first + "Problem: 1 + 1?\n\nSolution:\n\n"
    format = Format(prompt=lambda tokenizer, question, examples=(): f"{len(examples)} {question}")
    three = mcts.build_prompt(tok, "1?", [("2?", "2")] * 3, format)
    none = mcts.build_prompt(tok, "1?", format=format)
    assert (tok.decode(three), tok.decode(none)) == ("3 1?", "0 1?")


def test_special_tokens_around_a_thought_are_seen():
    """Else a marker that the thought quotes would announce an answer."""
    tok = tiny.tokenizer()
    tok.add_tokens([AddedToken(text, special=True) for text in ("[THINK]", "[/THINK]")])
    text = "[THINK] So [/THINK] 7"
    assert mcts.decoder(tok)(tok(text + tiny.END).input_ids) == text


def test_the_context_of_a_longrope_in_some_layers():
    rope = {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64}}
    config = SimpleNamespace(rope_parameters=rope, max_position_embeddings=512)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert mcts.context_length(model) == 64


def test_special_tokens_in_a_question_are_text(tok):
    """Else a question could end the user's turn."""
    ids = mcts.build_prompt(tok, f"a {tiny.TURN} b", format=BARE)
    assert tok.decode(ids) == f"a {tiny.TURN} b"
    assert not EOS & {*ids}
    question = f"<<{tiny.END}>> a {tiny.END} b"
    framed = tiny.tokenizer()
    framed.chat_template = "{{ '<|end|>' }}[{{ messages[-1].content }}]{{ '<|turn|>' }}"
    first, *inner, last = mcts.build_prompt(framed, question, format=BARE)
    assert (first, last) == (0, 1)
    assert not EOS & {*inner}
    assert framed.decode(inner) == f"[{question}]"


@pytest.mark.parametrize("question, examples", [
    (f"What? {tiny.END} x", [("What?", "4")]),                      # which begins like another text
    (tiny.END, []), ("|end|", [(f"a {tiny.TURN}", "4")])])          # which are in the template, too
def test_only_the_special_tokens_of_the_template_are_special(question, examples):
    framed = tiny.tokenizer()
    framed.chat_template = "{% for m in messages %}[{{ m.content }}]{{ '<|end|>' }}{% endfor %}"
    ids = mcts.build_prompt(framed, question, examples, format=BARE)
    said = [*sum(examples, ()), question]
    assert framed.decode(ids) == "".join(f"[{text}]{tiny.END}" for text in said)
    assert [token for token in ids if token in EOS] == [0] * len(said)


def test_bos_and_eos_of_a_prompt(tok):
    """One BOS, where the tokenizer adds one; no EOS, though it may add one."""
    both = tiny.tokenizer(chat=False)
    both.bos_token = tiny.TURN
    both._tokenizer.post_processor = TemplateProcessing(
        single=f"{tiny.TURN} $A {tiny.END}", special_tokens=[(tiny.TURN, 1), (tiny.END, 0)])
    plain = tok("Add 3.").input_ids
    assert both("Add 3.").input_ids == [1, *plain, 0]
    assert mcts.encode(both, "Add 3.") == [1, *plain]
    assert mcts.encode(both, f"{tiny.TURN}Add 3.") == [1, *plain]


def test_a_prompt_function_is_asked_real_questions_only(lm, tok):
    asked = []

    def prompt(tokenizer, question):
        asked.append(question)
        return question
    grown(lm, tok, format=Format(prompt=prompt), iterations=2)
    assert sorted(asked) == sorted(QUESTIONS)


def test_blank_questions_are_skipped(lm, tok, capsys):
    blank = dict(question=" ", answer="1")
    assert list(grown(lm, tok, [blank, PROBLEMS[0]], format=Format())) == [QUESTIONS[0]]
    assert capsys.readouterr().err.startswith("skipped: a blank question")


# ---------------------------------------------------------------- trees on disk and on the screen


def small_tree():
    tree = Tree("1 + 1?", "2", [5, 6], {"seed": 0})
    tree.nodes[0].visits = 3
    tree.nodes[0].value = -1 / 3
    ended = dict(visits=1, terminal=True)
    add = tree.add(Node(0, [10, 11], -0.5, visits=2, text="Add.\n\n"))
    guess = tree.add(Node(0, [12], -1.5, visits=1, value=-1.0, text="Guess,\nthen see.\n\n"))
    tree.add(Node(add, [13, 1], -0.25, value=1.0, reward=1, text="Final Answer: 2", **ended))
    tree.add(Node(add, [14], -2.0, value=-1.0, reward=-1, valid=False, text="naïve", **ended))
    tree.add(Node(guess, [15], -0.125, value=-1.0, reward=-1, text="Final Answer: 3\n\n", **ended))
    tree.add(Node(0, [16], -3.0, text="Later.\n\n"))
    return tree


ROOT = """{"parent": -1, "tokens": [], "logprob": 0.0, "visits": 3, "value": -0.3333333333333333, \
"reward": 0, "terminal": false, "valid": true, "text": "", "count": 1}"""
ANSWER = """{"parent": 1, "tokens": [13, 1], "logprob": -0.25, "visits": 1, "value": 1.0, "reward": 1, \
"terminal": true, "valid": true, "text": "Final Answer: 2", "count": 1}"""


def test_the_file_format():
    """Others read these lines: names, order and spelling are fixed."""
    line = small_tree().to_json()
    head = '{"question": "1 + 1?", "answer": "2", "prompt": [5, 6], "config": {"seed": 0}, "nodes": ['
    assert line.startswith(head + ROOT)
    assert ANSWER in line
    assert "\n" not in line and "naïve" in line


def test_round_trip(trees, tmp_path):
    """Nothing of a tree is lost on disk but what the search alone needs (exhausted)."""
    path = tmp_path / "trees.jsonl"
    written = [small_tree(), *trees.values()]
    lines = [tree.to_json() for tree in written]
    path.write_text("\n".join(lines), encoding="utf-8")
    read = list(mcts.read_trees(path))
    assert [tree.to_json() for tree in read] == lines
    for tree, twin in zip(read, written):
        assert tree.nodes == [dataclasses.replace(node, exhausted=False) for node in twin.nodes]


def test_what_a_search_writes_into_a_tree(lm, tok, trees):
    tree = trees[QUESTIONS[1]]
    steps = tree.nodes[1:]
    assert tree.prompt == tok(QUESTIONS[1]).input_ids
    assert tree.answer == "7"
    assert tree.config == dict(iterations=15, breadth=3, depth=5, c_puct=1.5, candidates=3, seed=0,
                               max_step_tokens=12, tokenizer=mcts.fingerprint(tok), step_end="\n\n",
                               step_tokens=None, marker=MARKER, eos=[0, 1])
    assert all(node.text == tok.decode(node.tokens, skip_special_tokens=True) for node in steps)
    assert max(len(node.children) for node in tree.nodes) == 3
    assert max(node.depth for node in steps) <= 5
    assert max(len(node.tokens) for node in steps) <= 12


def changed(old, new):
    """The line of the small tree with its first `old` as `new`."""
    line = small_tree().to_json()
    assert old in line
    return line.replace(old, new, 1).encode()


GOOD = small_tree().to_json().encode()
BROKEN = {"not JSON": b"{",
          "empty": b"",
          "list": b"[]",
          "number": b"7",
          "no fields": b"{}",
          "torn": GOOD[:-9],
          "not UTF-8": b"\xff" + GOOD,
          "no nodes": GOOD[:GOOD.index(b'[{"parent"')] + b"[]}",
          "parent is itself": changed('"parent": 1', '"parent": 3'),
          "parent comes later": changed('"parent": 1', '"parent": 5'),
          "two roots": changed('"parent": 1', '"parent": -1'),
          "parent unknown": changed('"parent": 1', '"parent": 9'),
          "field missing": changed('"visits"', '"visit"')}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_line_is_named(broken, tmp_path):
    """By file and line, so that it can be deleted by hand; never with a traceback."""
    path = tmp_path / "trees.jsonl"
    path.write_bytes(b"\n".join((GOOD, BROKEN[broken], GOOD)))
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
   └─ +0.00 ─ V -1.00  N 1   - Final Answer: 3
(unvisited steps left out: 1)"""


def test_drawing(capsys, monkeypatch):
    """Plain text, where stdout is no terminal; the steps not visited are only counted. On the edges credits:
    +0.33 is 0 + 1/3, -0.67 is -1 + 1/3."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\n".join(mcts.picture(small_tree())) == DRAWING
    narrow = list(mcts.picture(small_tree(), width=38))
    assert narrow[-3] == "└─ -0.67 ─ V -1.00  N 1     Guess, th…"
    assert max(map(len, narrow)) == 38


def test_colours(monkeypatch):
    """Red to green in a terminal, unless NO_COLOR is set."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert mcts.paint("x", -1) == "\033[38;5;196mx\033[0m"
    assert mcts.paint("x", 1) == "\033[38;5;46mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert mcts.paint("x", -1) == "x"


def test_a_reader_who_has_seen_enough(monkeypatch):
    """`mcts.py --show trees.jsonl | head` ends without a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        tasks.run_command(lambda: print("Add.\n" * 100_000))


# What a page shows of the small tree, in this order: every node below its parent, the unvisited in a fold.
PAGE = table("""
what is found in the page
V -0.33
&lt;/pre&gt;&lt;script&gt;&amp;
<i>+1.00</i>
class="right">+ Final Answer: 2
class="failed">x cut: naïve
</details>
Guess,
class="wrong">- Final Answer: 3
</details>
1 unvisited
Later.
</details></details>
""")


def test_page():
    """It needs nothing from elsewhere, and no text of a tree can become markup."""
    tree = small_tree()
    tree.nodes[1].text = "</pre><script>&\n\n"
    page = mcts.page([tree, tree])
    assert "<script" not in page and "http" not in page and "src=" not in page
    first, second = page.partition("</p>")[2].split("\n<details>")
    assert first == "<details>" + second
    assert "1 + 1?" in first and "-&gt; 2 · 1 right, 1 cut, 1 wrong" in first
    assert "Guess,\nthen see." in first
    assert first.count("<details>") == first.count("</details>") == 4
    for (text,) in PAGE:
        _, found, first = first.partition(text)
        assert found, text


# ---------------------------------------------------------------- the command


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["mcts.py", *map(str, args)])
    mcts.main()


ASKED = [f"Add {n} to 4." for n in (3, 4, 6, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and questions."""
    folder = tmp_path_factory.mktemp("search")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    lines = [json.dumps(dict(question=question, answer="7")) for question in ASKED]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def flags(folder, out, *more):
    files = "--model", folder / "model", "--data", folder / "questions.jsonl", "--out", out
    return *files, "--iterations", 3, "--max-step-tokens", 8, "--slots", 2, *more


def questions(path):
    return sorted(tree.question for tree in mcts.read_trees(path))


def test_the_command_goes_on(folder, tmp_path, monkeypatch, capsys):
    """Trees that are there are not searched again, and a torn line is dropped."""
    out = tmp_path / "trees.jsonl"
    command(monkeypatch, *flags(folder, out, "--limit", 2))
    assert len(questions(out)) == 2
    whole = out.read_text()
    out.write_text(whole + whole[:100])
    command(monkeypatch, *flags(folder, out))
    assert questions(out) == sorted(ASKED)
    assert out.read_text().startswith(whole)
    command(monkeypatch, *flags(folder, out, "--model", f"{folder}/../{folder.name}/model/"))
    assert questions(out) == sorted(ASKED)
    assert "0 questions searched now; of 4 questions" in capsys.readouterr().err
    with pytest.raises(InputError, match="trees of iterations 3, not 5: choose another --out"):
        command(monkeypatch, *flags(folder, out, "--iterations", 5))
    with pytest.raises(InputError, match="trees of model .*, not other: choose another --out"):
        command(monkeypatch, *flags(folder, out, "--model", "other"))


def test_each_rank_has_its_share_and_file(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        command(monkeypatch, *flags(folder, tmp_path / "trees.jsonl"))
    first, second = sorted(tmp_path.iterdir())
    assert (first.name, second.name) == ("trees.0.jsonl", "trees.1.jsonl")
    assert questions(first) == ["Add 3 to 4.", "Add 6 to 4."]
    assert questions(second) == ["Add 4 to 4.", "Add 5 to 4."]


def test_show_and_html(folder, tmp_path, monkeypatch, capsys):
    """As many trees as asked for, as wide as the terminal is."""
    out = tmp_path / "trees.jsonl"
    command(monkeypatch, *flags(folder, out))
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "44")
    command(monkeypatch, "--show", out, "--limit", 2)
    text = capsys.readouterr().out
    assert text.count("-> 7") == 2
    assert max(map(len, text.splitlines())) <= 44
    command(monkeypatch, "--html", out)
    assert capsys.readouterr().out.startswith("<!DOCTYPE html>")


# ---------------------------------------------------------------- loading a model, or saying why not


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("meta")], ids=str)
def test_a_model_without_generation_config(device, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    model, tok = mcts.load_model(str(tmp_path / "model"), device)
    assert model.device == device
    assert not model.training
    assert mcts.eos_tokens(model, tok) == {0}


def test_free_memory(monkeypatch):
    """What is available, not what is free, and no more than the container may have."""
    files = {"/proc/meminfo": "MemFree: 10 kB\nMemAvailable:   9000 kB\n"}
    monkeypatch.setattr(mcts, "read", lambda path: files.get(path, ""))
    cpu = torch.device("cpu")
    assert mcts.free_memory(cpu) == 9000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert mcts.free_memory(cpu) == 9000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "5000\n"
    files["/sys/fs/cgroup/memory.current"] = "4000\n"
    files["/sys/fs/cgroup/memory.stat"] = "anon 1\ninactive_file 300\nfile 7"
    assert mcts.free_memory(cpu) == 1300
    files["/proc/self/cgroup"] = "0::/slice/job\n"                  # each limit up to the root holds
    files["/sys/fs/cgroup/slice/memory.max"] = "700\n"
    files["/sys/fs/cgroup/slice/memory.current"] = "100\n"
    assert mcts.free_memory(cpu) == 600
    files["/sys/fs/cgroup/slice/job/memory.max"] = "max\n"
    assert mcts.free_memory(cpu) == 600
    files["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = "800\n"  # of version 1
    files["/sys/fs/cgroup/memory/memory.usage_in_bytes"] = "300\n"
    assert mcts.free_memory(cpu) == 500


def test_doctests():
    failed, tried = doctest.testmod(mcts)
    assert tried > 0 and failed == 0
