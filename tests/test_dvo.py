# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""dvo.py: packing and step log-probs, training, run folders and the command line.

    python -m pytest -q tests/test_dvo.py
"""
import argparse
import doctest
import json
import math

import pytest
import torch
import transformers
from pytest import approx as about
from torch import tensor

import tiny                                                         # first: it puts the project on sys.path
import dvo
import eval as tasks
import mcts
from launch import Command

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def searched(request):
    """A float64 model, a tree it has searched, and the paths of that tree that ended, one of them by EOS."""
    model = tiny.model(request.param, torch.float64)
    questions = [f"Add {i} to 4." for i in range(8)]
    trees = tiny.search(model, questions, iterations=12, breadth=3)
    tree = max(trees, key=lambda tree: sum(node.terminal for node in tree.nodes))
    ends = [i for i, node in enumerate(tree.nodes) if node.terminal]
    assert len(ends) > 5
    assert max(tree.nodes[i].depth for i in ends) >= 3              # else the tests prove little
    eos = set(model.generation_config.eos_token_id)
    assert any(tree.nodes[i].tokens[-1] in eos for i in ends)
    return model, tree, [tree.path(i) for i in ends]


def padded_path_logprobs(model, tree, path):
    """log pi of every step of one path, from one plain row: what the packed forward must equal."""
    steps = [tree.nodes[i].tokens for i in path]
    row = tensor([sum(steps, tree.prompt)])
    logprobs = model(input_ids=row).logits[0].log_softmax(-1)
    following = row[0, 1:, None]
    of_tokens = logprobs[:-1].gather(1, following)[:, 0]            # (T - 1,): token t + 1 from state t
    after_prompt = of_tokens[len(tree.prompt) - 1:]
    return torch.stack([part.sum() for part in after_prompt.split([len(step) for step in steps])])


# ---------------------------------------------------------------- packing


def test_a_token_sees_its_ancestors_only():
    tree = mcts.Tree("q", "a", prompt=[1, 2])
    left = tree.add(mcts.Node(0, [3]))
    right = tree.add(mcts.Node(0, [4, 5]))
    below = tree.add(mcts.Node(left, [6]))
    packed = dvo.pack(tree, [tree.path(below), tree.path(right)])
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert packed.position.tolist() == [0, 1, 2, 2, 3, 3]
    seen = [{t + 1 for t in row.nonzero()[0]} for row in packed.mask()]     # token n stands at n - 1
    assert seen == [
        {1},
        {1, 2},
        {1, 2, 3},                                                  # left
        {1, 2, 4},                                                  # right: not its left neighbour, 3
        {1, 2, 4, 5},
        {1, 2, 3, 6}]                                               # below left


def test_nodes_off_the_paths_are_not_packed():
    tree = tiny.tree("0", "0", prompt=[1])
    packed = dvo.pack(tree, [[2]])
    assert packed.tokens.tolist() == [1, 12]
    assert packed.num_nodes == 3


def test_packed_equals_padded_in_log_probs_and_gradient(searched):
    """The packed forward is exact: same step log-probs and same DVO gradient as one plain row a path."""
    model, tree, paths = searched
    nodes = range(len(tree.nodes))
    reference = tensor([tree.nodes[i].logprob + 0.3 for i in nodes])
    credit = tensor([tree.credit(i) if i else 0.0 for i in nodes])
    path = tensor([[float(i in nodes_of_path) for i in nodes] for nodes_of_path in paths]).double()

    packed = dvo.step_logprobs(model, dvo.pack(tree, paths))
    losses = dvo.dvo_loss(packed, reference, credit, path)
    losses_of_rows = []
    for steps in paths:
        row = padded_path_logprobs(model, tree, steps)
        assert torch.allclose(packed[steps], row, atol=1e-9)
        errors = 0.1 * (row - reference[steps]) - credit[steps]
        losses_of_rows.append((errors ** 2).mean())

    weights = list(model.parameters())
    ours = torch.autograd.grad(losses.sum(), weights)
    plain = torch.autograd.grad(sum(losses_of_rows), weights)
    for mine, own in zip(ours, plain):
        assert (mine - own).norm() <= 1e-5 * (1e-2 + own.norm())


def test_training_log_probs_are_those_of_sampling(searched):
    """What was sampled is what is trained on: the packed forward gives each stored log-prob, EOS included."""
    model, tree, paths = searched
    packed = dvo.step_logprobs(model, dvo.pack(tree, paths)).tolist()
    for i in set(sum(paths, [])):
        assert packed[i] == about(tree.nodes[i].logprob, abs=1e-9)


def test_packs_in_a_batch_do_not_see_each_other(searched):
    """Padding to the longest pack changes nothing."""
    model, tree, paths = searched
    [other] = tiny.search(model, ["First, add. Then double it and take 5 from 12."])
    ends = [i for i, node in enumerate(other.nodes) if node.terminal]
    short = dvo.pack(tree, paths[:1])
    long = dvo.pack(other, map(other.path, ends))
    together = dvo.Policy(model)(packs=[short, long])
    for pack, logprobs in zip([short, long], together):
        assert torch.allclose(logprobs, dvo.step_logprobs(model, pack), atol=1e-10)


def test_a_batch_is_padded_to_multiples_of_64(searched):
    """So that GPU kernels meet few shapes."""
    _, tree, paths = searched
    lengths = set()
    for path in paths:
        pack = dvo.pack(tree, [path])
        length = len(pack.tokens)
        batch = dvo.collate([pack], CPU)
        _, width = batch.tokens.shape
        assert width % 64 == 0
        assert 0 <= width - length < 64
        assert batch.mask.diagonal(dim1=1, dim2=2).all()            # padding sees itself: no NaN
        lengths.add(length)
    assert len(lengths) > 2


@pytest.mark.parametrize("kind, settings", [
    ("granite", dict(logits_scaling=8.0)),
    ("cohere", dict(logit_scale=0.0625)),
    ("nanochat", {}),
    ("gemma3_text", dict(query_pre_attn_scalar=8, final_logit_softcapping=8.0))])
def test_what_a_model_does_after_its_head_is_trained_on(kind, settings):
    """Scaling, a cap, or both: what the model's own forward makes of hidden states."""
    lm = tiny.model(kind, torch.float64, chances=None, **settings)
    tree = tiny.tree("0")
    tree.nodes[1].tokens = [9, 10, 11]
    packed = dvo.step_logprobs(lm, dvo.pack(tree, [[1]]))[1]
    [plain] = padded_path_logprobs(lm, tree, [1])
    assert packed.item() == about(plain.item(), abs=1e-9)
    weights = lm.get_input_embeddings().weight
    [ours] = torch.autograd.grad(packed, weights)
    [own] = torch.autograd.grad(plain, weights)
    assert (ours - own).norm() <= 1e-6 * own.norm()


def long_tree():
    """A prompt of 10 tokens; paths of 7 + 7 and of 14 tokens."""
    tree = tiny.tree("0", "1", "0", prompt=range(5, 15))
    for i, tokens in (1, range(30, 37)), (2, range(50, 57)), (3, range(70, 84)):
        tree.nodes[i].tokens = list(tokens)
    return tree


def test_a_pack_beyond_the_window_is_exact():
    """Every second layer sees 8 tokens back; a path has 24."""
    lm = tiny.model("gemma3_text", torch.float64, chances=None, query_pre_attn_scalar=8, sliding_window=8,
                    layer_types=["sliding_attention", "full_attention"])
    tree = long_tree()
    paths = [1, 2], [3]
    packed = dvo.step_logprobs(lm, dvo.pack(tree, paths))
    for path in paths:
        plain = padded_path_logprobs(lm, tree, path)
        assert packed[path].tolist() == about(plain.tolist(), abs=1e-9)


def test_a_pack_beyond_the_context_is_refused():
    """24 tokens for a model that was made for 16."""
    lm = tiny.model(chances=None, max_position_embeddings=16)
    with pytest.raises(tasks.InputError, match="has 24 tokens .* context of 16"):
        dvo.step_logprobs(lm, dvo.pack(long_tree(), [[3]]))


def test_a_pack_beyond_a_window_that_is_not_exact_is_refused():
    """As the check has found, for a plain causal LM too."""
    lm = tiny.model(chances=None)
    mcts.check_model(lm)
    lm.served = lm.served._replace(window=20)
    with pytest.raises(tasks.InputError, match="has 24 tokens .* context of 20"):
        dvo.step_logprobs(lm, dvo.pack(long_tree(), [[3]]))


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trees():
    questions = [f"Add {i} to {i + 1}." for i in range(12)]
    found = tiny.search(tiny.model(), questions, iterations=20, breadth=3)
    return [tree for tree in found if dvo.make_example(tree)][:6]


@pytest.fixture
def examples(trees):
    assert len(trees) >= 4
    return [dvo.make_example(tree) for tree in trees]


def test_log_ratios_are_exactly_zero_before_the_first_update(examples):
    """Else the first gradient would already be wrong."""
    policy = dvo.Policy(tiny.model())
    dvo.add_reference(policy, examples, max_tokens=10**6)
    [batch] = dvo.micro_batches(examples, 10**6)
    packs = [examples[i].pack for i in batch]
    for i, logprobs in zip(batch, policy(packs=packs)):
        assert torch.equal(logprobs, examples[i].reference)


def dvo_loss(example, logprobs):
    return dvo.objective_loss("dvo", example, logprobs)


def train(policy, examples, lr=1e-3, epochs=1, questions_per_step=4, micro_tokens=10**6, **how):
    """Train by Eq. 10 from the policy as it is; its weights afterwards."""
    steps = dvo.schedule(len(examples), epochs, questions_per_step, seed=0)
    dvo.add_reference(policy, examples, micro_tokens)
    learner = dvo.Learner(policy, lr)
    dvo.train([learner], examples, dvo_loss, steps, micro_tokens=micro_tokens, beta=0.1, **how)
    return tiny.weights(policy)


def policy64(**how):
    return dvo.Policy(tiny.model(dtype=torch.float64), **how)


@pytest.fixture
def log():
    """The entries that a training has written: call it to write one."""
    class Log(list):
        def __call__(self, **entry):
            self.append(entry)

    return Log()


def test_training_drives_the_implicit_reward_to_the_credit(examples, log):
    policy = dvo.Policy(tiny.model())
    train(policy, examples[:3], lr=3e-3, epochs=50, log=log)
    first, *_, last = log
    assert last["loss"] < 0.6 * first["loss"]                       # likely steps cannot gain much
    assert last["rewards/chosen"] > last["rewards/rejected"]
    assert first["lr"] < log[19]["lr"] > last["lr"]                 # warmup, then cosine
    assert log[19]["lr"] == 3e-3


def test_the_first_step_moves_weights_by_a_twentieth_of_the_rate(examples):
    """Adam's first update is the rate, whatever the gradient; here it is the first of 20 steps of warmup."""
    policy = policy64()
    before = tiny.weights(policy)
    after = train(policy, examples[:4], lr=1e-3)
    largest = (after - before).abs().max().item()
    assert largest == about(1e-3 / 20, rel=1e-3)


def test_adamw_is_fused_and_decays_no_weight():
    learner = dvo.Learner(dvo.Policy(tiny.model()), 1e-3)
    [group] = learner.optimizer.param_groups
    assert group["fused"]
    assert group["weight_decay"] == 0


def test_a_step_descends_the_mean_loss_of_all_paths_and_logs_means(examples, log):
    """Of all paths of the step, however many a question has; every log-ratio of example k is k, so that a
    path of n steps has an implicit reward of 0.1 * k * n."""
    policy = policy64()
    dvo.add_reference(policy, examples, 10**6)
    losses, right, wrong = [], [], []
    for k, example in enumerate(examples):
        example.reference = example.reference - k
        logprobs = dvo.step_logprobs(policy, example.pack)
        losses.append(dvo_loss(example.like(logprobs), logprobs))
        for path, correct in zip(example.path, example.correct):
            rewards = right if correct else wrong
            rewards.append(0.1 * k * path.sum().item())
    assert len({len(of_question) for of_question in losses}) > 1
    mean = torch.cat(losses).mean()
    gradients = torch.autograd.grad(mean, [*policy.parameters()])
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()

    step = [*range(len(examples))]
    learner = dvo.Learner(policy, 0.0)
    dvo.train([learner], examples, dvo_loss, [step], micro_tokens=200, beta=0.1, log=log)
    [entry] = log
    assert entry["loss"] == about(mean.item())
    assert entry["grad_norm"] == about(norm.item())
    assert entry["rewards/chosen"] == about(sum(right) / len(right))
    assert entry["rewards/rejected"] == about(sum(wrong) / len(wrong))


def test_gradients_are_scaled_to_a_norm_of_1_at_most(examples, log):
    """The log has the norm that they had; Adam sees the scaled ones."""
    policy = policy64()
    dvo.add_reference(policy, examples, 10**6)
    learner = dvo.Learner(policy, 0.0)
    seen = []

    def note(*_):
        gradients = [weight.grad.flatten() for weight in policy.parameters()]
        seen.append(torch.cat(gradients).norm().item())

    learner.optimizer.register_step_pre_hook(note)
    for factor in 1e4, 1e-4:
        def loss_fn(example, logprobs):
            return factor * dvo_loss(example, logprobs)

        dvo.train([learner], examples, loss_fn, [[0, 1]], micro_tokens=10**6, log=log)
    large, small = (entry["grad_norm"] for entry in log)
    assert large == about(1e8 * small)
    assert large > 1 > small
    assert seen == about([1, small], rel=1e-4)


def test_micro_batches_do_not_change_the_update(examples):
    """The loss is the mean over the paths of the optimiser step, however it is cut up."""
    one_by_one = train(policy64(), examples, micro_tokens=1)
    some = train(policy64(), examples, micro_tokens=150)
    whole = train(policy64(), examples)
    assert torch.allclose(one_by_one, whole, atol=1e-9)
    assert torch.allclose(some, whole, atol=1e-9)


def test_recomputed_blocks_do_not_change_the_update(examples):
    plain = train(policy64(), examples)
    recomputed = train(policy64(recompute=True), examples)
    assert torch.allclose(plain, recomputed, atol=1e-12)


def test_dropout_is_off_in_training(tmp_path, tok, log):
    """The reference has none either: log-ratios start at 0."""
    lm = tiny.model("gpt2", chances=None, n_embd=32, n_layer=2, n_head=4, n_positions=512,
                    resid_pdrop=0.5, embd_pdrop=0.5)
    lm.train().save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    policy, _ = dvo.load_policy(str(tmp_path), CPU)
    example = dvo.make_example(tiny.tree("0 right"))
    train(policy, [example], log=log)
    [entry] = log
    assert entry["rewards/chosen"] == 0
    assert entry["rewards/rejected"] is None


def test_micro_batches_hold_all_and_stay_within_the_budget(examples):
    batches = dvo.micro_batches(examples, 200)
    assert sorted(sum(batches, [])) == list(range(len(examples)))
    for batch in batches:
        longest = max(dvo.padded_length(examples[i].pack) for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= 200


def test_a_schedule_takes_everything_once_an_epoch_in_an_order_of_the_seed():
    def schedule(seed):
        return dvo.schedule(7, epochs=3, questions_per_step=3, seed=seed)

    steps = schedule(-5)
    assert [len(step) for step in steps] == [3, 3, 1] * 3
    first, second, third = (sum(steps[k:k + 3], []) for k in (0, 3, 6))
    assert sorted(first) == sorted(second) == sorted(third) == list(range(7))
    assert first != second
    assert steps == schedule(-5)
    assert steps != schedule(5)


def test_rates_rise_for_a_tenth_or_20_steps_then_fall():
    long = [dvo.rate_share(step, 1000) for step in range(1000)]
    assert long[0] == 0.01
    assert long[99] == max(long) == 1
    assert long[550] == about(0.5)
    assert 0 < long[-1] < 1e-5
    short = [dvo.rate_share(step, 4) for step in range(4)]
    assert short == [0.05, 0.1, 0.15, 0.2]


def test_a_short_training_says_that_it_does_not_reach_its_peak(examples, capsys):
    train(dvo.Policy(tiny.model()), examples[:2], epochs=2, questions_per_step=1)
    assert "4 steps end within the warmup, below the peak rate" in capsys.readouterr().err


# ---------------------------------------------------------------- two rounds


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save(folder / "tiny")
    data = folder / "questions.jsonl"
    rows = [{"question": f"Add {i} to {i + 1}.", "answer": "7"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", folder / "tiny", "--data", data, "--eval-data", data]


def command(*arguments, **how):
    """The finished command, which must have succeeded."""
    done = Command(*arguments, **how)
    done.communicate()
    assert done.returncode == 0, done.stderr
    return done


OF_SEARCH = dict(iterations=6, breadth=3, candidates=4, depth=4, c_puct=1.25, max_step_tokens=12)
SMALL = ["--rounds", 2, "--questions-per-round", 4, "--lr", 1e-3, "--questions-per-step", 2,
         "--max-new-tokens", 32, "--trials", 2]
for _name, _value in OF_SEARCH.items():
    SMALL += ["--" + _name.replace("_", "-"), _value]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, inputs):
    out = tmp_path_factory.mktemp("run") / "run"
    done = command(*inputs, "--out", out, *SMALL, "--no-bootstrap")
    assert "round 2" in done.stdout
    return out


def events_of(run_folder, name):
    events = tiny.read(run_folder / "log.jsonl")
    assert all({"event", "round", "time"} <= event.keys() for event in events)
    return [event for event in events if event["event"] == name]


def test_the_base_and_every_round_are_evaluated(run_folder):
    evals = events_of(run_folder, "eval-questions")
    assert [entry["round"] for entry in evals] == [0, 1, 2]
    for entry in evals:
        assert entry["task"] == "questions"
        assert entry["n"] == 8
        assert 0 <= entry["accuracy"] <= 1
        assert entry["sem"] >= 0


def test_responses_of_an_evaluation_are_kept_with_their_verdicts(run_folder):
    kept = tiny.read(run_folder / "round1" / "responses-questions.rank0.jsonl")
    verdicts = [response["correct"] for record in kept for response in record["responses"]]
    assert len(verdicts) == 8 * 2
    _, after_round_1, _ = events_of(run_folder, "eval-questions")
    assert sum(verdicts) / 16 == after_round_1["accuracy"]


def test_a_search_is_summed_up(run_folder):
    [found, _] = events_of(run_folder, "search")
    assert found["trees"] == 4
    assert sum(found["endings"].values()) == about(1)


def test_each_step_of_a_training_is_logged(run_folder):
    entry = events_of(run_folder, "train")[0]
    named = {"step", "loss", "lr", "grad_norm", "rewards/chosen", "rewards/rejected", "tokens_per_second"}
    assert named <= entry.keys()


def test_each_round_searches_questions_of_its_own_with_the_settings_given(run_folder):
    questions = []
    for r in 1, 2:
        for tree in mcts.read_trees(run_folder / f"round{r}" / "trees.rank0.jsonl"):
            questions.append(tree.question)
            assert tree.config["seed"] == r
            assert OF_SEARCH.items() <= tree.config.items()
    assert len(questions) == len(set(questions)) == 8


def test_each_round_leaves_a_model_that_loads(run_folder, inputs, tok):
    base = tiny.saved_weights(inputs[1])
    first = tiny.saved_weights(run_folder / "round1" / "model")
    second = tiny.saved_weights(run_folder / "round2" / "model")
    assert not torch.equal(first, base)
    assert not torch.equal(second, first)
    folder = run_folder / "round2" / "model"
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == tiny.model().generation_config.eos_token_id
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Add 3.\n\n"
    assert loaded(text).input_ids == tok(text).input_ids


def all_bytes(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_not_done_again(run_folder, inputs):
    """Nor if its model is named in another way."""
    before = all_bytes(run_folder)
    done = command(*inputs, "--model", f"{inputs[1]}/../tiny/", "--out", run_folder, *SMALL, "--no-bootstrap")
    assert "round 2" in done.stdout
    assert all_bytes(run_folder) == before


def test_flags_of_the_evaluation_change_its_responses(tmp_path, inputs, monkeypatch):
    """Of the first 3 questions 2 responses, at temperature 0 the same, of 9 tokens at most."""
    tiny.run(dvo.main, monkeypatch, *inputs, "--out", tmp_path / "run", "--no-bootstrap", "--rounds", 0,
             "--eval-limit", 3, "--trials", 2, "--temperature", 0, "--max-new-tokens", 9)
    records = tiny.read(tmp_path / "run" / "round0" / "responses-questions.rank0.jsonl")
    assert len(records) == 3
    lengths = []
    for record in records:
        first, second = record["responses"]
        assert first == second
        lengths.append(first["tokens"])
    assert max(lengths) == 9


# ---------------------------------------------------------------- format bootstrapping


def bootstrapped(folder, inputs, *more):
    """A run of bootstrapping alone: the finished command, and what it found."""
    done = command(*inputs, "--out", folder, *SMALL, "--rounds", 0, "--bootstrap-questions", 8,
                   "--bootstrap-samples", 60, *more)
    found = json.loads((folder / "round0" / "bootstrap.json").read_text())
    return done, found


def test_bootstrapping_teaches_the_form_and_more_rounds_start_from_its_model(tmp_path, inputs):
    """Samples that are right and well-formed are imitated; the gain is measured on questions held back."""
    run = tmp_path / "run"
    flags = "--bootstrap-lr", 5e-3, "--keep-unsolved"
    done, found = bootstrapped(run, inputs, *flags)
    assert found["worked_examples"] == 0                            # there is a chat template
    imitated = found["imitated"]
    assert 0 < imitated["responses"] <= 4 * 6                       # of 6 questions, 4 each at most
    assert imitated["held_back"] > 0
    assert imitated["rate"] == 5e-3
    assert found["after"]["both"] > found["before"]["both"]
    assert found["kept"]
    assert "both" in done.stdout
    assert "no gain" not in done.stdout

    first = run / "round0"
    samples = tiny.read(first / "samples.rank0.jsonl")
    assert [len(record["samples"]) for record in samples] == [60] * 8
    assert len(tiny.read(first / "before.rank0.jsonl")) == 2
    base = tiny.saved_weights(inputs[1])
    assert not torch.equal(tiny.saved_weights(first / "model"), base)
    assert [path.name for path in run.glob("round*")] == ["round0"]             # bootstrapping alone
    assert len(events_of(run, "eval-questions")) == 1

    samples_before = (first / "samples.rank0.jsonl").read_bytes()
    bootstrapped(run, inputs, *flags, "--rounds", 1)
    assert (first / "samples.rank0.jsonl").read_bytes() == samples_before
    lm, _ = mcts.load_model(first / "model", "cpu")
    for tree in mcts.read_trees(run / "round1" / "trees.rank0.jsonl"):
        own = padded_path_logprobs(lm, tree, [1]).item()
        assert tree.nodes[1].logprob == about(own, abs=1e-3)


def test_bootstrapping_that_does_not_help_leaves_the_base_alone(tmp_path, inputs):
    """At a rate of 0 nothing changes, so no held-back response becomes likelier."""
    done, found = bootstrapped(tmp_path / "run", inputs, "--bootstrap-lr", 0)
    assert found["imitated"]["rate"] is None
    assert len(found["imitated"]["tried"]) == 1
    assert not found["kept"]
    assert "no gain: the rounds start from the base" in done.stdout
    model = tmp_path / "run" / "round0" / "model"
    assert torch.equal(tiny.saved_weights(model), tiny.saved_weights(inputs[1]))


def test_a_rate_that_few_examples_do_not_bear_is_lowered(tmp_path, inputs):
    _, found = bootstrapped(tmp_path / "run", inputs, "--bootstrap-lr", 1)
    imitated = found["imitated"]
    *first, last = imitated["tried"].values()
    assert min(first) > imitated["nll"]
    borne = 1 / 4 ** len(first)
    assert imitated["rate"] == (borne if last < imitated["nll"] else None)


def test_worked_examples_are_shown_where_there_is_no_template_or_on_request(tmp_path, inputs):
    """And at a temperature of 0 all samples of a question are the same."""
    flags = "--bootstrap-samples", 2, "--bootstrap-temperature", 0, "--bootstrap-questions", 5
    _, asked = bootstrapped(tmp_path / "asked", inputs, "--bootstrap-shots", 2, *flags)
    assert asked["worked_examples"] == 2
    samples = tiny.read(tmp_path / "asked" / "round0" / "samples.rank0.jsonl")
    assert len(samples) == 5
    for record in samples:
        first, second = record["samples"]
        assert first == second
    tiny.save(tmp_path / "plain", chat=False)
    _, plain = bootstrapped(tmp_path / "run", ["--model", tmp_path / "plain", *inputs[2:]], *flags)
    assert plain["worked_examples"] == 3


def test_worked_examples_are_right_and_well_formed():
    for (_, solution), answer in zip(dvo.WORKED, ("32", "5", "B"), strict=True):
        assert tasks.extract_answer(solution) == answer
        assert dvo.has_steps({"response": solution, "end": "eos"}, mcts.Format())
        assert 3 <= solution.count("\n\n") <= 4


GOOD = {"response": "So 7.\n\nFinal Answer: 7", "correct": True, "end": "eos"}


def imitated(tok, responses, samples, seed=0, room=100):
    """The tokens of the responses of one question that are imitated, by a model with `room` after the prompt."""
    record = {"question": "q", "responses": responses, "samples": samples}
    args = argparse.Namespace(seed=seed, format=mcts.Format())
    context = len(mcts.build_prompt(tok, "q")) + room
    policy = argparse.Namespace(config=transformers.LlamaConfig(max_position_embeddings=context))
    run = argparse.Namespace(args=args, tokenizer=tok, policy=policy)
    packs = [example.pack for example in dvo.demonstrations(run, [record])]
    return [pack.tokens[pack.node == 1].tolist() for pack in packs]


@pytest.mark.parametrize("end, tokens", [("answer", [9, 8, 0]), ("eos", [9, 8])])
def test_a_demonstration_goes_on_to_eos(end, tokens, tok):
    """One that ended with its answer's blank line has none of its own, and elsewhere must stop by itself."""
    assert tok.eos_token_id == 0
    assert imitated(tok, [GOOD | {"end": end}], [[9, 8]]) == [tokens]
    assert imitated(tok, [GOOD | {"end": end}], [[9, 8]], room=2) == [[9, 8]]


def test_at_most_four_well_formed_correct_whole_responses_of_a_question_are_imitated(tok):
    """Drawn by seed of the first ten; the others are wrong, without steps, and cut."""
    responses = 10 * [GOOD]
    responses.append(GOOD | {"correct": False})
    responses.append(GOOD | {"response": "Final Answer: 7"})
    responses.append(GOOD | {"end": "cut"})
    samples = [[k] for k in range(13)]
    seen = set()
    for seed in range(30):
        drawn = {k for [k] in imitated(tok, responses, samples, seed)}
        assert len(drawn) == 4
        seen |= drawn
    assert seen == set(range(10))


def test_a_bootstrap_without_correct_responses_goes_on(tmp_path, inputs, monkeypatch):
    """Nothing to imitate: the base stays as it was, and the run can be continued."""
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"question": "Add 1 to 2.", "answer": "3003"}\n')
    run = tmp_path / "run"
    arguments = [*inputs[:2], "--data", wrong, "--eval-data", "--out", run, "--bootstrap-samples", 2]
    monkeypatch.setattr("sys.argv", ["dvo.py", *map(str, [*arguments, *SMALL])])
    for _ in range(2):
        with pytest.raises(tasks.InputError, match="of 1 questions 0 have a correct solution"):
            dvo.main()
    assert (run / "round0" / "model" / "config.json").exists()


def test_questions_of_a_round_are_drawn_by_seed_and_none_twice_before_all():
    problems = [{"question": i} for i in range(7)]

    def drawn(r, seed=0):
        args = argparse.Namespace(seed=seed, questions_per_round=3)
        return [p["question"] for p in dvo.questions_of_round(r, problems, args)]

    first, second, third = drawn(1), drawn(2), drawn(3)
    assert len(set(first + second)) == 6
    assert set(first + second + third) == set(range(7))
    assert first != [0, 1, 2]
    assert first == drawn(1)
    assert first != drawn(1, seed=-3)


# ---------------------------------------------------------------- what a search says of its trees


def ended(kind, tokens=(7,), text="So 7"):
    tree = tiny.tree(f"0 {kind}")
    tree.config = {"max_step_tokens": 5, "eos": [0]}
    tree.nodes[1].tokens = list(tokens)
    tree.nodes[1].text = text
    return tree


@pytest.mark.parametrize("trees, words", [
    ([ended("right"), ended("wrong")],
     "1 have a correct solution, 1 a valid wrong one, 0 both; endings: right 50%, wrong 50%"),
    ([ended("right")], "1 have a correct solution, 0 a valid wrong one"),
    ([ended("invalid", tokens=[7] * 5)], "raise --max-step-tokens"),
    ([ended("invalid", text="So 7.\n\n")], "raise --depth"),
    ([ended("invalid", tokens=[7, 0])], "let --bootstrap of dvo.py teach the form")])
def test_a_search_says_how_solutions_ended_and_what_to_change(trees, words):
    assert words in mcts.explain(mcts.describe(trees))


# ---------------------------------------------------------------- export, and the saved model


@pytest.mark.parametrize("kind, right, wrong", [
    ("dpo", "chosen", "rejected"),
    ("kto", "completion", "completion"),
    ("sft", "completion", None)])
def test_trees_become_rows_for_other_trainers(kind, right, wrong, run_folder, tmp_path):
    """Whole solutions, each graded as its field says, after the turns that make the prompt of the search."""
    trees = run_folder / "round1" / "trees.rank0.jsonl"
    command("--trees", trees, "--export", kind, "--out", tmp_path / "rows.jsonl")
    answers = {tree.question: tree.answer for tree in mcts.read_trees(trees)}
    rows = tiny.read(tmp_path / "rows.jsonl")
    fields = {"prompt", right, wrong, "label" if kind == "kto" else None} - {None}
    found = set()
    for row in rows:
        assert row.keys() == fields
        [user] = row["prompt"]                  # the template drops a system turn
        instruction, _, question = user["content"].rpartition("\n\n")
        assert (user["role"], instruction) == ("user", mcts.Format().instruction)
        for name, is_right in (right, row.get("label", True)), (wrong, row.get("label", False)):
            if name:
                [turn] = row[name]
                assert turn["role"] == "assistant"
                assert tasks.grade(turn["content"], answers[question]) == is_right
                found.add(is_right)
    assert found == ({True} if kind == "sft" else {True, False})


def test_kto_rows_are_of_solved_questions_unless_asked(tok):
    tree = tiny.tree("0 wrong", "0 wrong")
    how = dict(n=4, seed=0, format=mcts.Format())
    assert not list(dvo.export([tree], "kto", tok, **how))
    assert len(list(dvo.export([tree], "kto", tok, **how, keep_unsolved=True))) == 2


def test_rows_ask_in_the_format_of_the_run():
    lines = mcts.Format(step_end="\n")
    tree = tiny.tree("0 right", "0 wrong")
    tok = tiny.tokenizer(chat=False)
    [row] = dvo.export([tree], "sft", tok, n=1, seed=0, format=lines)
    system, user = row["prompt"]
    assert system == {"role": "system", "content": lines.instruction}
    assert lines.instruction != mcts.Format().instruction
    assert user == {"role": "user", "content": "q"}


def test_an_export_of_nothing_says_why(tmp_path, monkeypatch, capsys):
    trees = tmp_path / "trees.jsonl"
    tiny.write_trees(trees, [tiny.tree("0 wrong")])
    rows = tmp_path / "rows.jsonl"
    tiny.save(tmp_path / "model")
    with pytest.raises(SystemExit, match="2"):
        tiny.run(dvo.main, monkeypatch, "--trees", trees, "--export", "sft", "--model", tmp_path / "model",
                 "--out", rows)
    assert "no row to export: of 1 questions 0 have a correct solution" in capsys.readouterr().err
    assert not rows.exists()


@pytest.fixture
def args(monkeypatch):
    monkeypatch.setattr("sys.argv", ["dvo.py", "--model", "M", "--data", "D"])
    return dvo.parse_arguments()


@pytest.mark.parametrize("files", [["config.json", "weights.new"], ["config.json"], ["notes"]], ids=str)
def test_a_folder_that_is_no_run_is_left_alone(files, tmp_path, args):
    """Such as that of a model, which has a config.json, too."""
    for name in files:
        (tmp_path / name).write_text('{"model_type": "llama"}')
    before = all_bytes(tmp_path)
    with pytest.raises(tasks.InputError, match="holds no run"):
        dvo.Run(tmp_path, args)
    assert all_bytes(tmp_path) == before


def test_a_run_that_stopped_at_its_first_file_begins_again(tmp_path, args):
    (tmp_path / "log.jsonl").touch()
    dvo.Run(tmp_path, args).lines.close()


def test_a_number_that_is_none_is_null_in_the_log(tmp_path, args):
    run = dvo.Run(tmp_path, args)
    run.log("train", loss=math.nan, grad_norm=math.inf, lr=0.5)
    [entry] = tiny.read(tmp_path / "log.jsonl")
    assert (entry["loss"], entry["grad_norm"], entry["lr"]) == (None, None, 0.5)


def test_another_format_is_another_run(tmp_path, args):
    args.seed = 1
    dvo.Run(tmp_path / "run", args).lines.close()
    args.seed = 2                                                   # nothing is lost: it has not begun
    dvo.Run(tmp_path / "run", args).file("trees").touch()
    dvo.Run(tmp_path / "run", args).lines.close()
    args.format = mcts.Format(step_end="\n")
    with pytest.raises(tasks.InputError, match="a run with other settings .format was .* and is"):
        dvo.Run(tmp_path / "run", args)


def test_the_demo_without_rounds(tmp_path, monkeypatch, capsys):
    """Its base is tested, and nothing that was learnt is shown."""
    monkeypatch.setattr(dvo, "make_base", lambda folder, seed, device: dvo.random_model(folder, seed))
    tiny.run(dvo.main, monkeypatch, "--rounds", 0, "--eval-limit", 2, "--trials", 1, "--out", tmp_path / "run")
    assert "base" in capsys.readouterr().out


def test_the_card_of_a_model_has_its_numbers_and_a_snippet_that_runs(run_folder, tmp_path):
    folder = run_folder / "round1" / "model"
    card = (folder / "README.md").read_text()
    result = json.loads((run_folder / "round1" / "eval-questions.json").read_text())
    modes = {(folder / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1
    assert "--objective dvo" in card
    assert f"| questions | {result['accuracy']:.1%} of 8 |" in card
    _, snippet = card.split("```python\n")
    script = tmp_path / "snippet.py"
    script.write_text(snippet.split("```")[0])
    assert command(script=script, cwd=folder).stdout


# ---------------------------------------------------------------- commands


def test_mcts_command_searches_and_draws(tmp_path, inputs):
    out = tmp_path / "trees.jsonl"
    command(*inputs[:4], "--out", out, "--limit", 2, "--iterations", 3, "--seed", 4, script="mcts.py")
    first, second = mcts.read_trees(out)
    assert first.question != second.question
    assert first.config["seed"] == 4
    drawn = command("--show", out, script="mcts.py").stdout
    assert "Add 0 to 1." in drawn
    assert "─" in drawn


def test_eval_command_prints_mean_and_spread(inputs):
    done = command(*inputs[:4], "--limit", 3, "--trials", 2, "--max-new-tokens", 20, script="eval.py")
    assert "±" in done.stdout


@pytest.mark.parametrize("module", [dvo, tasks])
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
