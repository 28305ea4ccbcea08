# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""dvo.py's objectives: losses and gradients against closed forms, what each draws from a tree, the critic.

    python -m pytest -q tests/test_objectives.py
"""
import inspect
import math
from collections import Counter

import pytest
import torch
import transformers
from pytest import approx as about
from torch import tensor

import tiny                                                         # first: it puts the project on sys.path
import dvo
import mcts
from eval import InputError

# Four steps below the root, 0, and three paths through them; a and b share step 1.
#
#     0 -- 1 -- 2      a = 1, 2
#     |    +--- 3      b = 1, 3
#     +--- 4           c = 4
A, B, C = tensor([
    [0.0, 1, 1, 0, 0],
    [0.0, 1, 0, 1, 0],
    [0.0, 0, 0, 0, 1]]).split(1)
A_AND_B = torch.cat([A, B])
A_AND_C = torch.cat([A, C])
PARENT = tensor([0, 0, 1, 1, 0])
POLICY = tensor([0.0, -1.0, -2.5, -0.5, -3.0])
REFERENCE = tensor([0.0, -1.5, -2.0, -2.0, -2.0])
# So the log-ratios of steps 1 to 4 are 0.5, -0.5, 1.5, -1, and those of the paths
#     a: 0.5 - 0.5 = 0        b: 0.5 + 1.5 = 2        c: -1
CREDIT = tensor([0.0, 0.5, -0.25, 1.0, -2.0])
ONES = torch.ones(5)


@pytest.fixture
def policy():
    return POLICY.clone().requires_grad_()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def expect(losses, *numbers):
    assert losses.tolist() == about(numbers)


def gradient(losses, of):
    """By step, of those where it is not 0."""
    [found] = torch.autograd.grad(losses.sum(), of, retain_graph=True)
    return {i: number for i, number in enumerate(found.tolist()) if number}


# ---------------------------------------------------------------- losses and gradients by hand


def test_dvo_is_the_mean_squared_error_of_beta_log_ratio_and_credit(policy):
    losses = dvo.dvo_loss(policy, REFERENCE, CREDIT, A_AND_C, beta=0.4)
    of_1 = 0.4 * 0.5 - 0.5                                          # beta * log_ratio - credit
    of_2 = 0.4 * -0.5 + 0.25
    of_4 = 0.4 * -1 + 2
    of_path_a = (of_1 ** 2 + of_2 ** 2) / 2
    expect(losses, of_path_a, of_4 ** 2)
    assert gradient(losses, policy) == about({
        1: 2 * of_1 * 0.4 / 2,                                      # times beta, over the steps of the path
        2: 2 * of_2 * 0.4 / 2,
        4: 2 * of_4 * 0.4})


def test_dvo_of_responses_compares_the_sums_over_the_path(policy):
    losses = dvo.dvo_loss(policy, REFERENCE, CREDIT, A_AND_C, beta=0.4, level="response")
    of_a = 0.4 * 0 - (0.5 - 0.25)
    of_c = 0.4 * -1 + 2
    expect(losses, of_a ** 2, of_c ** 2)
    assert gradient(losses, policy) == about({
        1: 2 * of_a * 0.4,
        2: 2 * of_a * 0.4,
        4: 2 * of_c * 0.4})


def test_another_level_is_refused():
    with pytest.raises(InputError, match="'step' or 'response', not 'respones'"):
        dvo.dvo_loss(POLICY, REFERENCE, CREDIT, A, level="respones")


def test_rft_is_the_negative_log_likelihood_of_whole_paths(policy):
    losses = dvo.rft_loss(policy, A_AND_C)
    expect(losses, 1.0 + 2.5, 3.0)
    assert gradient(losses, policy) == {1: -1, 2: -1, 4: -1}


def test_dpo_is_the_logistic_loss_of_the_margin(policy):
    over = torch.cat([B, A])
    losses = dvo.dpo_loss(policy, REFERENCE, A_AND_C, over, beta=0.5)
    a_over_b = 0.5 * (0 - 2)
    c_over_a = 0.5 * (-1 - 0)
    expect(losses, -math.log(sigmoid(a_over_b)), -math.log(sigmoid(c_over_a)))
    pull_1 = 0.5 * sigmoid(-a_over_b)                               # beta * (1 - sigmoid(margin))
    pull_2 = 0.5 * sigmoid(-c_over_a)
    assert gradient(losses, policy) == about({
        1: pull_2,                                                  # on both paths of the first pair
        2: pull_2 - pull_1,
        3: pull_1,
        4: -pull_2})


def test_step_dpo_leaves_the_shared_prefix_alone(policy):
    _, _, step_2, step_3, _ = torch.eye(5).split(1)                 # both taken after step 1
    losses = dvo.step_dpo_loss(policy, REFERENCE, step_2, step_3, beta=0.5)
    margin = 0.5 * (-0.5 - 1.5)
    expect(losses, -math.log(sigmoid(margin)))
    pull = 0.5 * sigmoid(-margin)
    assert gradient(losses, policy) == about({2: -pull, 3: pull})


def test_kto_saturates_around_its_reference_point(policy):
    paths = torch.cat([B, C])
    correct = tensor([True, False])
    losses = dvo.kto_loss(policy, REFERENCE, paths, correct, z0=0.4, beta=0.5)
    of_b = sigmoid(0.5 * (2 - 0.4))                                 # correct: gain above z0
    of_c = sigmoid(0.5 * (0.4 + 1))                                 # incorrect: loss below z0
    expect(losses, 1.33 - 1.33 * of_b, 1 - of_c)
    pull = 1.33 * 0.5 * of_b * (1 - of_b)
    push = 0.5 * of_c * (1 - of_c)
    assert gradient(losses, policy) == about({1: -pull, 3: -pull, 4: push})


OUTCOME = tensor([1.0, -1.0])                                       # of a, of c


@pytest.fixture
def value():
    """V(s_t) is 0.2 at the root, where steps 1 and 4 are taken, and -0.3 after step 1, where 2 is taken."""
    return tensor([0.2, -0.3, 9.0, 9.0, 9.0], requires_grad=True)


def test_oreo_asks_for_the_bellman_equation_twice_and_regularises(policy, value):
    """Each part by its own sum; the value part moves V alone, the policy part the step's own log-ratio."""
    losses = dvo.oreo_loss(policy, REFERENCE, value, A_AND_C, PARENT, OUTCOME, beta=0.5, alpha=0.1)
    # V(s_t) - R + beta * (log-ratios from step t on): the number in both squares
    of_1 = 0.2 - 1 + 0.5 * (0.5 - 0.5)
    of_2 = -0.3 - 1 + 0.5 * -0.5
    of_4 = 0.2 + 1 + 0.5 * -1
    # and alpha / 2 * log_ratio^2
    step_1 = 2 * of_1**2 + 0.05 * 0.5**2
    step_2 = 2 * of_2**2 + 0.05 * 0.5**2
    step_4 = 2 * of_4**2 + 0.05 * 1
    expect(losses, (step_1 + step_2) / 2, step_4)
    assert gradient(losses, policy) == about({
        1: (2 * of_1 * 0.5 + 0.1 * 0.5) / 2,                        # 2 * error * beta + alpha * log_ratio
        2: (2 * of_2 * 0.5 - 0.1 * 0.5) / 2,
        4: 2 * of_4 * 0.5 - 0.1 * 1})
    assert gradient(losses, value) == about({
        0: 2 * of_1 / 2 + 2 * of_4,
        1: 2 * of_2 / 2})


def test_oreo_is_zero_where_the_bellman_equation_holds():
    at_root = 1 - 0.1 * (0.5 - 0.5)                                 # R - beta * log-ratios ahead
    after_1 = 1 - 0.1 * -0.5
    value = tensor([at_root, after_1, 0, 0, 0])
    losses = dvo.oreo_loss(POLICY, REFERENCE, value, A, PARENT, ONES[:1], beta=0.1, alpha=0.0)
    expect(losses, 0)


def test_the_value_model_learns_the_outcome_in_every_state_of_a_path(value):
    losses = dvo.value_loss(value, A_AND_C, PARENT, OUTCOME)
    at_root = 0.2 - 1                                               # V - R on path a
    after_1 = -0.3 - 1
    for_c = 0.2 + 1
    expect(losses, (at_root**2 + after_1**2) / 2, for_c**2)
    assert gradient(losses, value) == about({
        0: 2 * at_root / 2 + 2 * for_c,
        1: 2 * after_1 / 2})


def test_grpo_stops_the_gradient_where_clipping_gains_less(policy):
    """On path b, of 2 tokens a step, step 1 is within the clip of 0.5 and step 3 beyond it."""
    advantage = tensor([0.0, -1.0, 0.0, 2.0, 0.0])
    losses = dvo.grpo_loss(policy, REFERENCE, advantage, 2 * ONES, B, clip=0.5)
    ratio_1 = math.exp(0.5 / 2)
    ratio_3 = math.exp(1.5 / 2)
    assert ratio_3 > 1.5
    expect(losses, -(ratio_1 * -1 + 1.5 * 2) / 2)
    per_token = ratio_1 / 2
    assert gradient(losses, policy) == about({1: per_token / 2})    # mean of two steps


def test_grpo_never_clips_what_makes_the_loss_worse(policy):
    """Step 3 is likelier by exp(1.5) > 1.5, and bad: the gradient still pushes it down."""
    advantage = tensor([0.0, 0.0, 0.0, -1.0, 0.0])
    losses = dvo.grpo_loss(policy, REFERENCE, advantage, ONES, B, clip=0.5)
    half = math.exp(1.5) / 2
    expect(losses, half)
    assert gradient(losses, policy) == about({3: half})


def test_grpo_takes_the_advantage_of_a_path_too():
    advantage = torch.stack([ONES, -0.5 * ONES])
    losses = dvo.grpo_loss(POLICY, REFERENCE, advantage, ONES, A_AND_B, clip=9.0)
    sum_a = math.exp(0.5) + math.exp(-0.5)                          # of the ratios of the steps of a
    sum_b = math.exp(0.5) + math.exp(1.5)
    expect(losses, -sum_a / 2, 0.5 * sum_b / 2)


def test_where_policy_and_reference_agree_each_loss_has_its_neutral_value():
    same = REFERENCE, REFERENCE
    correct = tensor([True, False])
    of_pair = dvo.dpo_loss(*same, A, C)
    expect(of_pair, math.log(2))
    half_the_weight = dvo.kto_loss(*same, A_AND_C, correct, z0=0.0)
    expect(half_the_weight, 1.33 / 2, 1 / 2)
    mean_of_squares = dvo.dvo_loss(*same, CREDIT, A_AND_C)
    expect(mean_of_squares, (0.5**2 + 0.25**2) / 2, 2**2)
    twice_R_squared = dvo.oreo_loss(*same, 0 * ONES, A_AND_C, PARENT, OUTCOME)
    expect(twice_R_squared, 2, 2)
    mean_advantage = dvo.grpo_loss(*same, CREDIT, ONES, A_AND_C)
    expect(mean_advantage, -(0.5 - 0.25) / 2, 2)


def test_the_defaults_of_losses_are_those_of_their_papers():
    defaults = {}
    for loss in dvo.dvo_loss, dvo.dpo_loss, dvo.kto_loss, dvo.oreo_loss, dvo.grpo_loss, dvo.objective_loss:
        for name, parameter in inspect.signature(loss).parameters.items():
            if isinstance(parameter.default, float):
                defaults.setdefault(name, set()).add(parameter.default)
    assert defaults == {
        "beta": {0.1},
        "alpha": {0.01},
        "clip": {0.2},
        "lambda_correct": {1.33},
        "lambda_incorrect": {1.0},
        "z0": {0.0}}


# ---------------------------------------------------------------- losses without a tree, and refusals


def test_plain_rows_give_what_a_tree_gives(policy):
    """Rows a and b share their first step, which a tree holds once: same losses, same gradient."""
    rows = tensor([
        [-9.0, -0.4, -0.6, -2.5],
        [-9.0, -0.4, -0.6, -0.5]], requires_grad=True)
    step = tensor([-1, 0, 0, 1]).expand(2, 4)
    summed, path = dvo.sum_steps(rows, step)
    expect(summed, -1, -2.5, -1, -0.5)
    nodes = [1, 2, 1, 3]
    plain = dvo.dvo_loss(summed, REFERENCE[nodes], CREDIT[nodes], path)
    packed = dvo.dvo_loss(policy, REFERENCE, CREDIT, A_AND_B)
    expect(plain, *packed.tolist())
    by_node = gradient(packed, policy)
    plain.sum().backward()
    prompt, first, again, last = rows.grad.T.tolist()               # by token, of both rows
    assert prompt == [0, 0]
    assert first == again == about([by_node[1] / 2] * 2)
    assert last == about([by_node[2], by_node[3]])


def test_a_log_prob_without_its_step_is_refused():
    with pytest.raises(InputError, match=r"logprobs is .2, 3. and step .2, 4."):
        dvo.sum_steps(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.long))


def test_rows_may_have_different_numbers_of_steps():
    rows = tensor([
        [-1.0, -2.0],
        [-4.0, -8.0]])
    step = tensor([
        [0, -1],
        [0, 1]])
    summed, path = dvo.sum_steps(rows, step)
    expect(summed, -1, 0, -4, -8)
    of_first, of_second = path.tolist()
    assert of_first == [1, 0, 0, 0]
    assert of_second == [0, 0, 1, 1]


@pytest.mark.parametrize("loss", [
    dvo.dvo_loss,
    dvo.rft_loss,
    dvo.dpo_loss,
    dvo.kto_loss,
    dvo.oreo_loss,
    dvo.value_loss,
    dvo.grpo_loss])
def test_each_tensor_that_would_broadcast_is_refused_by_its_name(loss):
    shapes = {"path": (2, 5), "chosen": (2, 5), "rejected": (2, 5), "outcome": (2,), "correct": (2,), "z0": ()}
    given = inspect.signature(loss).parameters.values()
    required = [p.name for p in given if p.default is p.empty]
    good = {name: torch.zeros(shapes.get(name, 5)) for name in required}
    for name in good.keys() - {"path", "chosen"}:                   # which say what the others must be
        for bad in good[name].flatten()[:1], good[name][..., None]:
            with pytest.raises(InputError, match=f"^{name} is .* but must be"):
                loss(**good | {name: bad})


# ---------------------------------------------------------------- what each objective draws from a tree


@pytest.fixture
def tree():
    """Two first steps that go on, 1 and 4, and one that is cut, 7; V(1) = 0, V(4) = -1."""
    return tiny.tree("0", "1 right", "1 wrong", "0", "4 wrong", "4 wrong", "0 invalid")


def drawn(choose, tree, n=4, seed=0, **how):
    """The nodes of the better and of the worse paths of an example, each as "1-2"; [] if there is none."""
    example = dvo.make_example(tree, n, seed, choose=choose, **how)
    if example is None:
        return []
    better, worse = [], []
    for row, correct in zip(example.path, example.correct):
        nodes = row.nonzero().flatten().tolist()
        kind = better if correct else worse
        kind.append("-".join(map(str, nodes)))
    is_paired = choose in (dvo.path_pairs, dvo.sibling_pairs)
    assert example.units == len(better) + (0 if is_paired else len(worse))
    return [better, worse]


def test_paths_end_in_valid_terminals(tree):
    right, wrong = drawn(dvo.draw_paths, tree)
    assert right == ["1-2"]
    assert sorted(wrong) == ["1-3", "4-5", "4-6"]                   # not the cut one, 7


def test_at_most_n_paths_of_each_kind_are_drawn_by_seed(tree):
    found = set()
    for seed in range(20):
        [right], [wrong] = drawn(dvo.draw_paths, tree, n=1, seed=seed)
        assert right == "1-2"
        found.add(wrong)
    assert found == {"1-3", "4-5", "4-6"}


def test_paths_are_drawn_in_proportion_to_the_visits_along_them():
    """The path of 2 has N = 2 + 1, that of 4 has N = 1: of 2,000 seeds 3 in 4 draw the first, within 5
    standard deviations."""
    tree = tiny.tree("0", "1 right", "1 wrong", "0 right")
    ends = Counter()
    for seed in range(2000):
        [path], _ = dvo.draw_paths(tree, 1, seed)
        ends[path[-1]] += 1
    deviation = math.sqrt(0.75 * 0.25 / 2000)
    assert ends[2] / 2000 == about(0.75, abs=5 * deviation)
    assert ends[2] + ends[4] == 2000


def test_rft_draws_correct_paths(tree):
    assert drawn(dvo.correct_paths, tree) == [["1-2"], []]


def test_dpo_pairs_every_drawn_path(tree):
    chosen, rejected = drawn(dvo.path_pairs, tree)
    assert chosen == ["1-2"] * 3
    assert sorted(rejected) == ["1-3", "4-5", "4-6"]


def test_step_dpo_pairs_siblings_of_two_visits_by_value(tree):
    """1 over 4, V 0 against -1. 2 over 3 would be a larger gap, but of one outcome each; 7 is not valid."""
    assert drawn(dvo.sibling_pairs, tree) == [["1"], ["4"]]
    packed = dvo.make_example(tree, choose=dvo.sibling_pairs).pack
    assert set(packed.node) == {0, 1, 4}


def test_step_dpo_takes_the_largest_gaps_with_their_prefixes():
    """Steps 2 and 3 after 1 have V 1 and -1; steps 1 and 8 after the root 0 and -1."""
    tree = tiny.tree(
        "0", "1", "1",
        "2 right", "2 right",
        "3 wrong", "3 wrong",
        "0",
        "8 wrong", "8 wrong")
    assert drawn(dvo.sibling_pairs, tree) == [["2", "1"], ["3", "8"]]
    assert drawn(dvo.sibling_pairs, tree, n=1) == [["2"], ["3"]]
    packed = dvo.make_example(tree, n=1, choose=dvo.sibling_pairs).pack
    assert set(packed.node) == {0, 1, 2, 3}


def test_the_value_model_sees_all_outcomes_at_their_shares(tree):
    right, wrong = drawn(dvo.any_paths, tree)
    assert right == ["1-2"]
    assert sorted(wrong) == ["1-3", "4-5", "4-6", "7"]              # valid or not
    right, wrong = drawn(dvo.any_paths, tree, n=2)
    assert len(right + wrong) == 4                                  # 2 n


@pytest.mark.parametrize("choose", [dvo.path_pairs, dvo.sibling_pairs])
@pytest.mark.parametrize("steps", [
    ["0 right"],
    ["0 right", "0 right"],
    ["0 wrong", "0 wrong"],
    ["0", "1 right", "1 right"],                                    # step 1 has no sibling
    ["0", "1 right", "1 right", "0", "4 right", "4 right"]], ids=str)
def test_without_a_difference_there_is_no_pair_and_no_example(choose, steps):
    assert drawn(choose, tiny.tree(*steps)) == []


def test_unsolved_questions_are_dropped_unless_kept():
    unsolved = tiny.tree("0 wrong")
    assert drawn(dvo.draw_paths, unsolved) == []
    assert drawn(dvo.draw_paths, unsolved, keep_unsolved=True) == [[], ["1"]]
    assert drawn(dvo.correct_paths, unsolved, keep_unsolved=True) == []


def test_an_example_has_the_credits_of_its_tree(tree):
    example = dvo.make_example(tree)
    root = (1 - 4) / 5                                              # its value; then r + V(s') - V(s)
    expect(example.credit, 0,
           0 - root, 1 - 0, -1 - 0,                                 # of steps 1, 2, 3
           -1 - root, -1 + 1, -1 + 1,                               # 4, 5, 6
           -1 - root)                                               # 7
    of_tree = [tree.credit(i) for i in range(1, 8)]
    expect(example.credit[1:], *of_tree)
    expect(example.outcome, 1, -1, -1, -1)


def test_values_of_a_model_replace_those_of_inner_nodes(tree):
    example = dvo.make_example(tree)
    given = torch.linspace(0.1, 0.8, 8)
    example.take_values(given)
    expect(example.value, 0.1, 0.2, 0, 0, 0.5, 0, 0, 0)
    expect(example.credit, 0,
           0.2 - 0.1, 1 - 0.2, -1 - 0.2,
           0.5 - 0.1, -1 - 0.5, -1 - 0.5,
           -1 - 0.1)


@pytest.mark.parametrize("objective", dvo.OBJECTIVES)
def test_descent_moves_better_paths_up_and_worse_ones_down(objective):
    """Two outcomes below each of two siblings, so that there is a pair of every kind."""
    tree = tiny.tree("0", "1 right", "1 right", "0", "4 wrong", "4 wrong")
    example = dvo.make_example(tree, choose=dvo.OBJECTIVES[objective])
    example.reference = torch.linspace(-2, -1, 7)
    logprobs = example.reference.clone().requires_grad_()
    losses = dvo.objective_loss(objective, example, logprobs, torch.zeros(7), beta=0.5)
    assert losses.shape == (example.units,)
    losses.sum().backward()
    moved = example.path @ -logprobs.grad
    assert (moved[example.correct] > 0).all()
    assert (moved[~example.correct] < 0).all()


def test_an_objective_is_the_loss_of_its_name_with_what_the_example_holds(tree):
    """The arguments of every call of a loss, with beta and alpha far from their defaults."""
    policy = torch.linspace(-1, 0, 8)
    value = torch.linspace(0, 1, 8)
    of_paths = dvo.make_example(tree, choose=dvo.draw_paths)
    of_pairs = dvo.make_example(tree, choose=dvo.path_pairs)
    of_paths.reference = of_pairs.reference = policy.flip(0)
    both = policy, policy.flip(0)
    path = of_paths.path
    credit = of_paths.credit
    outcome = of_paths.outcome
    tokens = of_paths.tokens
    pairs = of_pairs.path.chunk(2)
    advantage = outcome - (1 - 1 - 1 - 1) / 4                       # of each path, on all its steps
    by_step = advantage[:, None].expand(4, 8)
    expected = {
        "dvo": dvo.dvo_loss(*both, credit, path, 0.7, "response"),
        "rft": dvo.rft_loss(policy, path),
        "dpo": dvo.dpo_loss(*both, *pairs, 0.7),
        "step-dpo": dvo.dpo_loss(*both, *pairs, 0.7),
        "kto": dvo.kto_loss(*both, path, of_paths.correct, 0.3, 0.7),
        "oreo": dvo.oreo_loss(*both, value, path, of_paths.parent, outcome, 0.7, 0.4),
        "grpo": dvo.grpo_loss(*both, by_step, tokens, path),
        "vineppo": dvo.grpo_loss(*both, credit, tokens, path)}
    assert expected.keys() == dvo.OBJECTIVES.keys()
    settings = dict(beta=0.7, level="response", z0=0.3, alpha=0.4)
    for objective, losses in expected.items():
        example = of_pairs if "dpo" in objective else of_paths
        found = dvo.objective_loss(objective, example, policy, value, **settings)
        assert torch.equal(found, losses), objective


def test_an_unknown_objective_is_refused(tree):
    example = dvo.make_example(tree)
    with pytest.raises(InputError, match="one of dvo, .*not 'ppo'"):
        dvo.objective_loss("ppo", example, example.reference)


# ---------------------------------------------------------------- KTO's reference point

ALL = [0, 1, 2, 3, 4]


def examples_of(questions):
    """Question i is i + 1 tokens i; its paths are (100 i + 11, 100 i + 12), correct, and (100 i + 13)."""
    examples = []
    for i in questions:
        prompt = [i] * (i + 1)
        tree = tiny.tree("0", "1 right", "0 wrong", question=f"q{i}", prompt=prompt)
        for node in tree.nodes[1:]:
            node.tokens = [100 * i + token for token in node.tokens]
        examples.append(dvo.make_example(tree))
    return examples


def mismatched(steps, context=99, seed=0):
    return dvo.mismatched(examples_of(ALL), steps, context, seed)


def asker_and_path(pair):
    """The question of a mismatched pair, whose prompt must be whole, and the tokens of its path."""
    tokens = pair.pack.tokens
    node = pair.pack.node
    prompt = tokens[node == 0].tolist()
    asker = prompt[0]
    assert prompt == [asker] * (asker + 1)
    return asker, tokens[node == 1].tolist()


def test_mismatched_paths_come_whole_from_other_questions_of_the_step():
    steps = [[0, 1, 2], [3, 4]]
    for pairs, chosen in zip(mismatched(steps), steps):
        askers, lenders = [], []
        for asker, path in map(asker_and_path, pairs):
            lender = path[0] // 100
            own = [token - 100 * lender for token in path]
            assert own in ([11, 12], [13])
            assert lender != asker
            askers.append(asker)
            lenders.append(lender)
        assert sorted(askers) == sorted(lenders) == chosen          # each asks once and lends once


def test_mismatched_pairs_are_drawn_anew_for_each_step_and_by_seed():
    def draw(seed):
        return [str([*map(asker_and_path, pairs)]) for pairs in mismatched([ALL] * 6, seed=seed)]

    once = draw(0)
    assert once == draw(0)
    assert once != draw(1)
    assert len(set(once)) > 3


def test_mismatched_pairs_stay_within_the_context():
    """Prompts of 1 to 5 tokens with paths of 1 or 2."""
    pairs = sum(mismatched([ALL] * 20, context=4), [])
    lengths = [len(pair.pack.tokens) for pair in pairs]
    assert max(lengths) == 4


def test_one_question_has_no_mismatched_path_and_a_reference_point_of_0():
    assert mismatched([[3]]) == [[]]
    assert dvo.reference_point(policy=None, pairs=[], max_tokens=99) == 0


@pytest.mark.parametrize("shift, z0", [(0.0, 0.0), (0.5, 0.5), (-0.5, 0.0)])
def test_the_reference_point_is_the_mean_log_ratio_and_not_negative(shift, z0):
    def policy(packs):
        return [tensor([0.0, -len(pack.tokens)]) for pack in packs]

    [pairs] = mismatched([[0, 1, 2, 3]])
    around = 0.25, -0.25, 0.75, -0.75
    for pair, noise in zip(pairs, around):
        logprob = -len(pair.pack.tokens)
        pair.reference[1] = logprob - shift + noise                 # so the mean log-ratio is the shift
    assert dvo.reference_point(policy, pairs, max_tokens=8) == about(z0)


def test_kto_training_asks_for_the_reference_point_before_each_step():
    """At step 2 z0 is that of a policy that has moved."""
    examples = examples_of([0, 1, 2])
    policy = dvo.Policy(tiny.model())
    dvo.add_reference(policy, examples, 1000)
    steps = [[0, 1, 2]] * 2
    pairs = dvo.mismatched(examples, steps, context=99, seed=0)
    planted = sum(pairs, [])
    dvo.add_reference(policy, planted, 1000)
    for pair in planted:
        pair.reference = pair.reference - 1                         # so at first the log-ratio is 1
    seen = []

    def loss_fn(example, logprobs, z0):
        seen.append(z0)
        return dvo.objective_loss("kto", example, logprobs, z0=z0)

    def of_step(step):
        return {"z0": dvo.reference_point(policy, pairs[step], 1000)}

    learner = dvo.Learner(policy, 1e-2)
    dvo.train([learner], examples, loss_fn, steps, micro_tokens=1000, of_step=of_step)
    first, second = seen[:3], seen[3:]
    assert first == about([1] * 3, abs=1e-4)
    assert len(set(second)) == 1
    assert abs(second[0] - 1) > 1e-3


# ---------------------------------------------------------------- the critic


def solvable(i):
    """After step 1 three of four solutions are right, after step 6 one: V is 0.5 and -0.5, and 0 at the root.
    The solutions of both steps have the same tokens."""
    tree = mcts.Tree(f"question {i}", "a", prompt=[5, 6, 7 + i])
    for tokens, rewards in ([20, 22], (1, 1, 1, -1)), ([21], (1, -1, -1, -1)):
        step = tree.add(mcts.Node(0, tokens))
        for k, reward in enumerate(rewards):
            solution = mcts.Node(step, [30 + k], reward=reward, terminal=True)
            mcts.backup(tree, tree.add(solution))
    return tree


def test_the_critic_recovers_the_values_of_a_solvable_tree():
    """V of states it has seen, from outcomes alone; the policy is not touched."""
    valued = [dvo.make_example(solvable(i), choose=dvo.any_paths) for i in range(4)]
    policy = dvo.Policy(tiny.model(chances=None))
    before = [weight.clone() for weight in policy.parameters()]
    critic = dvo.make_critic(policy)
    packs = [example.pack for example in valued]
    assert not any(map(torch.any, critic(packs=packs)))             # its head starts at 0
    steps = dvo.schedule(4, epochs=60, questions_per_step=4, seed=0)
    learner = dvo.Learner(critic, 1e-2)
    dvo.train([learner], valued, dvo.critic_loss, steps, micro_tokens=10**6)
    assert all(map(torch.equal, policy.parameters(), before))
    for example, value in zip(valued, critic(packs=packs)):
        for i, expected in (0, 0), (1, 0.5), (6, -0.5):
            assert example.value[i].item() == expected              # of the search
            assert value[i].item() == about(expected, abs=0.1)


def test_a_critic_is_as_wide_as_what_the_head_reads():
    config = transformers.OPTConfig(vocab_size=40, hidden_size=32, word_embed_proj_dim=16, ffn_dim=32,
                                    num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64)
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    tree = solvable(0)
    [values] = dvo.make_critic(dvo.Policy(lm))(packs=[dvo.pack(tree, [tree.path(2)])])
    assert values.shape == (len(tree.nodes),)


def test_values_are_those_of_one_plain_row():
    """The head reads the state that each step leads to: its last token, on the path."""
    tree = solvable(0)
    model = tiny.model(dtype=torch.float64)
    critic = dvo.make_critic(dvo.Policy(model))
    torch.nn.init.normal_(critic.head.weight)
    some = dvo.pack(tree, [tree.path(2), tree.path(7)])
    [packed] = critic(packs=[some])
    for i in 0, 1, 2, 6, 7:
        steps = [tree.nodes[j].tokens for j in tree.path(i)]
        row = sum(steps, tree.prompt)
        states = model.model(tensor([row])).last_hidden_state
        own = critic.head(states[0, -1])
        assert packed[i].item() == about(own.item(), abs=1e-9)
    outside = [3, 4, 5]
    assert not packed[outside].any()


def test_a_critic_is_a_copy_of_the_policy_without_its_words():
    policy = dvo.Policy(tiny.model())
    critic = dvo.make_critic(policy)
    original = dict(policy.lm.named_parameters())
    copied = dict(critic.lm.named_parameters())
    assert original.keys() - copied.keys() == {"lm_head.weight"}
    for name, weight in copied.items():
        assert torch.equal(weight, original[name])
        assert weight.data_ptr() != original[name].data_ptr()


def test_training_two_learners_goes_on_where_it_stopped(tmp_path):
    """OREO, stopped after a saved step: same policy and critic as in one go, bit for bit."""
    examples = [dvo.make_example(solvable(i)) for i in range(2)]
    dvo.add_reference(dvo.Policy(tiny.model()), examples, 10**6)
    steps = [[0, 1]] * 3

    def loss_fn(example, logprobs, value):
        return dvo.objective_loss("oreo", example, logprobs, value)

    def train(folder, log):
        policy = dvo.Policy(tiny.model())
        critic = dvo.make_critic(policy)
        learners = [dvo.Learner(policy, 1e-3), dvo.Learner(critic, 1e-2)]
        how = dict(micro_tokens=10**6, state=folder, save_seconds=0.0)
        dvo.train(learners, examples, loss_fn, steps, log=log, **how)
        return [*policy.parameters(), *critic.parameters()]

    def stop_at_2(step, **_):
        if step == 2:
            raise InterruptedError

    def note(step, **_):
        done.append(step)

    done = []
    whole = train(tmp_path / "whole", note)
    with pytest.raises(InterruptedError):
        train(tmp_path / "stopped", stop_at_2)
    resumed = train(tmp_path / "stopped", note)
    assert done == [1, 2, 3, 2, 3]                                  # the second was done, but not saved
    assert all(map(torch.equal, whole, resumed))
    head = whole[-2]
    assert head.any()                                               # the critic has learnt
