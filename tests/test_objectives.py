"""dvo.py's objectives: losses and gradients against closed forms, what each draws from a tree, value targets.

    python -m pytest -q tests/test_objectives.py
"""
import math

import numpy as np
import pytest
import torch

import tiny                                                         # first: it puts the project on sys.path
import dvo
import mcts

sigmoid = lambda x: 1 / (1 + math.exp(-x))

# Nodes 0 (root) ... 4; two paths, a = (1, 2) and b = (1, 3), that share their first step, and c = (4).
POLICY = [0.0, -1.0, -2.5, -0.5, -3.0]
REFERENCE = [0.0, -1.5, -2.0, -2.0, -2.0]                           # log-ratios 0.5, -0.5, 1.5, -1
PATHS = {"a": [1, 2], "b": [1, 3], "c": [4]}
LOG_RATIO = {"a": 0.0, "b": 2.0, "c": -1.0}                         # of whole paths
PARENT = torch.tensor([0, 0, 1, 1, 0])


def rows(*names):
    return torch.tensor([[float(i in PATHS[name]) for i in range(5)] for name in names])


@pytest.fixture
def policy():
    return torch.tensor(POLICY, requires_grad=True)


reference = torch.tensor(REFERENCE)


def gradient(losses, policy):
    return torch.autograd.grad(losses.sum(), policy)[0].tolist()


# ---------------------------------------------------------------- losses and gradients by hand


def test_dpo(policy):
    losses = dvo.dpo_loss(policy, reference, rows("a", "c"), rows("b", "a"), beta=0.5)
    margins = [0.5 * (0.0 - 2.0), 0.5 * (-1.0 - 0.0)]
    assert losses.tolist() == pytest.approx([-math.log(sigmoid(m)) for m in margins])
    one, two = (-0.5 * sigmoid(-m) for m in margins)                # derivative by the chosen path's log-prob
    # pair 1: a over b, step 1 cancels; pair 2: c over a
    assert gradient(losses, policy) == pytest.approx([0, -two, one - two, -one, two])


def test_step_dpo_leaves_the_shared_prefix_alone(policy):
    chosen, rejected = torch.eye(5)[[2]], torch.eye(5)[[3]]         # siblings below node 1
    losses = dvo.step_dpo_loss(policy, reference, chosen, rejected, beta=0.5)
    margin = 0.5 * (-0.5 - 1.5)
    assert losses.tolist() == pytest.approx([-math.log(sigmoid(margin))])
    pull = 0.5 * sigmoid(-margin)
    assert gradient(losses, policy) == pytest.approx([0, 0, -pull, pull, 0])


def test_kto(policy):
    correct = torch.tensor([True, False])
    losses = dvo.kto_loss(policy, reference, rows("b", "c"), correct, z0=0.4, beta=0.5)
    up, down = sigmoid(0.5 * (2.0 - 0.4)), sigmoid(0.5 * (0.4 + 1.0))
    assert losses.tolist() == pytest.approx([1.33 - 1.33 * up, 1 - down])
    pull, push = 1.33 * 0.5 * up * (1 - up), 0.5 * down * (1 - down)
    assert gradient(losses, policy) == pytest.approx([0, -pull, 0, -pull, push])


def test_oreo(policy):
    """Each part by its own sum, term by term, with the gradient of exactly those terms that carry one."""
    value, beta, alpha = torch.tensor([0.2, -0.3, 9.0, 9.0, 9.0], requires_grad=True), 0.5, 0.1
    outcome = torch.tensor([1.0, -1.0])
    losses = dvo.oreo_loss(policy, reference, value, rows("a", "c"), PARENT, outcome, beta, alpha)
    V, ratio, expected = {1: 0.2, 2: -0.3, 4: 0.2}, {1: 0.5, 2: -0.5, 4: -1.0}, []      # V(s_t) before step i
    by_value, by_policy = np.zeros(5), np.zeros(5)
    for path, R in ([1, 2], 1.0), ([4], -1.0):
        total = 0.0
        for t, i in enumerate(path):
            ahead = sum(ratio[j] for j in path[t:])
            error = V[i] - R + beta * ahead                         # value and policy parts: same number
            total += 2 * error ** 2 + alpha * ratio[i] ** 2 / 2
            by_value[PARENT[i]] += 2 * error / len(path)
            by_policy[i] += (2 * error * beta + alpha * ratio[i]) / len(path)
        expected.append(total / len(path))
    assert losses.tolist() == pytest.approx(expected)
    to_policy, to_value = torch.autograd.grad(losses.sum(), (policy, value))
    assert to_policy.tolist() == pytest.approx(by_policy.tolist())
    assert to_value.tolist() == pytest.approx(by_value.tolist())


def test_oreo_is_zero_where_the_bellman_equation_holds():
    """V(s_t) = R - beta * sum of the log-ratios ahead, without regulariser."""
    value = torch.tensor([1 - 0.1 * 0.0, 1 - 0.1 * -0.5, 0, 0, 0])
    loss = dvo.oreo_loss(torch.tensor(POLICY), reference, value, rows("a"), PARENT, torch.ones(1), alpha=0.0)
    assert loss.tolist() == pytest.approx([0])


def test_value_loss():
    value = torch.tensor([0.5, -0.5, 9.0, 9.0, 9.0], requires_grad=True)
    losses = dvo.value_loss(value, rows("a", "c"), PARENT, torch.tensor([1.0, -1.0]))
    assert losses.tolist() == pytest.approx([(0.5 ** 2 + 1.5 ** 2) / 2, 1.5 ** 2])
    assert gradient(losses, value) == pytest.approx([-0.5 + 3.0, -1.5, 0, 0, 0])


def test_where_policy_and_reference_agree():
    """log 2 for DPO, half their weights for KTO, squared credits for DVO, twice R^2 for OREO with V = 0."""
    same, correct = torch.tensor(REFERENCE), torch.tensor([True, False])
    assert dvo.dpo_loss(same, reference, rows("a"), rows("b")).item() == pytest.approx(math.log(2))
    losses = dvo.kto_loss(same, reference, rows("a", "b"), correct, z0=0.0)
    assert losses.tolist() == pytest.approx([0.665, 0.5])
    credit = torch.tensor([0, 0.5, -1, 0.25, 2])
    assert dvo.dvo_loss(same, reference, credit, rows("a", "c")).tolist() == [0.625, 4]
    losses = dvo.oreo_loss(same, reference, torch.zeros(5), rows("a", "c"), PARENT, torch.tensor([1.0, -1.0]))
    assert losses.tolist() == [2, 2]


# ---------------------------------------------------------------- what each objective draws from a tree


def tree_of(*steps, question="q"):
    """Steps (parent, reward, valid): a reward ends a step. Its token is 10 + its index."""
    tree = mcts.Tree(question, "a", prompt=[1, 2, 3])
    for parent, reward, valid in steps:
        token, ended = 10 + len(tree.nodes), reward != 0
        i = tree.add(mcts.Node(parent, [token], reward=reward, terminal=ended, valid=valid))
        if reward:
            mcts.backup(tree, i)
    return tree


@pytest.fixture
def tree():
    """0 -> 1 -> (2 right, 3 wrong), 0 -> 4 -> (5 wrong, 6 wrong), 0 -> 7 wrong and not valid."""
    return tree_of((0, 0, True), (1, 1, True), (1, -1, True), (0, 0, True), (4, -1, True), (4, -1, True),
                   (0, -1, False))


def drawn(choose, tree, n=4, seed=0):
    example = dvo.make_example(tree, n, seed, choose=choose)
    if example is None:
        return None
    nodes = [row.nonzero().flatten().tolist() for row in example.path]
    return nodes, example.correct.tolist(), example.units


def test_rft_draws_correct_paths(tree):
    assert drawn(dvo.correct_paths, tree) == ([[1, 2]], [True], 1)


def test_dpo_pairs_every_drawn_path(tree):
    nodes, correct, units = drawn(dvo.path_pairs, tree)
    assert nodes[:3] == 3 * [[1, 2]] and sorted(nodes[3:]) == [[1, 3], [4, 5], [4, 6]]
    assert correct == 3 * [True] + 3 * [False] and units == 3


def test_step_dpo_pairs_siblings_by_value(tree):
    """2 over 3 (gap 2), 1 over 4 (V 0 against -1); 5 and 6 are equal, 7 is not valid."""
    assert drawn(dvo.sibling_pairs, tree) == ([[2], [1], [3], [4]], [True, True, False, False], 2)
    assert drawn(dvo.sibling_pairs, tree, n=1) == ([[2], [3]], [True, False], 1)
    packed = dvo.make_example(tree, choose=dvo.sibling_pairs).pack
    assert set(packed.node) == {0, 1, 2, 3, 4}                      # prefixes join the pack


def test_the_value_model_sees_outcomes_at_their_shares(tree):
    nodes, correct, _ = drawn(dvo.any_paths, tree)
    assert len(nodes) == 5 and sum(correct) == 1   # all that ended, valid or not
    assert [7] in nodes and len(drawn(dvo.any_paths, tree, n=2)[0]) == 4


@pytest.mark.parametrize("choose", [dvo.path_pairs, dvo.sibling_pairs])
def test_no_pair_no_example(choose):
    for outcome in 1, -1:                                           # one-sided, or all values tied
        assert drawn(choose, tree_of((0, outcome, True), (0, outcome, True))) is None
    assert drawn(choose, tree_of((0, 1, True))) is None             # one path only


def test_credit_of_an_example_is_that_of_its_tree(tree):
    example = dvo.make_example(tree)
    assert example.credit.tolist()[1:] == pytest.approx([tree.credit(i) for i in range(1, 8)])
    assert example.outcome.tolist() == [1, -1, -1, -1]


def loss_of(objective, example, logprobs, beta=0.5, level="step"):
    values = torch.zeros_like(logprobs)
    policy = torch.stack((logprobs, values)) if objective == "oreo" else logprobs
    return dvo.OBJECTIVES[objective][1](example, policy, beta, level)


@pytest.mark.parametrize("objective", dvo.OBJECTIVES)
def test_descent_moves_chosen_up_and_rejected_down(objective):
    """A wrong sign anywhere would show here."""
    example = dvo.make_example(tree_of((0, 1, True), (0, -1, True)), choose=dvo.OBJECTIVES[objective][0])
    example.reference = torch.linspace(-2, -1, 3)
    logprobs = example.reference.clone().requires_grad_()
    losses = loss_of(objective, example, logprobs)
    assert losses.shape == (example.units,)
    step = -torch.autograd.grad(losses.sum(), logprobs)[0]
    rewards = example.path @ step
    assert (rewards[example.correct] > 0).all()
    assert objective == "rft" or (rewards[~example.correct] < 0).all()


def test_the_level_matters(tree):
    example = dvo.make_example(tree)
    example.reference, logprobs = torch.zeros(8), torch.linspace(0, 1, 8)
    step, response = (loss_of("dvo", example, logprobs, level=level) for level in ("step", "response"))
    assert not torch.allclose(step, response)


# ---------------------------------------------------------------- KTO's reference point


def many(n=5):
    trees = [tree_of((0, 0, True), (1, 1, True), (0, -1, True), question=f"q{i}") for i in range(n)]
    for i, t in enumerate(trees):
        t.prompt = [i] * (i + 1)
        for node in t.nodes[1:]:
            node.tokens = [100 * i + token for token in node.tokens]
    return [dvo.make_example(t) for t in trees]


def test_foreign_paths_come_from_other_questions():
    examples = many()
    dvo.add_foreign(examples, seed=0)
    others = set()
    for i, e in enumerate(examples):
        prompt, path = (e.foreign.tokens[e.foreign.node == k].tolist() for k in (0, 1))
        [other] = {token // 100 for token in path}                  # one path of one question, whole
        assert prompt == [i] * (i + 1) and other != i
        assert [token % 100 for token in path] in ([11, 12], [13])
        others.add(other)
    assert others == set(range(5))                                  # each lends once
    again = many()
    dvo.add_foreign(again, seed=0)
    assert all((a.foreign.tokens == b.foreign.tokens).all() for a, b in zip(examples, again))


def test_one_question_has_no_foreign_path():
    [example] = many(1)
    dvo.add_foreign([example], seed=0)
    assert example.foreign is None


@pytest.mark.parametrize("shift, z0", [(0.0, 0.0), (0.5, 0.5), (-0.5, 0.0)])
def test_reference_point_is_the_mean_log_ratio_and_not_negative(shift, z0):
    examples = many(4)
    dvo.add_foreign(examples, seed=0)
    policy = lambda packs: [torch.tensor([0.0, -float(len(p.tokens))]) for p in packs]
    for k, e in enumerate(examples):                                # log-ratios around the shift
        e.foreign_reference = -len(e.foreign.tokens) - shift + (-1) ** k * 0.25
    batches = [(1, examples[:3]), (1, examples[3:]), (0, examples[:1])]         # the last to fill up a rank
    assert dvo.reference_point(policy, batches, 4) == pytest.approx(z0)


def test_kto_training_asks_for_the_reference_point():
    """Its loss at step 2 is that of a policy that has moved, with z0 of that policy."""
    model, examples = tiny.model(), many(4)
    for e in examples:
        e.pack.tokens %= 300
    dvo.add_foreign(examples, seed=0)
    policy, seen = dvo.Policy(model), []
    for e in examples:
        e.reference = dvo.step_logprobs(policy, e.pack).detach()
        e.foreign_reference = dvo.step_logprobs(policy, e.foreign)[1].item() - 1

    def loss_fn(e, logprobs):
        seen.append(e.z0)
        return dvo.kto_loss(logprobs, e.reference, e.path, e.correct, e.z0)
    dvo.train(policy, examples, loss_fn, lr=1e-3, epochs=2, questions_per_step=4, micro_tokens=1000)
    assert seen[:4] == pytest.approx([1.0] * 4, abs=1e-4)           # the log-ratio we planted
    assert len(set(seen[4:])) == 1 and abs(seen[4] - 1) > 1e-3


# ---------------------------------------------------------------- the value model


def solvable(i):
    """First step 20 leads to a right answer in 3 of 4 cases, 21 in 1 of 4; V(s_0) = 0. Ends do not differ."""
    tree = mcts.Tree(f"question {i}", "a", prompt=[5, 6, 7 + i])
    for token, outcomes in (20, (1, 1, 1, -1)), (21, (1, -1, -1, -1)):
        step = tree.add(mcts.Node(0, [token]))
        for k, reward in enumerate(outcomes):
            mcts.backup(tree, tree.add(mcts.Node(step, [30 + k], reward=reward, terminal=True)))
    return tree


def test_the_value_model_recovers_the_values_of_a_solvable_tree():
    """V of states it has seen, from outcomes alone; and the policy gets its weights back."""
    trees = [solvable(i) for i in range(8)]
    examples = [dvo.make_example(t) for t in trees]
    valued = [dvo.make_example(t, keep_unsolved=True, choose=dvo.any_paths) for t in trees]
    policy = dvo.Policy(tiny.model(chances=None), value_head=True)
    before = [p.clone() for p in policy.parameters()]
    searched = [e.value for e in examples]
    dvo.value_targets(policy, examples, valued, 1e-2, epochs=60, questions_per_step=4, micro_tokens=10**6)
    assert all(torch.equal(p, old) for p, old in zip(policy.parameters(), before))
    for e, old in zip(examples, searched):
        inner = [0, 1, 6]                                           # root, after 20, after 21
        assert old[inner].tolist() == pytest.approx([0, 0.5, -0.5])
        assert e.value[inner].tolist() == pytest.approx([0, 0.5, -0.5], abs=0.1)
        assert e.credit[1] > 0.3 > -0.3 > e.credit[6]
        assert e.credit[2] == pytest.approx(1 - e.value[1])         # a terminal step: r - V(s)


def test_values_are_those_of_one_plain_row():
    """The head reads the state that each step leads to: its last token, on the path."""
    tree, model = solvable(0), tiny.model(dtype=torch.float64)
    policy = dvo.Policy(model, value_head=True)
    torch.nn.init.normal_(policy.value_head.weight)
    packed = policy(packs=[dvo.pack(tree, [tree.path(2), tree.path(7)])], values=True)[0]
    for i in 0, 1, 2, 6, 7:
        row = torch.tensor([tree.prompt + [t for j in tree.path(i) for t in tree.nodes[j].tokens]])
        state = model.model(input_ids=row)[0][0, -1]
        assert packed[1, i].item() == pytest.approx(policy.value_head(state).item(), abs=1e-9)
    assert packed[1, [3, 4, 5]].tolist() == [0, 0, 0]               # outside the pack


def test_without_a_value_head_a_policy_saves_what_it_did_before():
    assert not any("value" in name for name in dvo.Policy(tiny.model()).state_dict())


def test_training_a_value_head_goes_on_where_it_stopped(tmp_path):
    """OREO, stopped after a saved step: same policy and head as in one go, bit for bit."""
    trees = [solvable(i) for i in range(4)]
    examples = [dvo.make_example(t) for t in trees]

    def run(folder, stop_at=None):
        policy = dvo.Policy(tiny.model(dtype=torch.float64), value_head=True)
        dvo.add_reference(policy, [*map(fresh, examples)], 10**6)

        def log(step, **_):
            if step == stop_at:
                raise InterruptedError
        loss = lambda e, out: dvo.oreo_loss(out[0], e.reference, out[1], e.path, e.parent, e.outcome)
        try:
            dvo.train(policy, examples, loss, lr=1e-3, value_lr=1e-2, epochs=3, questions_per_step=2,
                      micro_tokens=10**6, state=folder, save_every=2, log=log)
        except InterruptedError:
            return run(folder)
        return list(policy.parameters())

    def fresh(example):                                             # as searched by this very model
        example.reference = example.sampled = dvo.step_logprobs(tiny.model(dtype=torch.float64),
                                                                example.pack).detach()
        return example
    whole, stopped = run(tmp_path / "whole"), run(tmp_path / "stopped", stop_at=4)
    assert all(torch.equal(a, b) for a, b in zip(whole, stopped)) and whole[-2].abs().sum() > 0
