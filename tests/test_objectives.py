# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""dvo.py's objectives: losses and gradients against closed forms, what each draws from a tree, the critic.

    python -m pytest -q tests/test_objectives.py
"""
import math

import numpy as np
import pytest
import torch

import tiny                                                         # first: it puts the project on sys.path
import dvo
import mcts
from eval import InputError


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


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


def test_grpo(policy):
    """Path b, (1, 3): step 1 within the clip, step 3 beyond it; the gradient stops where clipping gains less."""
    tokens = torch.tensor([0.0, 2, 2, 2, 2])                        # ratios exp(0.25), exp(0.75)
    advantage = torch.tensor([0.0, -1.0, 0.0, 2.0, 0.0])
    losses = dvo.grpo_loss(policy, reference, advantage, tokens, rows("b"), clip=0.5)
    one, three = math.exp(0.25), math.exp(0.75)
    assert three > 1.5
    assert losses.tolist() == pytest.approx([-(-one + 2 * 1.5) / 2])
    assert gradient(losses, policy) == pytest.approx([0, one / 2 / 2, 0, 0, 0])


def test_grpo_with_the_advantage_of_a_path_is_one_a_path(policy):
    tokens = torch.ones(5)
    advantage = torch.tensor([[1.0] * 5, [-0.5] * 5])
    losses = dvo.grpo_loss(policy, reference, advantage, tokens, rows("a", "b"), clip=9.0)
    mean_ratio = [(math.exp(0.5) + math.exp(-0.5)) / 2, (math.exp(0.5) + math.exp(1.5)) / 2]
    assert losses.tolist() == pytest.approx([-mean_ratio[0], 0.5 * mean_ratio[1]])


def test_grpo_ratio_does_not_depend_on_the_length_of_a_step():
    """A step of 2 n tokens that are all as much likelier has the ratio of one of n."""
    tokens = torch.tensor([3.0, 6.0])
    losses = dvo.grpo_loss(0.1 * tokens, torch.zeros(2), torch.ones(2), tokens, torch.eye(2))
    assert losses.tolist() == pytest.approx([-math.exp(0.1)] * 2)


def test_where_policy_and_reference_agree():
    """log 2 for DPO, half their weights for KTO, squared credits for DVO, twice R^2 for OREO with V = 0, minus
    the mean advantage for GRPO."""
    same, correct = torch.tensor(REFERENCE), torch.tensor([True, False])
    assert dvo.dpo_loss(same, reference, rows("a"), rows("b")).item() == pytest.approx(math.log(2))
    losses = dvo.kto_loss(same, reference, rows("a", "b"), correct, z0=0.0)
    assert losses.tolist() == pytest.approx([0.665, 0.5])
    credit = torch.tensor([0, 0.5, -1, 0.25, 2])
    assert dvo.dvo_loss(same, reference, credit, rows("a", "c")).tolist() == [0.625, 4]
    losses = dvo.oreo_loss(same, reference, torch.zeros(5), rows("a", "c"), PARENT, torch.tensor([1.0, -1.0]))
    assert losses.tolist() == [2, 2]
    assert dvo.grpo_loss(same, reference, credit, torch.ones(5), rows("a", "c")).tolist() == [0.25, -2]


# ---------------------------------------------------------------- losses without a tree, and refusals


def test_plain_rows_give_what_a_tree_gives(policy):
    """Rows a and b share their first step, which a tree holds once: same losses, same gradient."""
    logprobs = torch.tensor([[-9.0, -0.4, -0.6, -2.5], [-9.0, -0.4, -0.6, -0.5]], requires_grad=True)
    step = torch.tensor([[-1, 0, 0, 1], [-1, 0, 0, 1]])
    summed, path = dvo.sum_steps(logprobs, step)
    assert summed.tolist() == [-1, -2.5, -1, -0.5] and path.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    order = [1, 2, 1, 3]                                            # the nodes of those steps
    credit = torch.tensor([0, 0.5, -1, 0.25, 2])
    plain = dvo.dvo_loss(summed, reference[order], credit[order], path)
    packed = dvo.dvo_loss(policy, reference, credit, rows("a", "b"))
    assert plain.tolist() == pytest.approx(packed.tolist())
    by_node, (by_token,) = gradient(packed, policy), torch.autograd.grad(plain.sum(), logprobs)
    assert by_token[:, 1].sum().item() == pytest.approx(by_node[1])
    assert by_token[:, 3].tolist() == pytest.approx(by_node[2:4]) and not by_token[:, 0].any()


def test_steps_of_uneven_rows():
    summed, path = dvo.sum_steps(torch.tensor([[-1.0, -2.0], [-4.0, -8.0]]), torch.tensor([[0, -1], [0, 1]]))
    assert summed.tolist() == [-1, 0, -4, -8] and path.tolist() == [[1, 0, 0, 0], [0, 0, 1, 1]]


def test_another_level_is_refused(policy):
    with pytest.raises(InputError, match="'step' or 'response', not 'respones'"):
        dvo.dvo_loss(policy, reference, reference, rows("a"), level="respones")


two, three, five = torch.zeros(2), torch.zeros(5, 5), torch.zeros(5)


@pytest.mark.parametrize("call, name", [
    (lambda: dvo.dvo_loss(three, five, five, rows("a")), "policy"),
    (lambda: dvo.dvo_loss(five, five, five[:, None], rows("a")), "credit"),
    (lambda: dvo.rft_loss(two, rows("a")), "policy"),
    (lambda: dvo.dpo_loss(five, five, rows("a"), rows("a", "b")), "rejected"),
    (lambda: dvo.step_dpo_loss(five, two, rows("a"), rows("b")), "reference"),
    (lambda: dvo.kto_loss(five, five, rows("a", "b"), torch.tensor([True]), 0.0), "correct"),
    (lambda: dvo.oreo_loss(five, five, two, rows("a"), PARENT, torch.ones(1)), "value"),
    (lambda: dvo.value_loss(five, rows("a"), PARENT, torch.ones(2)), "outcome"),
    (lambda: dvo.grpo_loss(five, five, torch.ones(2, 5), five, rows("a")), "advantage")])
def test_shapes_that_would_broadcast_are_refused(call, name):
    with pytest.raises(InputError, match=f"^{name} is .* but must be"):
        call()


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


def test_step_dpo_pairs_visited_siblings_by_value(tree):
    """1 over 4 (V 0 against -1): both have two outcomes. 2 over 3, a larger gap, has one each; 7 is not valid."""
    assert drawn(dvo.sibling_pairs, tree) == ([[1], [4]], [True, False], 1)
    packed = dvo.make_example(tree, choose=dvo.sibling_pairs).pack
    assert set(packed.node) == {0, 1, 4}


def test_step_dpo_takes_the_largest_gaps():
    """Two states with pairs, gaps 2 and 1: prefixes join the pack."""
    wide = [(1, 0, True), (1, 0, True), (2, 1, True), (2, 1, True), (3, -1, True), (3, -1, True)]
    found = tree_of((0, 0, True), *wide, (0, 0, True), (8, -1, True), (8, -1, True))
    assert drawn(dvo.sibling_pairs, found) == ([[2], [1], [3], [8]], [True, True, False, False], 2)
    assert drawn(dvo.sibling_pairs, found, n=1) == ([[2], [3]], [True, False], 1)
    assert set(dvo.make_example(found, n=1, choose=dvo.sibling_pairs).pack.node) == {0, 1, 2, 3}


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


def loss_of(objective, example, logprobs, **how):
    value = torch.zeros_like(logprobs) if objective == "oreo" else None
    return dvo.objective_loss(objective, example, logprobs, beta=0.5, value=value, **how)


@pytest.mark.parametrize("objective", dvo.OBJECTIVES)
def test_descent_moves_chosen_up_and_rejected_down(objective):
    """A wrong sign anywhere would show here."""
    steps = [(0, 1, True), (0, -1, True)]
    if objective == "step-dpo":                                     # siblings with two outcomes each
        steps = [(0, 0, True), (1, 1, True), (1, 1, True), (0, 0, True), (4, -1, True), (4, -1, True)]
    example = dvo.make_example(tree_of(*steps), choose=dvo.OBJECTIVES[objective])
    example.reference = torch.linspace(-2, -1, len(steps) + 1)
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


def test_grpo_and_vineppo_differ_in_the_advantage_alone(tree):
    """Outcomes 1, -1, -1, -1 have mean -0.5; the credits are those of the tree."""
    example = dvo.make_example(tree)
    example.reference = torch.zeros(8)
    logprobs = torch.zeros(8)
    assert loss_of("grpo", example, logprobs).tolist() == pytest.approx([-1.5, 0.5, 0.5, 0.5])
    credits = example.path @ example.credit / example.path.sum(1)
    assert loss_of("vineppo", example, logprobs).tolist() == pytest.approx((-credits).tolist())


def test_an_unknown_objective_is_refused(tree):
    with pytest.raises(InputError, match="one of dvo, .*not 'ppo'"):
        dvo.objective_loss("ppo", dvo.make_example(tree), torch.zeros(8))


# ---------------------------------------------------------------- KTO's reference point


def many(n=5):
    trees = [tree_of((0, 0, True), (1, 1, True), (0, -1, True), question=f"q{i}") for i in range(n)]
    for i, t in enumerate(trees):
        t.prompt = [i] * (i + 1)
        for node in t.nodes[1:]:
            node.tokens = [100 * i + token for token in node.tokens]
    return [dvo.make_example(t) for t in trees]


def test_mismatched_paths_come_from_other_questions_of_the_step():
    examples = many()
    drawn = dvo.mismatched(examples, [[0, 1, 2], [3, 4]], context=99, seed=0)
    for pairs, chosen in zip(drawn, [{0, 1, 2}, {3, 4}]):
        prompts, lenders = set(), set()
        for p in [pair.pack for pair in pairs]:
            prompt, path = (p.tokens[p.node == k].tolist() for k in (0, 1))
            [lender] = {token // 100 for token in path}             # one path of one question, whole
            assert [token % 100 for token in path] in ([11, 12], [13])
            assert prompt == [prompt[0]] * (prompt[0] + 1) and lender != prompt[0]
            prompts.add(prompt[0])
            lenders.add(lender)
        assert prompts == lenders == chosen                         # each asks once and lends once


def test_mismatched_pairs_are_drawn_anew_for_each_step_and_by_seed():
    def tokens(seed):
        drawn = dvo.mismatched(many(), [[0, 1, 2, 3, 4]] * 6, context=99, seed=seed)
        return [[pair.pack.tokens.tolist() for pair in pairs] for pairs in drawn]
    drawn_once = tokens(0)
    assert drawn_once == tokens(0) != tokens(1) and len({str(packs) for packs in drawn_once}) > 3


def test_mismatched_pairs_stay_within_the_context():
    """Prompts of 1 to 5 tokens with paths of 1 or 2."""
    drawn = dvo.mismatched(many(), [[0, 1, 2, 3, 4]] * 20, context=4, seed=0)
    lengths = {len(pair.pack.tokens) for pairs in drawn for pair in pairs}
    assert max(lengths) == 4


def test_one_question_has_no_mismatched_path():
    assert dvo.mismatched(many(1), [[0]], context=99, seed=0) == [[]]
    assert dvo.reference_point(policy=None, pairs=[], tokens=99) == 0


@pytest.mark.parametrize("shift, z0", [(0.0, 0.0), (0.5, 0.5), (-0.5, 0.0)])
def test_reference_point_is_the_mean_log_ratio_and_not_negative(shift, z0):
    def policy(packs):
        return [torch.tensor([0.0, -float(len(p.tokens))]) for p in packs]

    [pairs] = dvo.mismatched(many(4), [[0, 1, 2, 3]], context=99, seed=0)
    for k, pair in enumerate(pairs):
        pair.reference[1] = -len(pair.pack.tokens) - shift + (-1) ** k * 0.25
    assert dvo.reference_point(policy, pairs, tokens=8) == pytest.approx(z0)    # log-ratios around the shift


def test_kto_training_asks_for_the_reference_point_before_each_step():
    """Its loss at step 2 is that of a policy that has moved, with z0 of that policy."""
    examples = many(4)
    for e in examples:
        e.pack.tokens %= 300
    policy, seen = dvo.Policy(tiny.model()), []
    for e in examples:
        e.reference = dvo.step_logprobs(policy, e.pack).detach()
    steps = [[0, 1, 2, 3]] * 2
    pairs = dvo.mismatched(examples, steps, context=99, seed=0)
    dvo.add_reference(policy, sum(pairs, []), 1000)
    for pair in sum(pairs, []):
        pair.reference = pair.reference - 1

    def loss_fn(e, logprobs, z0):
        seen.append(z0)
        return dvo.objective_loss("kto", e, logprobs, z0=z0)

    dvo.train([dvo.Learner(policy, 1e-2)], examples, loss_fn, steps, micro_tokens=1000,
              of_step=lambda step: {"z0": dvo.reference_point(policy, pairs[step], 1000)})
    assert seen[:4] == pytest.approx([1.0] * 4, abs=1e-4)           # the log-ratio we planted
    assert len(set(seen[4:])) == 1 and abs(seen[4] - 1) > 1e-3


# ---------------------------------------------------------------- the critic


def solvable(i):
    """First step 20 leads to a right answer in 3 of 4 cases, 21 in 1 of 4; V(s_0) = 0. Ends do not differ."""
    tree = mcts.Tree(f"question {i}", "a", prompt=[5, 6, 7 + i])
    for token, outcomes in (20, (1, 1, 1, -1)), (21, (1, -1, -1, -1)):
        step = tree.add(mcts.Node(0, [token]))
        for k, reward in enumerate(outcomes):
            mcts.backup(tree, tree.add(mcts.Node(step, [30 + k], reward=reward, terminal=True)))
    return tree


def test_the_critic_recovers_the_values_of_a_solvable_tree():
    """V of states it has seen, from outcomes alone; the policy is not touched."""
    trees = [solvable(i) for i in range(8)]
    examples = [dvo.make_example(t) for t in trees]
    valued = [dvo.make_example(t, keep_unsolved=True, choose=dvo.any_paths) for t in trees]
    policy = dvo.Policy(tiny.model(chances=None))
    before = [p.clone() for p in policy.parameters()]
    searched = [e.value for e in examples]
    critic = dvo.make_critic(policy)
    assert not critic(packs=[examples[0].pack])[0].any()            # its head starts at 0
    dvo.train([dvo.Learner(critic, 1e-2)], valued, dvo.critic_loss, dvo.schedule(8, 60, 4, seed=0),
              micro_tokens=10**6)
    for e, value in zip(examples, critic(packs=[e.pack for e in examples])):
        e.take_values(value.detach())
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
    critic = dvo.make_critic(dvo.Policy(model))
    torch.nn.init.normal_(critic.head.weight)
    [packed] = critic(packs=[dvo.pack(tree, [tree.path(2), tree.path(7)])])
    for i in 0, 1, 2, 6, 7:
        row = torch.tensor([tree.prompt + [t for j in tree.path(i) for t in tree.nodes[j].tokens]])
        state = model.model(input_ids=row)[0][0, -1]
        assert packed[i].item() == pytest.approx(critic.head(state).item(), abs=1e-9)
    assert packed[[3, 4, 5]].tolist() == [0, 0, 0]                  # outside the pack


def test_a_critic_is_a_model_of_its_own():
    policy = dvo.Policy(tiny.model())
    critic = dvo.make_critic(policy)
    mine, its = dict(policy.lm.named_parameters()), dict(critic.lm.named_parameters())
    assert its and all(torch.equal(mine[name], weight) for name, weight in its.items())
    assert not {p.data_ptr() for p in mine.values()} & {p.data_ptr() for p in its.values()}
    assert not any("head" in name for name in its)                  # of words


def test_training_two_learners_goes_on_where_it_stopped(tmp_path):
    """OREO, stopped after a saved step: same policy and critic as in one go, bit for bit."""
    trees = [solvable(i) for i in range(4)]
    steps = dvo.schedule(4, 3, 2, seed=0)

    def run(folder, stop_at=None):
        policy = dvo.Policy(tiny.model(dtype=torch.float64))
        learners = [dvo.Learner(policy, 1e-3), dvo.Learner(dvo.make_critic(policy), 1e-2)]
        examples = [dvo.make_example(t) for t in trees]
        for e in examples:
            e.reference = dvo.step_logprobs(tiny.model(dtype=torch.float64), e.pack).detach()

        def log(step, **_):
            if step == stop_at:
                raise InterruptedError

        def loss_fn(e, logprobs, value):
            return dvo.objective_loss("oreo", e, logprobs, value=value)

        try:
            dvo.train(learners, examples, loss_fn, steps, micro_tokens=10**6, state=folder, save_seconds=0.0,
                      log=log)
        except InterruptedError:
            return run(folder)
        return [p for learner in learners for p in learner.module.parameters()]

    whole, stopped = run(tmp_path / "whole"), run(tmp_path / "stopped", stop_at=4)
    assert all(torch.equal(a, b) for a, b in zip(whole, stopped))
    assert whole[-2].abs().sum() > 0                                # the critic's head has learnt
