# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""dvo.py: packing, step log-probs, objectives, training, run folders and the command line.

    python -m pytest -q tests/test_dvo.py
"""
import argparse
import doctest
import json
import sys

import numpy as np
import pytest
import torch
import transformers

import tiny                                                         # first: it puts the project on sys.path
import dvo
import eval as tasks
import mcts
from launch import Command


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


def search(model, tok, questions=("Add 3 to 4.", "Take 5 from 12, then add nothing."), **settings):
    problems = [{"question": q, "answer": "7"} for q in questions]
    settings = dict(iterations=8, breadth=3, depth=4, max_step_tokens=12, slots=4) | settings
    return list(mcts.search(model, tok, problems, tasks.reward, **settings))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def searched(request, tok):
    """A float64 model and a tree it has searched, with the ends of its valid and invalid terminals."""
    model = tiny.model(request.param, torch.float64)
    questions = [f"Add {i} to 4." for i in range(8)]
    tree = max(search(model, tok, questions, iterations=12), key=lambda t: sum(n.terminal for n in t.nodes))
    ends = [i for i, n in enumerate(tree.nodes) if n.terminal]
    assert len(ends) > 5 and max(tree.nodes[i].depth for i in ends) >= 3        # else the tests prove little
    return model, tree, ends


def padded_path_logprobs(model, tree, end):
    """log pi of every step of one path, from one plain row: what the packed forward must equal."""
    steps = [tree.nodes[i].tokens for i in tree.path(end)]
    row = torch.tensor([tree.prompt + sum(steps, [])])
    logprobs = model(input_ids=row).logits[0].log_softmax(-1)
    token = logprobs[:-1].gather(1, row[0, 1:, None])[:, 0]         # (T - 1,): token t + 1 from state t
    return [part.sum() for part in token[len(tree.prompt) - 1:].split([len(s) for s in steps])]


# ---------------------------------------------------------------- packing


def test_a_token_sees_its_ancestors_only():
    tree = mcts.Tree("q", "a", prompt=[1, 2])
    left, right = tree.add(mcts.Node(0, [3])), tree.add(mcts.Node(0, [4, 5]))
    below = tree.add(mcts.Node(left, [6]))
    packed = dvo.pack(tree, [tree.path(below), tree.path(right)])
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert packed.position.tolist() == [0, 1, 2, 2, 3, 3]
    assert packed.mask().astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],                                         # 1, the prompt
        [1, 1, 0, 0, 0, 0],                                         # 2
        [1, 1, 1, 0, 0, 0],                                         # 3, left
        [1, 1, 0, 1, 0, 0],                                         # 4, right: not its left neighbour 3
        [1, 1, 0, 1, 1, 0],                                         # 5
        [1, 1, 1, 0, 0, 1]]                                         # 6, below left


def test_nodes_off_the_paths_are_not_packed():
    tree = mcts.Tree("q", "a", prompt=[1])
    a, b = tree.add(mcts.Node(0, [2])), tree.add(mcts.Node(0, [3]))
    assert dvo.pack(tree, [[b]]).tokens.tolist() == [1, 3] and dvo.pack(tree, [[b], [a]]).num_nodes == 3


def test_packed_equals_padded_in_log_probs_and_gradient(searched):
    """The packed forward is exact: same step log-probs and same DVO gradient as one plain row a path."""
    model, tree, ends = searched
    credit = torch.tensor([0.0] + [tree.credit(i) for i in range(1, len(tree.nodes))], dtype=torch.float64)
    reference = torch.tensor([n.logprob for n in tree.nodes], dtype=torch.float64) + 0.3
    path = torch.zeros(len(ends), len(tree.nodes), dtype=torch.float64)
    for row, end in zip(path, ends):
        row[tree.path(end)] = 1

    close = 1e-9
    packed = dvo.step_logprobs(model, dvo.pack(tree, [tree.path(i) for i in ends]))
    loss = dvo.dvo_loss(packed, reference, credit, path).mean()
    gradient = torch.autograd.grad(loss, list(model.parameters()))

    losses = []
    for end in ends:
        nodes, steps = tree.path(end), padded_path_logprobs(model, tree, end)
        assert torch.allclose(packed[nodes], torch.stack(steps), atol=close)
        errors = [(0.1 * (s - reference[i]) - credit[i]) ** 2 for i, s in zip(nodes, steps)]
        losses.append(sum(errors) / len(errors))
    plain = torch.stack(losses).mean()
    assert abs(loss - plain) < close
    for a, b in zip(gradient, torch.autograd.grad(plain, list(model.parameters()))):
        assert (a - b).norm() <= 1e-5 * (1e-2 + b.norm())


def test_packs_in_a_batch_do_not_see_each_other(searched, tok):
    """Padding to the longest pack changes nothing."""
    model, tree, ends = searched
    other = search(model, tok, ["First, add. Then double it and take 5 from 12."])[0]
    paths = [other.path(i) for i, n in enumerate(other.nodes) if n.terminal]
    packs = [dvo.pack(tree, [tree.path(ends[0])]), dvo.pack(other, paths)]
    together = dvo.Policy(model)(packs=packs)
    for p, vector in zip(packs, together):
        assert torch.allclose(vector, dvo.step_logprobs(model, p), atol=1e-10)


def test_a_batch_is_padded_to_multiples_of_64(searched):
    """So that GPU kernels meet few shapes."""
    _, tree, ends = searched
    packs = [dvo.pack(tree, [tree.path(end)]) for end in ends]
    assert len({len(p.tokens) for p in packs}) > 2
    widths = [dvo.collate([p], torch.device("cpu")).tokens.shape[1] for p in packs]
    assert all(width % 64 == 0 and 0 <= width - len(p.tokens) < 64 for width, p in zip(widths, packs))


# After the head: scaling, a cap, or both. What the model's own forward makes of hidden states is trained on.
AFTER_THE_HEAD = [("granite", dict(logits_scaling=8.0)), ("cohere", dict(logit_scale=0.0625)), ("nanochat", {}),
                  ("gemma3_text", dict(query_pre_attn_scalar=8, final_logit_softcapping=8.0))]


@pytest.mark.parametrize("kind, settings", AFTER_THE_HEAD, ids=[kind for kind, _ in AFTER_THE_HEAD])
def test_what_a_model_does_after_its_head_is_trained_on(kind, settings):
    lm = tiny.model(kind, torch.float64, chances=None, **settings)
    tree = mcts.Tree("q", "a", prompt=[5, 6, 7, 8])
    end = tree.add(mcts.Node(0, [9, 10, 11]))
    packed = dvo.step_logprobs(lm, dvo.pack(tree, [[end]]))[end]
    [plain] = padded_path_logprobs(lm, tree, end)
    assert packed.item() == pytest.approx(plain.item(), abs=1e-9)
    weights = lm.get_input_embeddings().weight
    ours, own = (torch.autograd.grad(x, weights)[0] for x in (packed, plain))
    assert (ours - own).norm() <= 1e-6 * own.norm()


def test_a_pack_beyond_the_window_is_exact():
    """Every second layer sees 8 tokens back; a path has 24."""
    lm = tiny.model("gemma3_text", torch.float64, chances=None, query_pre_attn_scalar=8, sliding_window=8,
                    layer_types=["sliding_attention", "full_attention"])
    tree = mcts.Tree("q", "a", prompt=list(range(5, 15)))
    a = tree.add(mcts.Node(0, list(range(30, 37))))
    b = tree.add(mcts.Node(a, list(range(50, 57))))
    c = tree.add(mcts.Node(0, list(range(70, 84))))
    packed = dvo.step_logprobs(lm, dvo.pack(tree, [[a, b], [c]]))
    for end in b, c:
        steps = padded_path_logprobs(lm, tree, end)
        assert packed[tree.path(end)].tolist() == pytest.approx([s.item() for s in steps], abs=1e-9)


def test_a_pack_beyond_the_context_is_refused():
    """40 tokens for a model that was made for 32."""
    lm = tiny.model(chances=None, max_position_embeddings=32)
    tree = mcts.Tree("q", "a", prompt=list(range(5, 25)))
    end = tree.add(mcts.Node(0, list(range(30, 50))))
    with pytest.raises(tasks.InputError, match="has 40 tokens .* context of 32"):
        dvo.step_logprobs(lm, dvo.pack(tree, [[end]]))


def test_training_log_probs_are_those_of_sampling(searched):
    """What was sampled is what is trained on: the packed forward gives each stored log-prob, EOS included."""
    model, tree, ends = searched
    packed = dvo.step_logprobs(model, dvo.pack(tree, [tree.path(i) for i in ends]))
    eos = set(model.generation_config.eos_token_id)
    assert any(tree.nodes[i].tokens[-1] in eos for i in ends)
    for i in {i for end in ends for i in tree.path(end)}:
        assert abs(packed[i].item() - tree.nodes[i].logprob) < 1e-9


def test_eos_is_part_of_the_last_step(searched):
    """Without its EOS a model trained on the steps would never learn to stop."""
    model, tree, ends = searched
    eos = set(model.generation_config.eos_token_id)
    end = next(i for i in ends if tree.nodes[i].tokens[-1] in eos and len(tree.nodes[i].tokens) > 1)
    full = dvo.step_logprobs(model, dvo.pack(tree, [tree.path(end)]))[end]
    last = tree.nodes[end].tokens.pop()
    without = dvo.step_logprobs(model, dvo.pack(tree, [tree.path(end)]))[end]
    tree.nodes[end].tokens.append(last)
    assert without - full > 1e-3


# ---------------------------------------------------------------- objectives


def test_dvo_loss_and_gradient_by_hand():
    """Two paths over three steps (0 is the root): a = (1, 2), b = (3)."""
    policy = torch.tensor([0.0, -1.0, -2.0, -3.0], requires_grad=True)
    reference, credit = torch.tensor([0.0, -2.0, -2.0, -1.0]), torch.tensor([0.0, 0.5, -0.25, -1.0])
    path = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 1]])
    # log-ratios 1, 0, -2; beta 0.5: errors 0.5 - 0.5 = 0, 0 + 0.25 = 0.25, -1 + 1 = 0
    losses = dvo.dvo_loss(policy, reference, credit, path, beta=0.5)
    assert losses.tolist() == [(0 + 0.0625) / 2, 0]
    losses.sum().backward()
    assert policy.grad.tolist() == [0, 0, 0.5 * 2 * 0.25 / 2, 0]        # beta * 2 * error / steps of the path
    # response level: 0.5 * (1 + 0) - (0.5 - 0.25) = 0.25; 0.5 * -2 + 1 = 0
    assert dvo.dvo_loss(policy, reference, credit, path, 0.5, "response").tolist() == [0.0625, 0]


def test_levels_agree_on_paths_of_one_step():
    generator = torch.Generator().manual_seed(0)
    policy, reference, credit = torch.randn(3, 9, generator=generator)
    path = torch.eye(9)[1:]
    step = dvo.dvo_loss(policy, reference, credit, path, level="step")
    response = dvo.dvo_loss(policy, reference, credit, path, level="response")
    assert torch.allclose(step, response) and step.std() > 0.1


def test_targets_telescope(searched):
    """The response-level target of a path is r - V(s_0), whatever lies between."""
    _, tree, ends = searched
    for end in ends:
        target = tree.nodes[end].reward - tree.nodes[0].value
        assert sum(tree.credit(i) for i in tree.path(end)) == pytest.approx(target)


def test_rft_loss_is_the_negative_log_likelihood():
    policy = torch.tensor([0.0, -1.0, -2.0])
    assert dvo.rft_loss(policy, torch.tensor([[0.0, 1, 1], [0, 0, 1]])).tolist() == [3, 2]


# ---------------------------------------------------------------- examples


def hand_tree():
    """Root -> A (two terminals: right N=1, wrong N=1), B (right), C (wrong, not valid); V by hand."""
    tree = mcts.Tree("q", "a", prompt=[1, 2, 3])
    a = tree.add(mcts.Node(0, [4]))
    for parent, reward, valid in (a, 1, True), (a, -1, True), (0, 1, True), (0, -1, False):
        i = tree.add(mcts.Node(parent, [5], reward=reward, terminal=True, valid=valid))
        mcts.backup(tree, i)
    return tree


def test_paths_end_in_valid_terminals_and_keep_the_count():
    tree = hand_tree()
    drawn = lambda n, seed: [[path[-1] for path in paths] for paths in dvo.draw_paths(tree, n, seed)]
    assert [sorted(ends) for ends in drawn(4, 0)] == [[2, 4], [3]]              # 5 is not valid
    assert {str(drawn(1, seed)) for seed in range(30)} == {"[[2], [3]]", "[[4], [3]]"}
    # weights: the path of 2 has N = 2 + 1, that of 4 has N = 1; so 2 is drawn in 3/4 of all seeds
    share = np.mean([drawn(1, seed)[0] == [2] for seed in range(2000)])
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / 2000) ** 0.5


def test_example_holds_credits_and_paths():
    example = dvo.make_example(hand_tree())
    assert example.credit.tolist() == [0, 0, 1, -1, 1, -1]                      # V(s_0) = V(A) = 0
    assert example.correct.tolist() == [True, True, False]
    assert sorted(example.path.tolist()) == [[0, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]]


def test_unsolved_questions_are_dropped_unless_kept():
    tree = mcts.Tree("q", "a", prompt=[1])
    mcts.backup(tree, tree.add(mcts.Node(0, [2], reward=-1, terminal=True)))
    assert dvo.make_example(tree) is None
    assert dvo.make_example(tree, keep_unsolved=True).path.tolist() == [[0, 1]]
    assert dvo.make_example(tree, keep_unsolved=True, choose=dvo.correct_paths) is None


def test_credits_stand_in_one_place():
    """Those of an example are those of its tree."""
    tree = hand_tree()
    assert dvo.make_example(tree).credit.tolist()[1:] == [tree.credit(i) for i in range(1, 6)]


# ---------------------------------------------------------------- training


@pytest.fixture
def examples(tok):
    trees = search(tiny.model(), tok, [f"Add {i} to {i + 1}." for i in range(12)], iterations=20)
    found = [e for e in map(dvo.make_example, trees) if e]
    assert len(found) >= 4
    return found


def test_log_ratios_are_exactly_zero_before_the_first_update(examples):
    """Else the first gradient would already be wrong."""
    policy = dvo.Policy(tiny.model())
    dvo.add_reference(policy, examples, tokens=10**6)
    [batch] = dvo.micro_batches(examples, 10**6)
    for i, logprobs in zip(batch, policy(packs=[examples[i].pack for i in batch])):
        assert torch.equal(logprobs, examples[i].reference)


def train(policy, examples, lr, epochs, questions_per_step, micro_tokens=10**6, **how):
    steps = dvo.schedule(len(examples), epochs, questions_per_step, seed=0)
    dvo.add_reference(policy, examples, micro_tokens)
    dvo.train([dvo.Learner(policy, lr)], examples, lambda e, out: dvo.objective_loss("dvo", e, out), steps,
              micro_tokens=micro_tokens, beta=0.1, **how)
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_training_drives_the_implicit_reward_to_the_credit(examples):
    entries = []
    train(dvo.Policy(tiny.model()), examples, 3e-3, 100, 6, log=lambda **e: entries.append(e))
    assert entries[-1]["loss"] < 0.6 * entries[0]["loss"]       # positive credits of likely steps are out of reach
    assert entries[-1]["rewards/chosen"] > entries[-1]["rewards/rejected"]
    assert entries[0]["lr"] < entries[19]["lr"] > entries[-1]["lr"]             # warmup, then cosine


def test_micro_batches_do_not_change_the_update(examples):
    """The loss is the mean over the paths of the optimiser step, however it is cut up."""
    weights = [train(dvo.Policy(tiny.model(dtype=torch.float64)), examples, 1e-3, 2, 4, micro_tokens)
               for micro_tokens in (1, 150, 10**6)]
    assert all(torch.allclose(weights[0], other, atol=1e-9) for other in weights[1:])


def test_recomputed_blocks_do_not_change_the_update(examples):
    plain = train(dvo.Policy(tiny.model(dtype=torch.float64)), examples, 1e-3, 1, 4)
    recomputed = train(dvo.Policy(tiny.model(dtype=torch.float64), recompute=True), examples, 1e-3, 1, 4)
    assert torch.allclose(plain, recomputed, atol=1e-12)


def test_dropout_is_off_and_runs_repeat(tmp_path, tok):
    """The reference has none either: log-ratios start at 0."""
    settings = dict(n_embd=32, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0.5, embd_pdrop=0.5)
    tiny.model("gpt2", chances=None, **settings).train().save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    tree = mcts.Tree("q", "a", prompt=[5, 6, 7])
    tree.add(mcts.Node(0, [8, 9], reward=1, terminal=True, visits=1))
    policy, _ = dvo.load_policy(str(tmp_path), torch.device("cpu"))
    tree.nodes[1].logprob = dvo.step_logprobs(policy, dvo.pack(tree, [[1]]))[1].item()
    entries = []
    train(policy, [dvo.make_example(tree)], 1e-3, 1, 1, log=lambda **e: entries.append(e))
    assert entries[0]["rewards/chosen"] == 0


def test_micro_batches_hold_all_and_stay_within_the_budget(examples):
    packs = [e.pack for e in examples]
    batches = dvo.micro_batches(examples, 200)
    assert sorted(i for b in batches for i in b) == list(range(len(packs)))
    assert all(len(b) == 1 or len(b) * max(len(packs[i].tokens) for i in b) <= 200 for b in batches)


def test_a_schedule_takes_everything_once_an_epoch():
    steps = dvo.schedule(7, epochs=3, questions_per_step=3, seed=-5)
    assert [len(step) for step in steps] == [3, 3, 1] * 3
    epochs = [sum(steps[i:i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    assert steps == dvo.schedule(7, 3, 3, seed=-5) != dvo.schedule(7, 3, 3, seed=5)


def test_rates_rise_for_a_tenth_or_20_steps_then_fall():
    long = [dvo.rate_share(step, 1000) for step in range(1000)]
    assert long[0] == 0.01 and long[99] == 1 and max(long) == 1
    assert long[550] == pytest.approx(0.5) and 0 < long[-1] < 1e-5
    assert [dvo.rate_share(step, 4) for step in range(4)] == [0.05, 0.1, 0.15, 0.2]


def test_a_short_training_says_that_it_does_not_reach_its_peak(examples, capsys):
    train(dvo.Policy(tiny.model()), examples[:2], 1e-3, 2, 1)
    assert "4 steps end within the warmup, below the peak rate" in capsys.readouterr().err


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tok):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.model().save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [{"question": f"Add {i} to {i + 1}.", "answer": "7"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(*arguments, **how):
    done = Command(*arguments, **how)
    done.communicate()
    return done


SMALL = ["--no-bootstrap", "--rounds", 2, "--questions-per-round", 4,
         "--iterations", 6, "--breadth", 3, "--depth", 4, "--max-step-tokens", 12,
         "--lr", 1e-3, "--questions-per-step", 2, "--max-new-tokens", 32, "--trials", 2]


@pytest.fixture(scope="module")
def inputs(model_folder, data_file):
    return ["--model", model_folder, "--data", data_file, "--eval-data", data_file]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, inputs):
    out = tmp_path_factory.mktemp("run") / "run"
    done = command(*inputs, "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "round 2" in done.stdout
    return out


def test_two_rounds_leave_trees_logs_and_loadable_models(run_folder, data_file, tok):
    events = [json.loads(line) for line in open(run_folder / "log.jsonl")]
    assert all({"event", "round", "time"} <= e.keys() for e in events)
    evals = [e for e in events if e["event"] == "eval-questions"]
    assert [e["round"] for e in evals] == [0, 1, 2]
    assert all(e["task"] == "questions" and e["n"] == 8 for e in evals)
    kept = [json.loads(line) for line in open(run_folder / "round1" / "responses-questions.rank0.jsonl")]
    verdicts = [response["correct"] for record in kept for response in record["responses"]]
    assert len(verdicts) == 16 and sum(verdicts) / 16 == evals[1]["accuracy"]
    search = json.loads((run_folder / "round1" / "search.json").read_text())
    assert search["trees"] == 4 and sum(search["endings"].values()) == pytest.approx(1)
    assert all(0 <= e["accuracy"] <= 1 and e["sem"] >= 0 for e in evals)
    assert {"step", "loss", "lr", "rewards/chosen", "rewards/rejected", "tokens_per_second"} <= next(
        e for e in events if e["event"] == "train").keys()
    rounds = [run_folder / "round1", run_folder / "round2"]
    questions = [{tree.question for tree in mcts.read_trees(r / "trees.rank0.jsonl")} for r in rounds]
    assert all(len(q) == 4 for q in questions) and not questions[0] & questions[1]      # each round its own
    models = [transformers.AutoModelForCausalLM.from_pretrained(r / "model") for r in rounds]
    assert all(any(not torch.equal(a, b) for a, b in zip(m.parameters(), n.parameters()))
               for m, n in ((models[0], models[1]), (models[0], tiny.model())))
    assert models[1].generation_config.eos_token_id == tiny.model().generation_config.eos_token_id
    loaded = transformers.AutoTokenizer.from_pretrained(run_folder / "round2" / "model")
    assert loaded("Add 3.\n\n").input_ids == tok("Add 3.\n\n").input_ids
    assert json.loads((run_folder / "config.json").read_text())["breadth"] == 3


def test_a_finished_run_is_not_done_again(run_folder, inputs):
    before = {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    done = command(*inputs, "--out", run_folder, *SMALL)
    assert done.returncode == 0 and "round 2" in done.stdout
    assert before == {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}


BOOTSTRAP = ["--rounds", 1, "--bootstrap", "--bootstrap-questions", 8, "--bootstrap-samples", 60]


def bootstrapped(folder, inputs, *more):
    done = command(*inputs, "--out", folder, *SMALL, *BOOTSTRAP, *more)
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "round0" / "bootstrap.json").read_text())


def test_bootstrapping_teaches_the_form(tmp_path, inputs):
    """Samples that are right and well-formed are imitated; the gain is measured on questions held back."""
    done, found = bootstrapped(tmp_path / "run", inputs, "--bootstrap-lr", 5e-3)
    assert found["worked_examples"] == 0                 # there is a chat template
    assert 0 < found["imitated"]["responses"] <= 4 * 6              # of 6 questions, 4 each at most
    assert found["imitated"]["held_back"] > 0 and found["imitated"]["rate"]
    assert found["after"]["both"] > found["before"]["both"] and found["kept"]
    assert "both" in done.stdout and "no gain" not in done.stdout
    samples = [json.loads(line) for line in open(tmp_path / "run" / "round0" / "samples.rank0.jsonl")]
    assert len(samples) == 8 and all(len(record["samples"]) == 60 for record in samples)
    held_back = [json.loads(line) for line in open(tmp_path / "run" / "round0" / "before.rank0.jsonl")]
    assert len(held_back) == 2
    assert not load_weights(tmp_path / "run" / "round0" / "model").equal(load_weights(inputs[1]))


def load_weights(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.flatten() for p in model.parameters()])


def test_bootstrapping_that_does_not_help_leaves_the_base_alone(tmp_path, inputs):
    """At a rate of 0 nothing changes, so no held-back response becomes likelier."""
    done, found = bootstrapped(tmp_path / "run", inputs, "--bootstrap-lr", 0)
    assert found["imitated"]["rate"] is None and len(found["imitated"]["tried"]) == 1
    assert not found["kept"] and "no gain: the rounds start from the base" in done.stdout
    assert load_weights(tmp_path / "run" / "round0" / "model").equal(load_weights(inputs[1]))


def test_a_rate_that_few_examples_do_not_bear_is_lowered(tmp_path, inputs):
    _, found = bootstrapped(tmp_path / "run", inputs, "--bootstrap-lr", 1)
    imitated = found["imitated"]
    *first, last = imitated["tried"].values()
    assert first and min(first) > imitated["nll"]
    assert imitated["rate"] == (1 / 4**len(first) if last < imitated["nll"] else None)


def test_worked_examples_where_there_is_no_template_or_on_request(tmp_path, inputs, tok):
    _, asked = bootstrapped(tmp_path / "asked", inputs, "--bootstrap-shots", 2)
    assert asked["worked_examples"] == 2
    folder = tmp_path / "plain"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer(chat=False).save_pretrained(folder)
    _, plain = bootstrapped(tmp_path / "run", ["--model", folder, *inputs[2:]])
    assert plain["worked_examples"] == 3


def test_worked_examples_are_graded_right_and_well_formed():
    for question, solution in dvo.WORKED:
        assert dvo.has_steps(solution, mcts.Format()) and 4 <= solution.count("\n\n") + 1 <= 5
        assert tasks.extract_answer(solution) in ("32", "5", "B")


def test_a_demonstration_goes_on_to_eos(tok):
    """One that ended with its answer's blank line has none of its own, and elsewhere must stop by itself."""
    problem = {"question": "Add 3 to 4.", "answer": "7"}
    last = {end: dvo.demonstration(tok, problem, {"tokens": [9, 8], "end": end}, mcts.Format()).pack.tokens.tolist()[-2:]
            for end in ("answer", "eos")}
    assert last == {"answer": [8, tok.eos_token_id], "eos": [9, 8]}


def test_a_bootstrap_without_correct_responses_goes_on(tmp_path, model_folder, data_file, monkeypatch):
    """Nothing to imitate: the base stays as it was, and the run can be continued."""
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"question": "Add 1 to 2.", "answer": "3003"}\n')
    arguments = ["--model", model_folder, "--data", wrong, "--eval-data", "--out", tmp_path / "run",
                 "--bootstrap-samples", 2, *SMALL[1:]]
    monkeypatch.setattr(sys, "argv", ["dvo.py", *map(str, arguments)])
    for _ in range(2):
        with pytest.raises(tasks.InputError, match="of 1 questions 0 have a correct solution"):
            dvo.main()
    assert (tmp_path / "run" / "round0" / "model" / "config.json").exists()


def test_questions_of_a_round_are_drawn_by_seed():
    args = argparse.Namespace(seed=0, questions_per_round=3)
    problems = [{"question": str(i)} for i in range(7)]

    def drawn(r):
        return [p["question"] for p in dvo.questions_of_round(r, problems, args)]
    first, second, third = drawn(1), drawn(2), drawn(3)
    assert len({*first, *second}) == 6 and len({*first, *second, *third}) == 7
    assert first != ["0", "1", "2"] and first == drawn(1)
    args.seed = -3
    assert first != drawn(1)


# ---------------------------------------------------------------- what a search says of its trees


def ended(reward, valid=True, tokens=(7,), text="So 7"):
    tree = mcts.Tree("q", "a", [1], config={"max_step_tokens": 5, "eos": [0]})
    node = mcts.Node(0, list(tokens), reward=reward, terminal=True, valid=valid, text=text)
    mcts.backup(tree, tree.add(node))
    return tree


@pytest.mark.parametrize("trees, words", [
    ([ended(1), ended(-1)], "1 have a correct solution, 1 a valid wrong one, 0 both; endings: right 50%, wrong 50%"),
    ([ended(-1, False, tokens=[7] * 5)], "raise --max-step-tokens"),
    ([ended(-1, False, text="So 7.\n\n")], "raise --depth"),
    ([ended(-1, False, tokens=[7, 0])], "let --bootstrap teach the form"),
    ([ended(1)], "1 have a correct solution, 0 a valid wrong one")])
def test_a_search_says_how_solutions_ended_and_what_to_change(trees, words):
    assert words in dvo.explain(dvo.describe(trees))


# ---------------------------------------------------------------- export, and the saved model


@pytest.mark.parametrize("kind, fields", [
    ("dpo", {"prompt", "chosen", "rejected"}), ("kto", {"prompt", "completion", "label"}),
    ("sft", {"prompt", "completion"})])
def test_trees_become_rows_for_other_trainers(kind, fields, run_folder, tmp_path):
    trees, out = run_folder / "round1" / "trees.rank0.jsonl", tmp_path / "rows.jsonl"
    done = command("--trees", trees, "--export", kind, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in open(out)]
    assert rows and all(row.keys() == fields for row in rows)
    answers = {tree.question: tree.answer for tree in mcts.read_trees(trees)}
    for row in rows:
        system, user = row["prompt"]
        assert system == {"role": "system", "content": mcts.Format().instruction} and user["role"] == "user"
        labels = {"chosen": True, "rejected": False, "completion": row.get("label", True)}
        for name in row.keys() & labels.keys():
            [turn] = row[name]
            assert turn["role"] == "assistant"
            assert tasks.grade(turn["content"], answers[user["content"]]) == labels[name]


def test_the_card_of_a_model_has_its_numbers_and_a_snippet_that_runs(run_folder, tmp_path):
    folder = run_folder / "round1" / "model"
    card = (folder / "README.md").read_text()
    result = json.loads((run_folder / "round1" / "eval-questions.json").read_text())
    assert "--objective dvo" in card and f"| questions | {result['accuracy']:.1%} of 8 |" in card
    snippet = tmp_path / "snippet.py"
    snippet.write_text(card.split("```python\n")[1].split("```")[0])
    done = Command(script=snippet, cwd=folder)
    done.communicate()
    assert done.returncode == 0 and done.stdout, done.stderr


def test_mcts_command_searches_and_draws(tmp_path, model_folder, data_file):
    out = tmp_path / "trees.jsonl"
    done = command("--model", model_folder, "--data", data_file, "--out", out, "--limit", 2,
                   "--iterations", 3, "--seed", 4, script="mcts.py")
    assert done.returncode == 0, done.stderr
    trees = list(mcts.read_trees(out))
    assert len(trees) == 2 and trees[0].config["seed"] == 4 and trees[0].config["iterations"] == 3
    drawn = command("--show", out, script="mcts.py")
    assert drawn.returncode == 0 and "Add 0 to 1." in drawn.stdout and "─" in drawn.stdout


def test_eval_command_prints_mean_and_spread(tmp_path, model_folder, data_file):
    done = command("--model", model_folder, "--data", data_file, "--limit", 3, "--trials", 2,
                   "--max-new-tokens", 20, script="eval.py")
    assert done.returncode == 0 and "±" in done.stdout, done.stderr


def test_doctests():
    for module in (dvo, tasks):
        result = doctest.testmod(module)
        assert result.attempted > 0 and result.failed == 0, module
