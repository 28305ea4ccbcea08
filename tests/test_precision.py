# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Precision: log-probs against plain forwards; training on given trees, flag by flag; bad numbers.

    python -m pytest -q tests/test_precision.py
"""
import json

import pytest
import torch
import transformers
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as dcp_to_torch

import tiny
import dvo
import eval as tasks
import mcts
from launch import Command

QUESTIONS = [f"Add {i} to {i + 1}." + " So double it." * (i % 3) for i in range(6)]


def search(model, slots=4):
    return tiny.search(model, QUESTIONS, iterations=10, max_step_tokens=16, slots=slots)


@torch.no_grad()
def plain_logprobs(model, tree, path):
    """log pi of each step of a path by one uncached forward of the model's own, in its own precision."""
    steps = [tree.nodes[i].tokens for i in path]
    row = torch.tensor(sum(steps, tree.prompt))
    logits = model(input_ids=row[None]).logits[0, :-1]
    logprobs = logits.double().log_softmax(-1)
    of_tokens = logprobs.gather(1, row[1:, None])[len(tree.prompt) - 1:, 0]
    return [part.sum().item() for part in of_tokens.split([len(step) for step in steps])]


# A logit has an error of a few units in its last place: for logits up to 16, 1e-6 in float32 and 16 / 2^8 =
# 0.06 in bfloat16, whose own forward differs from its float32 twin by as much. A bound a token, and a tighter
# one for the mean. (In float64 test_models.py compares them, for many kinds.)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_stored_log_probs_are_the_models_own(kind, dtype):
    model = tiny.model(kind, dtype)
    errors = {}                                                     # of each step, nats a token
    for tree in search(model):
        ends = [i for i, node in enumerate(tree.nodes) if not node.children]
        for path in map(tree.path, ends):
            for i, logprob in zip(path, plain_logprobs(model, tree, path), strict=True):
                node = tree.nodes[i]
                errors[tree.question, i] = (node.logprob - logprob) / len(node.tokens)
    assert len(errors) > 100
    errors = list(errors.values())
    assert max(map(abs, errors)) < TOLERANCE[dtype]
    mean = sum(errors) / len(errors)
    assert abs(mean) < TOLERANCE[dtype] / 10                        # no drift to one side


def test_float32_trees_do_not_depend_on_the_slots():
    """Noise keyed per token id keeps float32 trees the same although their logits differ in the last bits."""
    def grown(slots):
        found = {}
        for tree in search(tiny.model(), slots):
            found[tree.question] = [(n.parent, n.tokens, n.visits, n.value) for n in tree.nodes]
        return found

    assert grown(slots=1) == grown(slots=3) == grown(slots=16)


# ---------------------------------------------------------------- training on given trees


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a model, another one, and trees that the first has searched."""
    folder = tmp_path_factory.mktemp("given")
    tiny.save(folder / "model")
    tiny.save(folder / "other", seed=1)
    tiny.write_trees(folder / "trees.jsonl", search(tiny.model()))
    return folder


def arguments(given, out, model="model"):
    return ["--model", given / model, "--trees", given / "trees.jsonl", "--eval-data", "--out", out,
            "--lr", 1e-3, "--epochs", 1]


@pytest.fixture
def trained(given, tmp_path, monkeypatch):
    """trained(*flags): the run folder of a training with those flags, its weights, its events of a step."""
    def train(*flags):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        tiny.run(dvo.main, monkeypatch, *arguments(given, out), *flags)
        events = tiny.read(out / "log.jsonl")
        steps = [event for event in events if event["event"] == "train"]
        return out, tiny.saved_weights(out / "round1" / "model"), steps

    return train


@pytest.fixture(scope="module")
def usual(given, tmp_path_factory):
    """The weights by default."""
    out = tmp_path_factory.mktemp("usual") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny.run(dvo.main, patch, *arguments(given, out))
    return tiny.saved_weights(out / "round1" / "model")


@pytest.mark.parametrize("objective", dvo.OBJECTIVES)
def test_any_objective_trains_on_given_trees(objective, trained, given):
    out, weights, steps = trained("--objective", objective)
    assert not torch.equal(weights, tiny.saved_weights(given / "model"))
    assert steps
    others = [event["event"] for event in tiny.read(out / "log.jsonl") if event not in steps]
    assert others == ["trained"]


@pytest.mark.parametrize("flags", [
    ["--level", "response"],
    ["--targets", "value-model"],
    ["--paths", 1],
    ["--beta", 1],
    ["--lr", 2e-3],
    ["--epochs", 2],
    ["--questions-per-step", 2],
    ["--keep-unsolved"]], ids=str)
def test_a_flag_of_the_training_changes_the_weights(flags, trained, usual):
    _, weights, _ = trained(*flags)
    assert not torch.equal(weights, usual)


def test_the_seed_draws_other_paths(trained):
    _, first, _ = trained("--paths", 1)
    _, second, _ = trained("--paths", 1, "--seed", 1)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("critic", [["--objective", "oreo"], ["--targets", "value-model"]], ids=str)
def test_the_rate_of_the_critic_changes_the_weights_of_the_policy(critic, trained):
    two_steps = [*critic, "--epochs", 2]                            # at the first the critic is 0
    _, slow, _ = trained(*two_steps)
    _, fast, _ = trained(*two_steps, "--value-lr", 1e-2)
    assert not torch.equal(slow, fast)


@pytest.mark.parametrize("flags, function, argument", [
    (["--micro-tokens", 64], "micro_batches", (64,)),
    (["--activation-checkpointing"], "recompute_blocks", ())])
def test_a_flag_that_saves_memory_changes_no_weight(flags, function, argument, trained, usual, monkeypatch):
    """Though it is obeyed: `function` is called with it."""
    own = getattr(dvo, function)
    seen = set()

    def noted(first, *others):
        seen.add(others[:1])
        return own(first, *others)

    monkeypatch.setattr(dvo, function, noted)
    _, weights, _ = trained(*flags)
    assert seen == {argument}
    assert torch.allclose(weights, usual, atol=1e-6)


def test_epochs_and_questions_a_step_make_the_number_of_steps(trained, given):
    questions = sum(dvo.make_example(tree) is not None for tree in mcts.read_trees(given / "trees.jsonl"))
    assert questions > 2
    _, _, steps = trained("--epochs", 2, "--questions-per-step", 2)
    assert len(steps) == 2 * -(-questions // 2)


@pytest.mark.parametrize("ranks", [0, 2])
def test_bfloat16_trains_float32_masters(ranks, given, tmp_path):
    """At a rate of 1e-5 a step is lost in bfloat16's rounding of most weights; masters keep it, in one
    process and on two ranks, and the saved model is bfloat16."""
    run = tmp_path / "run"
    process = Command(*arguments(given, run), "--epochs", 3, "--lr", 1e-5, "--dtype", "bfloat16", ranks=ranks)
    process.communicate()
    assert process.returncode == 0, process.stderr[-2000:]
    dcp_to_torch(run / "round1" / "state", tmp_path / "state.pt")
    masters = torch.load(tmp_path / "state.pt", weights_only=False)["model0"]
    shares = []                                                     # of the numbers of each matrix that moved
    for name, old in tiny.model().named_parameters():
        new = masters[f"lm.{name}"]
        assert new.dtype == torch.float32
        if old.dim() == 2 and "embed" not in name:
            shares.append((new != old).float().mean().item())
    assert sum(shares) / len(shares) > 0.6
    saved = transformers.AutoModelForCausalLM.from_pretrained(run / "round1" / "model")
    assert saved.dtype == torch.bfloat16


def expect_refusal(words, monkeypatch, capsys, *given):
    with pytest.raises(SystemExit) as stopped:
        tiny.run(dvo.main, monkeypatch, *given)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_trees_of_another_model_are_refused(given, tmp_path, monkeypatch, capsys):
    asked = arguments(given, tmp_path / "run", model="other")
    expect_refusal("not sampled from this model", monkeypatch, capsys, *asked)


def test_trees_of_the_round_before_are_refused(given, tmp_path, monkeypatch, capsys):
    """What one round changed in a model is more than rounding."""
    out = tmp_path / "run"
    tiny.run(dvo.main, monkeypatch, *arguments(given, out), "--epochs", 8)
    told = capsys.readouterr().out
    assert "the trees given: of " in told
    trained = out / "round1" / "model"
    asked = arguments(given, tmp_path / "next", model=trained)
    expect_refusal("not sampled from this model", monkeypatch, capsys, *asked)


def test_some_trees_of_another_model_are_refused(given, tmp_path, monkeypatch, capsys):
    for name, found in ("one", search(tiny.model())), ("other", search(tiny.model(seed=1))[-1:]):
        tiny.write_trees(tmp_path / f"{name}.jsonl", found)
    expect_refusal("not sampled from this model", monkeypatch, capsys, "--model", given / "model", "--trees",
                   tmp_path / "one.jsonl", tmp_path / "other.jsonl", "--eval-data", "--out", tmp_path / "run",
                   "--keep-unsolved")


@pytest.mark.parametrize("bad", [0, 1])
def test_one_tree_of_nan_among_others_is_seen(bad):
    examples = [dvo.make_example(tiny.tree("0 right", "0 wrong")) for _ in range(2)]
    examples[bad].reference[1] = torch.nan
    distance = dvo.add_reference(dvo.Policy(tiny.model()), examples, max_tokens=300)
    assert torch.tensor(distance).isnan()


def test_a_test_on_questions_of_the_trees_is_told(given, tmp_path, monkeypatch, capsys):
    questions = tmp_path / "test.jsonl"
    [first, *_] = mcts.read_trees(given / "trees.jsonl")
    questions.write_text(json.dumps({"question": first.question, "answer": "7"}) + "\n")
    tiny.run(dvo.main, monkeypatch, *arguments(given, tmp_path / "run"), "--eval-data", questions, "--trials", 1,
             "--max-new-tokens", 8)
    assert "1 test questions are training questions" in capsys.readouterr().err


def test_trees_of_another_chat_template_are_refused(given, tmp_path, monkeypatch, capsys):
    tiny.save(tmp_path / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(tmp_path / "model")
    asked = [*arguments(given, tmp_path / "run"), "--model", tmp_path / "model"]
    expect_refusal("another tokenizer or chat template", monkeypatch, capsys, *asked)


def test_trees_from_before_there_were_fingerprints_are_taken_on_trust(given, tmp_path, monkeypatch):
    own = f', "tokenizer": "{mcts.fingerprint(tiny.tokenizer())}"'
    text = (given / "trees.jsonl").read_text()
    assert own in text
    trees = tmp_path / "trees.jsonl"
    trees.write_text(text.replace(own, ""))
    tiny.run(dvo.main, monkeypatch, *arguments(given, tmp_path / "run"), "--trees", trees)


# ---------------------------------------------------------------- numbers gone bad


@pytest.fixture
def train_with_bad_steps(given):
    """train(n, bad): n steps of which those in `bad` have no finite loss; the policy and the log."""
    found = (dvo.make_example(tree) for tree in mcts.read_trees(given / "trees.jsonl"))
    example = next(filter(None, found))
    policy = dvo.Policy(tiny.model())
    dvo.add_reference(policy, [example], 4096)

    def train(n, bad):
        entries = []

        def of_step(step):
            return {"factor": float("nan") if step in bad else 1.0}

        def loss_fn(example, logprobs, factor):
            return factor * dvo.objective_loss("dvo", example, logprobs)

        def log(**entry):
            entries.append(entry)

        dvo.train([dvo.Learner(policy, 1e-4)], [example], loss_fn, [[0]] * n, micro_tokens=4096,
                  of_step=of_step, log=log)
        return policy, entries

    return train


def test_a_step_whose_gradient_is_not_finite_changes_nothing(train_with_bad_steps):
    policy, [entry] = train_with_bad_steps(1, bad=[0])
    assert entry["skipped"]
    assert all(map(torch.equal, policy.parameters(), tiny.model().parameters()))


def test_five_bad_steps_in_a_row_end_the_run_and_four_do_not(train_with_bad_steps):
    _, entries = train_with_bad_steps(10, bad=[0, 1, 2, 3, 5, 6, 7, 8])
    assert [entry["skipped"] for entry in entries] == [True] * 4 + [False] + [True] * 4 + [False]
    with pytest.raises(tasks.InputError, match="5 steps in a row"):
        train_with_bad_steps(9, bad=range(9))
