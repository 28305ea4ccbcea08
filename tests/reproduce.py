# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""The paper's tables and figures in miniature: every objective on the same trees, on chains of arithmetic.

    python tests/reproduce.py --out CELLS                       # all; can be stopped and continued
    python tests/reproduce.py --out CELLS --only methods fig7   # some of PARTS, in this order
    python tests/reproduce.py --out CELLS --quick               # two seeds, four methods, nothing tuned
    python tests/reproduce.py --out CELLS --report assets/results.json  # what is done, and the tables of it

A *cell* is one piece of work with all its Settings: it becomes a JSON file in CELLS when done, and is not
done again. Each seed has a base of its own, trained like the demo's, whose demonstrations skip steps, and for
each chain length one set of trees, on which every method trains.

Every method is tuned alike, by accuracy on development questions: all rates of one grid with two seeds, more
of them while the best lies at the edge; at the best the other beta, where there is one, and what else is
the method's own, one setting after the other; then the best few of all (--finalists) with all seeds, of which
the best is tested. The test asks other questions, which chose nothing, are in no training set and no base's,
and are the same for all seeds.
"""
import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import itertools
import json
import math
import os
import random
import re
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dvo
import eval as tasks
import mcts

# ---------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Settings:
    """What a cell depends on, and so is named by."""
    method: str = "dvo"
    seed: int = 0
    lr: float = 3e-4
    beta: float = 0.1
    value_lr: float = 1e-3    # of a critic
    alpha: float = 0.01       # of OREO
    beta_1: float = 0.5       # of A*-PO
    values: str = "search"    # or "multiplicity": equal samples weigh as often as they were drawn
    chain: str = "long"
    base: str = "usual"
    questions: int = 80       # to train on
    rounds: int = 1           # over which they are divided; each searches with the policy as it is then
    iterations: int = 40      # of the search
    paths_of: int = 0         # the paths of fewer iterations with the values of all; 0: of all
    paths: int = 4            # correct, and incorrect, ones a question
    breadth: int = 5


@dataclass(frozen=True)
class Method:
    """An objective of dvo.py, and what is changed in what it trains on."""
    label: str
    objective: str
    level: str = "step"
    has_beta: bool = True
    own: tuple = ()           # (setting, values): what is tuned besides rate and beta

    @property
    def also(self):
        """(setting, values) that are tried at the best rate."""
        return ((("beta", (0.03,)),) if self.has_beta else ()) + self.own


METHODS = {
    "dvo": Method("DVO", "dvo"),
    "dvo-even": Method("DVO, credit spread evenly", "dvo"),
    "dvo-permuted": Method("DVO, credits permuted", "dvo"),
    "vineppo": Method("VinePPO's form", "vineppo", has_beta=False),
    "grpo": Method("GRPO's form", "grpo", has_beta=False),
    "kto": Method("KTO", "kto"),
    "rft": Method("RFT", "rft", has_beta=False),
    "dpo": Method("DPO", "dpo"),
    "oreo": Method("OREO", "oreo", own=(("value_lr", (3e-4, 3e-3)), ("alpha", (0.0, 0.1)))),
    "step-dpo": Method("Step-DPO", "step-dpo"),
    "dvo-response": Method("DVO, response level", "dvo", "response"),
    "a-star": Method("A*-PO's form", "dvo", "response", own=(("beta_1", (0.25, 1.0)),)),
    "dvo-model": Method("DVO, value-model targets", "dvo", own=(("value_lr", (3e-4, 3e-3)),)),
}
CHAINS = {"short": (3, 4), "long": (5, 6)}                          # operations from, to
GRID = [1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]       # of rates
FIRST = slice(3, 6)                                                 # of them are tried in any case
SEEDS = [0, 1, 2, 3, 4]
TUNING_SEEDS = 2
DEPTH = 8
EPOCHS = 3
QUESTIONS_PER_STEP = 4
MICRO_TOKENS = 4096
MAX_NEW_TOKENS = 96

# ---------------------------------------------------------------- questions

# (demonstrations, how often one skips a step, rate): first the arithmetic, then the fault
USUAL = [(7000, 0.0, 3e-3), (6000, 0.25, 2e-3), (3000, 0.25, 1e-3), (4000, 0.25, 1e-3)]
PARTS_OF_BASE = {"usual": USUAL,
                 "weak": [*USUAL, (2000, 0.6, 1e-3)],               # these two start from the usual one
                 "strong": [*USUAL, (2000, 0.05, 1e-3)]}
SIZES = {"dev": 100, "test": 400, "held": 60}                       # held: whose wrong solutions are scored


def demonstrated(seed, part, n):
    """The questions of one part of a base's training."""
    return tasks.arithmetic(n, f"base part {part} {seed}", 3, 6)


@functools.cache
def trained_on():
    """All questions that any base or any training of any seed has seen."""
    seen = set()
    for seed in SEEDS:
        for part, (n, _, _) in enumerate(PARTS_OF_BASE["weak"]):
            seen |= {p["question"] for p in demonstrated(seed, part, n)}
        for chain in CHAINS:
            seen |= {p["question"] for p in training_questions(chain, seed, 200)}
    return seen


def training_questions(chain, seed, n):
    return tasks.arithmetic(n, f"train {seed}", *CHAINS[chain])


@functools.cache
def unseen_questions(chain, part):
    """The "dev", "test" or "held" questions of a chain length: nobody has trained on them, and none is in two
    parts."""
    seen = set(trained_on())
    for name, n in SIZES.items():
        drawn = tasks.arithmetic(2 * n, name, *CHAINS[chain])
        own = [p for p in drawn if p["question"] not in seen][:n]
        if name == part:
            return own
        seen |= {p["question"] for p in own}


# ---------------------------------------------------------------- bases and trees, shared by the cells


@contextlib.contextmanager
def only_one(path):
    """Let one process at a time make `path`."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(folder):
    return dvo.load_policy(str(folder), torch.device("cpu"), "float32")


def base(out, seed, kind):
    """The folder of a base, made once. A weak or strong one is the usual one, trained further."""
    folder = out / f"base-{kind}-{seed}"
    first = 0 if kind == "usual" else len(USUAL)
    start = base(out, seed, "usual") if first else out / f"random{seed}"
    with only_one(folder):
        if not folder.exists():
            if not first:
                dvo.random_model(start, seed)
            policy, tokenizer = load(start)
            for part, (n, skip, lr) in list(enumerate(PARTS_OF_BASE[kind]))[first:]:
                imitate(policy, tokenizer, seed, part, n, skip, lr)
            dvo.save_model(policy, tokenizer, folder)
    return folder


def imitate(policy, tokenizer, seed, part, n, skip, lr):
    draw = random.Random(f"base part {part} {seed}")
    examples = []
    for p in demonstrated(seed, part, n):
        solution = tokenizer(tasks.demonstrate(p["question"], draw, skip)).input_ids
        examples.append(dvo.one_step(prompt_of(tokenizer, p), solution + [tokenizer.eos_token_id]))
    dvo.imitate(policy, examples, lr, 16, seed, micro_tokens=2048, name="base")


def search(policy, tokenizer, problems, s, seed):
    found = mcts.search(policy, tokenizer, problems, tasks.reward, iterations=s.iterations, breadth=s.breadth,
                        depth=DEPTH, max_step_tokens=32, slots=64, seed=seed)
    return sorted(found, key=lambda tree: tree.question)


def trees(out, s, part="train"):
    """The trees of a base, searched once with 80 iterations at least and kept in a file."""
    most = max(80, s.iterations) if s.breadth == 5 else s.iterations
    path = out / f"trees-{part}-{s.chain}-{s.base}-{s.seed}-{most}-{s.breadth}-{s.questions}.jsonl"
    with only_one(path):
        if not path.exists():
            policy, tokenizer = load(base(out, s.seed, s.base))
            if part == "train":
                problems = training_questions(s.chain, s.seed, s.questions)
            else:
                problems = unseen_questions(s.chain, part)
            found = search(policy, tokenizer, problems, replace(s, iterations=most), s.seed)
            new = path.with_suffix(".new")
            new.write_text("".join(tree.to_json() + "\n" for tree in found))
            new.rename(path)
    return [cut(tree, s.iterations) for tree in mcts.read_trees(path)]


def cut(tree, iterations):
    """The tree as it was after so many iterations; indices stay, since a search only appends."""
    parents = dict.fromkeys(node.parent for node in tree.nodes[1:])         # in the order of expansion
    expanded = set(itertools.islice(parents, iterations))
    younger = mcts.Tree(tree.question, tree.answer, tree.prompt, tree.config)
    for node in tree.nodes[1:]:
        if node.parent in expanded:
            i = younger.add(replace(node, visits=0, value=0.0, children=[]))
            if node.terminal:
                mcts.backup(younger, i)
    return younger


# ---------------------------------------------------------------- changes of what is trained on


def weighed(tree, of_outcome=float):
    """For each node the mean of of_outcome(reward) below it, every action weighing as often as it was drawn:
    what the policy itself expects there. None where no outcome is known."""
    means = [None] * len(tree.nodes)
    for i, node in reversed(list(enumerate(tree.nodes))):
        known = [j for j in node.children if means[j] is not None]
        if node.terminal:
            means[i] = of_outcome(node.reward)
        elif known:
            counts = [tree.nodes[j].count for j in known]
            means[i] = float(np.average([means[j] for j in known], weights=counts))
    return means


def soft_value(tree, beta_1):
    """V* of A*-PO: beta_1 log mean exp(r / beta_1) over the solutions, weighed as they were drawn."""
    mean = weighed(tree, lambda reward: math.exp(reward / beta_1))[0]
    return beta_1 * math.log(mean)


def apart(tree, paths, rearrange):
    """A tree in which each of `paths` has nodes of its own, and values by which the credits along it are
    rearrange(its credits). Their sum must stay."""
    new = mcts.Tree(tree.question, tree.answer, tree.prompt, tree.config)
    new.nodes[0].value = tree.nodes[0].value
    for path in paths:
        parent = 0
        for i, credit in zip(path, rearrange([tree.credit(i) for i in path])):
            value = new.nodes[parent].value + credit
            parent = new.add(replace(tree.nodes[i], parent=parent, value=value, children=[]))
    return new


def evenly(credits):
    """
    >>> evenly([0.5, 0.0, 1.0])
    [0.5, 0.5, 0.5]
    """
    return [sum(credits) / len(credits)] * len(credits)


def ended_paths(tree, n, seed):
    """All of its correct and its incorrect paths."""
    found = {1: [], -1: []}
    for i, node in enumerate(tree.nodes):
        if node.terminal:
            found[node.reward].append(tree.path(i))
    return found[1], found[-1]


def make_example(tree, s, source=None):
    """The Example of a tree for the method of `s`, or None. source: the tree whose paths are trained on, a
    younger one of the same search."""
    source = source or tree
    method = METHODS[s.method]
    choose = dvo.OBJECTIVES[method.objective]
    if s.method == "grpo" and s.rounds > 1:
        choose = ended_paths                                        # the group is all responses
    if s.method in ("dvo-even", "dvo-permuted"):
        rng = dvo.generator(s.seed, "permuted", tree.question)

        def permuted(credits):
            return rng.permutation(credits).tolist()

        rearrange = evenly if s.method == "dvo-even" else permuted
        right, wrong = dvo.draw_paths(source, s.paths, s.seed)
        tree = source = apart(tree, right + wrong, rearrange)
        choose = ended_paths
    example = dvo.make_example(source, s.paths, s.seed, choose=choose)
    if example is None:
        return None
    values = [node.value for node in tree.nodes]
    if s.values == "multiplicity":
        values = [mean or 0.0 for mean in weighed(tree)]
    if s.method == "a-star":
        values[0] = soft_value(tree, s.beta_1)
    example.take_values(torch.tensor(values[:len(example.value)], dtype=torch.float32))
    return example


# ---------------------------------------------------------------- cells: training and testing


def train_cell(out, s):
    """Train from the base; accuracy on development questions. Weights are kept for what is measured later."""
    policy, tokenizer = load(base(out, s.seed, s.base))
    found = {"tokens": 0, "examples": 0, "curve": []}
    for r in range(s.rounds):
        grown, tokens = drawn_trees(out, policy, tokenizer, s, r)
        examples = [make_example(t, s, cut(t, s.paths_of) if s.paths_of else None) for t in grown]
        examples = [e for e in examples if e]
        entries = train(policy, examples, grown, s)
        found["tokens"] += tokens
        found["examples"] += len(examples)
        found["curve"] += [[e["rewards/chosen"], e["rewards/rejected"]] for e in entries[::5] + entries[-1:]]
    path = weights_path(out, s)
    torch.save(policy.state_dict(), path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)
    return found | {"dev": float(np.mean(answers(policy, tokenizer, unseen_questions(s.chain, "dev"))))}


def drawn_trees(out, policy, tokenizer, s, r):
    """What is learnt from in round r, and how many tokens were drawn for it. GRPO over rounds samples plain
    responses, of as many tokens as the search draws with the base."""
    if s.rounds == 1:
        grown = trees(out, s)
        return grown, sum(map(tokens_of, grown))
    problems = training_questions(s.chain, s.seed, s.questions)[r::s.rounds]
    if s.method != "grpo":
        grown = search(policy, tokenizer, problems, s, s.seed + r)
        return grown, sum(map(tokens_of, grown))
    asked = {p["question"] for p in problems}
    budget = sum(tokens_of(tree) for tree in trees(out, s) if tree.question in asked)
    bundles = [mcts.Tree(p["question"], p["answer"], prompt_of(tokenizer, p)) for p in problems]
    tokens = 0
    for again in itertools.count():
        if tokens >= budget:
            return bundles, tokens
        drawn = mcts.sample(policy, tokenizer, [tree.prompt for tree in bundles], n=8,
                            max_new_tokens=MAX_NEW_TOKENS, seed=1000 * s.seed + 100 * r + again)
        for tree, samples in zip(bundles, drawn):
            for sample in samples:
                reward = tasks.reward(sample.text, tree.answer)
                tree.add(mcts.Node(parent=0, tokens=sample.tokens, logprob=sample.logprob, visits=1,
                                   value=reward, reward=reward, terminal=True))
                tokens += len(sample.tokens)


def prompt_of(tokenizer, problem):
    return mcts.build_prompt(tokenizer, problem["question"])


def tokens_of(tree):
    """How many tokens its search drew; equal samples count as often as they were drawn."""
    return sum(node.count * len(node.tokens) for node in tree.nodes)


def train(policy, examples, grown, s):
    """Train `policy` on `examples`, and a critic on the trees where one is asked for; the log."""
    method = METHODS[s.method]
    steps = dvo.schedule(len(examples), EPOCHS, QUESTIONS_PER_STEP, s.seed)
    dvo.add_reference(policy, examples, MICRO_TOKENS)
    learners = [dvo.Learner(policy, s.lr)]
    pairs = []
    if method.objective == "kto":
        pairs = dvo.mismatched(examples, steps, mcts.context_length(policy), s.seed)
        dvo.add_reference(policy, list(itertools.chain(*pairs)), MICRO_TOKENS)
    if method.objective == "oreo":
        learners.append(dvo.Learner(dvo.make_critic(policy), s.value_lr))
    if s.method == "dvo-model":
        critic = value_model(policy, grown, s)
        values = dvo.forward_all(critic, examples, "values", MICRO_TOKENS)
        for e, value in zip(examples, values):
            e.take_values(value)

    def of_step(step):
        return {"z0": dvo.reference_point(policy, pairs[step], MICRO_TOKENS)} if pairs else {}

    entries = []
    loss_fn = functools.partial(dvo.objective_loss, method.objective, beta=s.beta, level=method.level,
                                alpha=s.alpha)
    dvo.train(learners, examples, loss_fn, steps, micro_tokens=MICRO_TOKENS, beta=s.beta, of_step=of_step,
              log=lambda **entry: entries.append(entry))
    return entries


def value_model(policy, grown, s):
    """An outcome value model of the policy, trained on paths drawn evenly from the trees."""
    critic = dvo.make_critic(policy)
    valued = [dvo.make_example(tree, s.paths, s.seed, True, dvo.any_paths) for tree in grown]
    valued = [e for e in valued if e]
    steps = dvo.schedule(len(valued), EPOCHS, QUESTIONS_PER_STEP, s.seed)
    dvo.train([dvo.Learner(critic, s.value_lr)], valued, dvo.critic_loss, steps, micro_tokens=MICRO_TOKENS)
    return critic


def answers(policy, tokenizer, problems):
    """Whether one response to each problem, at temperature 0.7, is right."""
    prompts = [prompt_of(tokenizer, p) for p in problems]
    drawn = mcts.sample(policy, tokenizer, prompts, temperature=0.7, max_new_tokens=MAX_NEW_TOKENS)
    return [tasks.grade(sample.text, p["answer"]) for p, [sample] in zip(problems, drawn)]


def weights_path(out, s):
    return out / "weights" / f"{name_of('train', s)}.pt"


def trained(out, s):
    """(policy, tokenizer) of a training that is done."""
    policy, tokenizer = load(base(out, s.seed, s.base))
    policy.load_state_dict(torch.load(weights_path(out, s)))
    return policy, tokenizer


def test_cell(out, s):
    problems = unseen_questions(s.chain, "test")
    return {"right": list(map(int, answers(*trained(out, s), problems)))}


def base_cell(out, s):
    problems = unseen_questions(s.chain, "test")
    return {"right": list(map(int, answers(*load(base(out, s.seed, s.base)), problems)))}


# ---------------------------------------------------------------- cells: measurements


def follow(question, texts):
    """For each step of a solution whether it is right, and how many operations it does: a step is right if it
    starts from the true value, does the next operations of the question and states their true result.

    >>> follow("Start with 9. Add 2. Multiply by 1. Add 3.", ["9 + 2 = 11.", "11 * 1 + 3 = 15."])
    [(True, 1), (False, 2)]
    """
    start, *chain = question.removesuffix(".").split(". ")
    value = int(start.split()[-1])
    at = 0                                                          # operations done
    fine = True                                                     # so far
    judged = []
    for text in texts:
        found = re.fullmatch(r"(\d+)((?: [-+*] \d+)+) = (\d+)\.", text.strip())
        operations = re.findall(r" ([-+*]) (\d+)", found[2]) if found else []
        fine = fine and (found is None or int(found[1]) == value)
        for sign, operand in operations:
            word, due = chain[at].rsplit(" ", 1) if at < len(chain) else ("", None)
            fine = fine and due == operand and tasks.OPERATIONS[word][0] == sign
            value = tasks.OPERATIONS[word][1](value, int(operand)) if fine else value
            at += 1
        if found:
            fine = fine and int(found[3]) == value
        else:                                                       # the final answer, or nonsense
            fine = fine and at == len(chain) and text.strip() == f"{tasks.MARKER} {value}"
        judged.append((fine, len(operations)))
    return judged


def rewards_cell(out, s):
    """Fig. 5: implicit reward of the paths of the training trees at the end, by outcome, with its target and
    the most that is attainable, which is -beta log pi_ref."""
    policy, _ = trained(out, s)
    examples = [e for tree in trees(out, s) if (e := dvo.make_example(tree, s.paths, s.seed))]
    after = dvo.forward_all(policy, examples, "rewards", MICRO_TOKENS)
    rows = {True: [], False: []}
    for e, logprobs in zip(examples, after):
        for on_path, correct in zip(e.path, e.correct.tolist()):
            reward = s.beta * on_path @ (logprobs - e.reference)
            attainable = -s.beta * on_path @ e.reference
            rows[correct].append([float(reward), float(on_path @ e.credit), float(attainable)])
    names = "reward", "target", "attainable"
    return {word: dict(zip(names, np.mean(rows[correct], 0).tolist()), paths=len(rows[correct]))
            for word, correct in (("correct", True), ("incorrect", False))}


def first_errors(tree, paths):
    """(index, whether it is right) of the steps of incorrect paths up to the first wrong one."""
    for path in paths:
        judged = follow(tree.question, [tree.nodes[i].text for i in path])
        for i, (fine, _) in zip(path, judged):
            yield i, fine
            if not fine:
                break


def credit_cell(out, s):
    """Fig. 6: how well the credit that a policy has learnt, beta * log-ratio, tells the first wrong step of
    an incorrect solution from the right ones before it, on questions that nobody has trained on; beside
    it the search's own credit there and the log-prob of the base."""
    policy, _ = trained(out, s)
    scores = {name: {True: [], False: []} for name in ("learned", "target", "base log-prob", "mean log-prob")}
    for tree in trees(out, replace(s, questions=SIZES["held"]), "held"):
        paths = dvo.draw_paths(tree, 4, s.seed)[1]
        if not paths:
            continue
        with torch.no_grad():
            logprobs = dvo.step_logprobs(policy, dvo.pack(tree, paths)).tolist()
        for i, fine in first_errors(tree, paths):
            node = tree.nodes[i]
            scores["learned"][fine].append(logprobs[i] - node.logprob)
            scores["target"][fine].append(tree.credit(i))
            scores["base log-prob"][fine].append(node.logprob)
            scores["mean log-prob"][fine].append(math.log(node.prior))
    wrong = len(scores["learned"][False])
    return {name: auc(pair[False], pair[True]) for name, pair in scores.items()} | {"wrong": wrong}


def auc(bad, good):
    """Probability that a random bad one scores lower than a random good one, ties counting half."""
    bad = np.sort(bad)
    below = np.searchsorted(bad, good, "left")
    up_to = np.searchsorted(bad, good, "right")
    return float(np.mean((below + up_to) / 2) / len(bad))


def values_cell(out, s, questions=8, rollouts=64):
    """V of the search (as it is, and weighed as drawn) and of the critic against the mean outcome of fresh
    rollouts from the same states: the root, and the inner states of depth 1 and 2 with an outcome."""
    policy, tokenizer = load(base(out, s.seed, s.base))
    grown = trees(out, s)
    critic = value_model(policy, grown, s)
    found = []
    for tree in grown[:questions]:
        nodes = tree.nodes
        states = [i for i, node in enumerate(nodes) if node.depth <= 2 and node.visits and not node.terminal]
        with torch.no_grad():
            by_critic = critic(packs=[dvo.pack(tree, [tree.path(i) for i in states])])[0].tolist()
        by_count = weighed(tree)
        said = [[token for j in tree.path(i) for token in nodes[j].tokens] for i in states]
        texts = ["".join(nodes[j].text for j in tree.path(i)) for i in states]
        drawn = mcts.sample(policy, tokenizer, [tree.prompt + tokens for tokens in said], n=rollouts,
                            max_new_tokens=MAX_NEW_TOKENS, seed=s.seed)
        for i, text, samples in zip(states, texts, drawn):
            outcomes = [tasks.reward(text + sample.text, tree.answer) for sample in samples]
            place = {"question": tree.question, "node": i, "parent": nodes[i].parent, "depth": nodes[i].depth}
            value = {"fresh": float(np.mean(outcomes)), "search": nodes[i].value}
            found.append(place | value | {"multiplicity": by_count[i], "critic": by_critic[i]})
    return {"states": found}


KINDS = {"base": base_cell, "train": train_cell, "test": test_cell, "rewards": rewards_cell,
         "credit": credit_cell, "values": values_cell}


# ---------------------------------------------------------------- running cells


class Missing(Exception):
    """A cell that a report needs has not been run."""


def name_of(kind, s):
    """The name of a cell: its kind and the settings that differ from the usual ones.

    >>> name_of("train", Settings("rft", seed=3, lr=1e-4))
    'train method=rft seed=3 lr=0.0001'
    """
    changed = [f for f in fields(s) if getattr(s, f.name) != f.default]
    return " ".join([kind, *(f"{f.name}={getattr(s, f.name)}" for f in changed)])


def run_cell(out, kind, s):
    path = out / "cells" / f"{name_of(kind, s)}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    start = time.process_time()
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null), contextlib.redirect_stdout(null):
        result = KINDS[kind](out, s)
    result["cpu_seconds"] = round(time.process_time() - start, 2)
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(result))
    new.rename(path)


class Cells:
    """Runs cells in `jobs` processes, and reads their results."""

    def __init__(self, out, jobs=1, may_run=True, finalists=2):
        self.out = out
        self.jobs = jobs
        self.may_run = may_run
        self.finalists = finalists                                  # 0: nothing is tuned
        for folder in ("cells", "weights"):
            (out / folder).mkdir(parents=True, exist_ok=True)

    def path(self, kind, s):
        return self.out / "cells" / f"{name_of(kind, s)}.json"

    def each(self, kind, many):
        """The results of cells of many settings. Raises Missing if one is not there and must not be run."""
        todo = [s for s in many if not self.path(kind, s).exists()]
        if todo and not self.may_run:
            raise Missing(f"{len(todo)} of {len(many)} cells are missing, such as {name_of(kind, todo[0])}")
        if self.jobs > 1 and len(todo) > 1:
            with concurrent.futures.ProcessPoolExecutor(self.jobs) as pool:
                list(pool.map(run_cell, itertools.repeat(self.out), itertools.repeat(kind), todo))
        for s in todo:
            run_cell(self.out, kind, s)
            print(f"{time.strftime('%H:%M:%S')} {name_of(kind, s)}", file=sys.stderr, flush=True)
        return [json.loads(self.path(kind, s).read_text()) for s in many]

    def of_seeds(self, kind, seeds, s):
        return self.each(kind, [replace(s, seed=seed) for seed in seeds])

    def right(self, seeds, s, kind="test"):
        """(seeds, questions) whether each test question was answered rightly."""
        if kind == "test":
            self.of_seeds("train", seeds, s)
        return np.array([result["right"] for result in self.of_seeds(kind, seeds, s)])


# ---------------------------------------------------------------- tuning, alike for all


def tune(cells, seeds, s, also=None):
    """The best settings for the method of `s`, as told at the top of this file. also: instead of the
    method's."""
    if not cells.finalists:
        return s
    few = seeds[:TUNING_SEEDS]

    def score(tried, seeds):
        results = cells.of_seeds("train", seeds, tried)
        return float(np.mean([result["dev"] for result in results]))

    scores = scores_of_rates(functools.partial(score, seeds=few), s)
    for name, values in METHODS[s.method].also if also is None else also:
        best = max(scores, key=scores.get)
        for value in values:
            tried = replace(best, **{name: value})
            scores[tried] = score(tried, few)
    finalists = sorted(scores, key=scores.get, reverse=True)[:cells.finalists]
    return max(finalists, key=functools.partial(score, seeds=seeds))


def scores_of_rates(score, s):
    """Score the FIRST rates of GRID, and more of them while the best lies at the edge."""
    low, high = FIRST.start, FIRST.stop
    while True:
        scores = {}
        for rate in GRID[low:high]:
            tried = replace(s, lr=rate)
            scores[tried] = score(tried)
        best = GRID.index(max(scores, key=scores.get).lr)
        if best == low and low > 0:
            low -= 1
        elif best == high - 1 and high < len(GRID):
            high += 1
        else:
            return scores


def chosen(s):
    """Of tuned settings those that were tuned."""
    names = ["lr", *(name for name, _ in METHODS[s.method].also)]
    return {name: getattr(s, name) for name in names}


def sweep(cells):
    """All that was ever tried: name of the training, with its settings, and its accuracy on development
    questions."""
    paths = sorted((cells.out / "cells").glob("train*.json"))
    return {path.stem: json.loads(path.read_text())["dev"] for path in paths}


# ---------------------------------------------------------------- statistics

T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}     # 97.5 %


def spread(values):
    """Mean and standard error over seeds."""
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return {"mean": float(np.mean(values)), "se": float(error), "each": [round(float(v), 4) for v in values]}


def interval(differences):
    """Mean over seeds of differences within a seed, and its 95 % interval by Student's t."""
    d = np.array(differences, dtype=float)
    half = T[len(d) - 1] * d.std(ddof=1) / math.sqrt(len(d))
    mean = float(d.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half, "each": [round(float(x), 4) for x in d]}


def compare(a, b):
    """The interval of the accuracy of a minus that of b, (seeds, questions) each."""
    return interval(a.mean(1) - b.mean(1))


def bootstrap(a, b, draws=10000):
    """The 95 % interval of the same, [low, high], with these very seeds, by drawing the questions anew."""
    per_question = (a - b).mean(0)
    n = len(per_question)
    times_drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws)    # (draws, n)
    means = times_drawn @ per_question / n
    return np.quantile(means, [0.025, 0.975]).tolist()


def verdict(*differences, least=0.02):
    """In a word what the 95 % intervals of differences say of the claim that all of them are positive. "not
    reproduced": they hold 0, and are narrow enough, so that there is nothing larger than 2 * `least`.

    >>> verdict({"low": 0.01, "high": 0.05}), verdict({"low": -0.01, "high": 0.02})
    ('reproduced', 'not reproduced')
    >>> verdict({"low": 0.01, "high": 0.05}, {"low": -0.1, "high": 0.02})
    'unclear'
    """
    if any(d["high"] < 0 for d in differences):
        return "opposite"
    unsettled = [d for d in differences if d["low"] <= 0]
    if not unsettled:
        return "reproduced"
    narrow = any(d["high"] - d["low"] <= 2 * least for d in unsettled)
    return "not reproduced" if narrow else "unclear"


# ---------------------------------------------------------------- the paper's tables and figures


def tested(cells, seeds, s):
    """(what was chosen and its accuracy, whether each test question was right) of a method tuned."""
    best = tune(cells, seeds, s)
    right = cells.right(seeds, best)
    return {"chosen": chosen(best), "accuracy": spread(right.mean(1))}, right


def methods(cells, seeds, names=tuple(METHODS)):
    """Table 1 and more: every method on the same trees, and DVO minus it."""
    bases = cells.right(seeds, Settings(), "base")
    rows = {"base": {"label": "base", "accuracy": spread(bases.mean(1))}}
    ours = None
    for name in names:
        try:
            row, right = tested(cells, seeds, Settings(name))
        except Missing as missing:
            print(f"{name}: {missing}", file=sys.stderr)
            continue
        ours = right if name == "dvo" else ours
        rows[name] = row | {"label": METHODS[name].label, "gain": compare(right, bases)}
        if name != "dvo" and ours is not None:
            rows[name] |= {"dvo_minus": compare(ours, right), "bootstrap": bootstrap(ours, right)}
    return rows


def fig4a(cells, seeds):
    """Beta, the rate tuned for each."""
    found = {}
    rights = {}
    for beta in (0.01, 0.03, 0.1, 0.3):
        best = tune(cells, seeds, Settings(beta=beta), also=())
        rights[beta] = cells.right(seeds, best)
        found[str(beta)] = {"chosen": chosen(best), "accuracy": spread(rights[beta].mean(1))}
    return found | {"0.1 minus 0.03": compare(rights[0.1], rights[0.03])}


def fig4b(cells, seeds):
    """Search iterations, both ways: the paths of 10 iterations with the values of more; and the trees of each
    budget by themselves. DVO as tuned for 40 iterations."""
    usual = tune(cells, seeds, Settings())
    found = {}
    for way, paths_of in (("same paths", 10), ("own paths", 0)):
        rights = {n: cells.right(seeds, replace(usual, iterations=n, paths_of=0 if n == 10 else paths_of))
                  for n in (10, 20, 40, 80)}
        found[way] = {str(n): spread(right.mean(1)) for n, right in rights.items()}
        found[way]["40 minus 10"] = compare(rights[40], rights[10])
        found[way]["80 minus 20"] = compare(rights[80], rights[20])
    return found


def fig5(cells, seeds):
    """Implicit rewards of DVO and DPO on the training paths."""
    found = {}
    for name in ("dvo", "dpo"):
        s = tune(cells, seeds, Settings(name))
        results = cells.of_seeds("rewards", seeds, s)
        curves = [result["curve"] for result in cells.of_seeds("train", seeds, s)]
        found[name] = {word: {key: interval([result[word][key] for result in results])
                              for key in ("reward", "target", "attainable")}
                       for word in ("correct", "incorrect")}
        found[name]["curve"] = curves
    return found


def fig6(cells, seeds):
    """Learned credit on held-out incorrect solutions: AUC of the first wrong step."""
    found = {}
    results = {}
    for name in ("dvo", "dvo-response", "dpo"):
        s = tune(cells, seeds, Settings(name))
        results[name] = cells.of_seeds("credit", seeds, s)
        found[name] = spread([result["learned"] for result in results[name]])
    for name in ("target", "base log-prob", "mean log-prob"):
        found[name] = spread([result[name] for result in results["dvo"]])
    learned = np.array(found["dvo"]["each"])
    for name in ("dpo", "dvo-response", "mean log-prob"):
        found[f"dvo minus {name}"] = interval(learned - np.array(found[name]["each"]))
    return found | {"wrong steps": [result["wrong"] for result in results["dvo"]]}


def fig7(cells, seeds):
    """Step against response level by length of the chains, tuned for each, and by paths a question."""
    found = {}
    for chain in ("long", "short"):
        tuned = {name: tune(cells, seeds, Settings(name, chain=chain)) for name in ("dvo", "dvo-response")}
        for paths in (4, 1):
            rights = {name: cells.right(seeds, replace(best, paths=paths)) for name, best in tuned.items()}
            rows = {name: spread(right.mean(1)) for name, right in rights.items()}
            difference = compare(rights["dvo"], rights["dvo-response"])
            found[f"{chain} {paths}+{paths}"] = rows | {"step minus response": difference}
    return found


def multiplicity(cells, seeds):
    """Values that weigh equal samples as often as they were drawn, against merging them; DVO as tuned."""
    usual = tune(cells, seeds, Settings())
    merged = cells.right(seeds, usual)
    weighing = cells.right(seeds, replace(usual, values="multiplicity"))
    return {"merged": spread(merged.mean(1)), "multiplicity": spread(weighing.mean(1)),
            "multiplicity minus merged": compare(weighing, merged)}


def values(cells, seeds):
    """Value accuracy: against fresh rollouts from the same states."""
    value_lr = tune(cells, seeds, Settings("dvo-model")).value_lr
    results = cells.of_seeds("values", seeds, Settings(value_lr=value_lr))
    found = {"states": [len(result["states"]) for result in results]}
    for name in ("search", "multiplicity", "critic"):
        found[name] = {measure.__name__: spread([measure(result["states"], name) for result in results])
                       for measure in (correlation, absolute_error, pairs_ranked, root_error)}
    return found


def column(states, name):
    return np.array([state[name] for state in states])


def correlation(states, name):
    return float(np.corrcoef(column(states, name), column(states, "fresh"))[0, 1])


def absolute_error(states, name):
    return float(np.mean(np.abs(column(states, name) - column(states, "fresh"))))


def root_error(states, name):
    """Mean value of the roots minus what the policy reaches from them."""
    roots = [state for state in states if state["depth"] == 0]
    return float(np.mean(column(roots, name) - column(roots, "fresh")))


def pairs_ranked(states, name, least=0.25):
    """Share of the pairs of siblings, whose fresh values differ by `least`, that are ranked rightly."""
    shares = []
    for a, b in itertools.combinations(states, 2):
        siblings = a["question"] == b["question"] and a["parent"] == b["parent"]
        if siblings and abs(a["fresh"] - b["fresh"]) >= least:
            agreement = (a[name] - b[name]) * (a["fresh"] - b["fresh"])
            shares.append((1 + np.sign(agreement)) / 2)
    return float(np.mean(shares)) if shares else math.nan


def strength(cells, seeds):
    """DVO's lead on bases of three strengths: the usual one, and trained further with many or few skips."""
    found = {}
    for kind in ("weak", "usual", "strong"):
        bases = cells.right(seeds, Settings(base=kind), "base")
        rows = {"base": spread(bases.mean(1))}
        rights = {}
        for name in ("dvo", "rft", "kto", "grpo"):
            rows[name], rights[name] = tested(cells, seeds, Settings(name, base=kind))
        rows |= {f"dvo minus {name}": compare(rights["dvo"], right) for name, right in rights.items()
                 if name != "dvo"}
        found[kind] = rows
    return found


def online(cells, seeds):
    """Three rounds of 40 questions, DVO against GRPO, which draws plain responses of as many tokens."""
    rows = {}
    rights = {}
    for name in ("dvo", "grpo"):
        s = Settings(name, questions=120, rounds=3, iterations=20)
        row, rights[name] = tested(cells, seeds, s)
        results = cells.of_seeds("train", seeds, replace(s, **row["chosen"]))
        rows[name] = row | {"tokens": spread([result["tokens"] for result in results])}
    return rows | {"dvo minus grpo": compare(rights["dvo"], rights["grpo"])}


def beyond(cells, seeds):
    """Breadth 16 against 5, with as many samples; two rounds of half the questions against one. DVO as
    tuned."""
    usual = tune(cells, seeds, Settings())
    one = cells.right(seeds, usual)
    wide = cells.right(seeds, replace(usual, breadth=16, iterations=12))
    small = cells.right(seeds, replace(usual, rounds=2))
    return {"breadth 5": spread(one.mean(1)), "breadth 16": spread(wide.mean(1)),
            "breadth 16 minus 5": compare(wide, one), "two rounds": spread(small.mean(1)),
            "two rounds minus one": compare(small, one)}


PARTS = {part.__name__: part for part in (methods, fig5, fig6, fig4b, multiplicity, values, fig7, fig4a,
                                          strength, online, beyond)}
QUICK = ("dvo", "dvo-even", "rft", "kto")


# ---------------------------------------------------------------- the tables of assets/results.md


def points(difference):
    """A difference of accuracies in points, with its 95 % interval.

    >>> points({"mean": 0.031, "low": -0.01, "high": 0.072})
    '+3.1 [-1.0, +7.2]'
    """
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def percent(row):
    return f"{100 * row['mean']:.1f} ± {100 * row['se']:.1f}"


def number(row):
    return f"{row['mean']:.2f} ± {row['se']:.2f}"


def told(row):
    """What tuning chose, in a word."""
    names = {"lr": "rate", "value_lr": "critic's rate", "alpha": "α", "beta": "β", "beta_1": "β₁"}
    return ", ".join(f"{names[key]} {value:g}" for key, value in row.get("chosen", {}).items())


def table_of_methods(rows):
    yield ("| method | chosen on development questions | accuracy, % | DVO minus it, points [95 % over seeds]"
           " | [95 % over questions] |")
    yield "|---|---|---|---|---|"
    for name in ("base", *METHODS):
        row = rows.get(name)
        if row is None:
            label = METHODS[name].label if name in METHODS else name
            yield f"| {label} | not run | not run | not run | |"
            continue
        minus = by_question = ""
        if "dvo_minus" in row:
            minus = points(row["dvo_minus"])
            low, high = (100 * end for end in row["bootstrap"])
            by_question = f"[{low:+.1f}, {high:+.1f}]"
        yield f"| {row['label']} | {told(row)} | {percent(row['accuracy'])} | {minus} | {by_question} |"


def against(*names):
    """Of a claim that DVO is better than methods: the differences, and the verdict."""
    def says(found):
        rows = found["methods"]
        differences = [rows[name]["dvo_minus"] for name in names]
        pairs = [f"{METHODS[name].label} {points(d)}" for name, d in zip(names, differences)]
        return "DVO minus " + ", ".join(pairs), verdict(*differences)
    return says


def difference(part, *keys):
    """Of a claim that rests on one difference of accuracies in a part."""
    def says(found):
        row = functools.reduce(lambda inner, key: inner[key], keys, found[part])
        return f"{keys[-1]}: {points(row)}", verdict(row)
    return says


def signs(found):
    rewards = {name: found["fig5"][name]["correct"]["reward"] for name in ("dvo", "dpo")}
    numbers = [f"{METHODS[name].label} {r['mean']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]"
               for name, r in rewards.items()]
    falls = {"low": -rewards["dpo"]["high"], "high": -rewards["dpo"]["low"]}
    return "β · log_ratio of correct paths: " + ", ".join(numbers), verdict(rewards["dvo"], falls, least=0.05)


def finds_errors(found):
    part = found["fig6"]
    said = [f"{word} {part[name]['mean']:.3f}" for word, name in (
        ("DVO", "dvo"), ("response level", "dvo-response"), ("DPO", "dpo"), ("the search's target", "target"),
        ("the base's mean token log-prob", "mean log-prob"))]
    gain = part["dvo minus mean log-prob"]
    return (f"AUC: {', '.join(said)}; DVO minus the last {gain['mean']:+.3f} [{gain['low']:+.3f}, "
            f"{gain['high']:+.3f}]"), verdict(gain)


def values_fit(found):
    part = found["values"]
    said = [f"{name}: r {number(part[name]['correlation'])}, error {number(part[name]['absolute_error'])}, "
            f"pairs {percent(part[name]['pairs_ranked'])} %, roots {part[name]['root_error']['mean']:+.2f}"
            for name in ("search", "multiplicity", "critic")]
    gain = np.subtract(part["critic"]["absolute_error"]["each"], part["search"]["absolute_error"]["each"])
    gain = interval(gain)
    said.append(f"the critic's error minus the search's {gain['mean']:+.2f} [{gain['low']:+.2f}, "
                f"{gain['high']:+.2f}]")
    return "; ".join(said), verdict(gain)


def online_says(found):
    rows = found["online"]
    said = []
    for name in "dvo", "grpo":
        row = rows[name]
        said.append(f"{METHODS[name].label} {percent(row['accuracy'])} % of {row['tokens']['mean']:,.0f} tokens")
    gain = rows["dvo minus grpo"]
    return f"{', '.join(said)}: {points(gain)}", verdict(gain)


def leads(found):
    said = []
    for kind in ("weak", "usual", "strong"):
        rows = found["strength"][kind]
        leads_here = [f"{METHODS[name].label} {points(rows[f'dvo minus {name}'])}"
                      for name in ("rft", "kto", "grpo")]
        said.append(f"{kind} ({percent(rows['base'])} %): minus {', '.join(leads_here)}")
    weak, strong = (found["strength"][kind]["dvo minus kto"]["each"] for kind in ("weak", "strong"))
    return "; ".join(said), verdict(interval(np.subtract(weak, strong)))


CLAIMS = [
    ("DVO is better than RFT, DPO and KTO on the same trees (Table 1)", against("rft", "dpo", "kto")),
    ("and better than Step-DPO and OREO (Table 1, Fig. 8)", against("step-dpo", "oreo")),
    ("values of the search are better targets than a value model's (Fig. 3)", against("dvo-model")),
    ("step level is better than response level (Fig. 7)", against("dvo-response")),
    ("also on short chains", difference("fig7", "short 4+4", "step minus response")),
    ("β = 0.1 is better than 0.03 (Fig. 4a)", difference("fig4a", "0.1 minus 0.03")),
    ("more iterations help (Fig. 4b), on the same paths", difference("fig4b", "same paths", "40 minus 10")),
    ("and searching anew at each budget", difference("fig4b", "own paths", "40 minus 10")),
    ("correct paths gain implicit reward under DVO and lose it under DPO (Fig. 5)", signs),
    ("learned credit finds the first wrong step (Fig. 6), better than the log-prob of the base does",
     finds_errors),
    ("*Not in the paper:* the squared error is better than a clipped policy gradient with the same credit",
     against("vineppo")),
    ("the place of the credit matters: DVO is better than with it permuted within a path, or spread evenly",
     against("dvo-permuted", "dvo-even")),
    ("DVO is better than GRPO's form on the same trees", against("grpo")),
    ("DVO is better than A*-PO's form on the same trees", against("a-star")),
    ("three rounds of DVO are better than three of GRPO on plain samples of as many tokens", online_says),
    ("weighing equal samples as often as they were drawn helps",
     difference("multiplicity", "multiplicity minus merged")),
    ("V of the search is nearer to 64 fresh rollouts than a critic's", values_fit),
    ("DVO's lead over KTO is larger on a weak base than on a strong one", leads),
    ("breadth 16 is better than 5 at equal samples", difference("beyond", "breadth 16 minus 5")),
    ("two rounds are better than one of as many questions", difference("beyond", "two rounds minus one")),
]


def table_of_claims(found):
    yield "| claim | here | verdict |"
    yield "|---|---|---|"
    for claim, says in CLAIMS:
        try:
            here, word = says(found)
        except KeyError:
            here, word = "not run", "not run"
        yield f"| {claim} | {here} | {word} |"


def summarise(cells, seeds, names):
    """What is done of the parts of these names."""
    found = {}
    for name in names:
        part = PARTS[name]
        if name == "methods" and not cells.finalists:
            part = functools.partial(methods, names=QUICK)
        try:
            found[name] = part(cells, seeds)
        except Missing as missing:
            print(f"{name}: {missing}", file=sys.stderr)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder of the cells")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--finalists", type=int, default=2, help="settings tuned with all seeds (default: 2)")
    parser.add_argument("--quick", action="store_true", help="two seeds and few methods at the default rate")
    parser.add_argument("--report", type=Path, help="run nothing; write the numbers of what is done to this")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    cells = Cells(args.out, args.jobs, may_run=not args.report, finalists=0 if args.quick else args.finalists)
    seeds = SEEDS[:2] if args.quick else SEEDS
    found = summarise(cells, seeds, ["methods"] if args.quick else args.only)
    print(*table_of_methods(found.get("methods", {})), "", *table_of_claims(found), sep="\n")
    if args.report:
        sizes = {"seeds": len(seeds), "epochs": EPOCHS, "finalists": cells.finalists} | SIZES
        numbers = {"sizes": sizes} | found | {"sweep": sweep(cells)}
        args.report.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
