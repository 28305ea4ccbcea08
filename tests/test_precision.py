# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Precision: log-probs against plain forwards; objectives on given trees; bad numbers.

    python -m pytest -q tests/test_precision.py
"""
import json
import sys

import pytest
import torch
import transformers
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as dcp_to_torch

import tiny
import dvo
import eval as tasks
import mcts
from launch import Command

QUESTIONS = [f"Add {i} to {i + 1}." + " So double it." * (i % 3) for i in range(8)]
PROBLEMS = [{"question": question, "answer": "7"} for question in QUESTIONS]


def search(model, **settings):
    settings = dict(iterations=10, breadth=4, depth=4, max_step_tokens=16, slots=4) | settings
    return mcts.search(model, tiny.tokenizer(), PROBLEMS, tasks.reward, **settings)


def plain_logprob(model, tree, i):
    """log pi of step i by one uncached forward of the model's own, in its own precision."""
    row = tree.prompt + sum((tree.nodes[j].tokens for j in tree.path(i)), [])
    n = len(tree.nodes[i].tokens)
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([row])).logits[0, -n - 1:-1].double().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(row[-n:])[:, None]).sum().item()


# A logit has an error of a few units in its last place: for logits up to 16, 1e-6 in float32 and 16 / 2^8 =
# 0.06 in bfloat16, whose own forward differs from its float32 twin by as much. A bound a token, and a tighter
# one for the mean.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.25}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_stored_log_probs_are_the_models_own(kind, dtype):
    model = tiny.model(kind, dtype)
    errors = [(tree.nodes[i].logprob - plain_logprob(model, tree, i)) / len(tree.nodes[i].tokens)
              for tree in search(model) for i in range(1, len(tree.nodes))]
    assert len(errors) > 100
    assert max(map(abs, errors)) < TOLERANCE[dtype]
    assert abs(sum(errors) / len(errors)) < TOLERANCE[dtype] / 10   # no drift to one side


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_float32_trees_do_not_depend_on_the_slots(kind):
    """Noise keyed per token id keeps float32 trees the same although their logits differ in the last bits."""
    def tokens(slots):
        trees = sorted(search(tiny.model(kind), slots=slots), key=lambda t: t.question)
        return [[(n.parent, n.tokens, n.visits, n.value) for n in t.nodes] for t in trees]
    assert tokens(1) == tokens(3) == tokens(16)


@pytest.mark.parametrize("ranks", [0, 2])
def test_bfloat16_trains_float32_masters(ranks, folders):
    """At a rate of 1e-5 a step is lost in bfloat16's rounding of most weights; masters keep it, in one process
    and on two ranks, and the saved model is bfloat16."""
    run = folders / "run"
    process = Command("--model", folders / "model", "--trees", folders / "trees.jsonl", "--eval-data", "--out",
                      run, "--lr", 1e-5, "--dtype", "bfloat16", ranks=ranks)
    process.communicate()
    assert process.returncode == 0, process.stderr[-2000:]
    state = {}
    path = next((run / "round1").glob("state"))
    dcp_to_torch(path, folders / "state.pt")
    state = torch.load(folders / "state.pt", weights_only=False)["model0"]
    old = dict(tiny.model().named_parameters())
    moved = [(state[f"lm.{name}"] != weight).float().mean().item() for name, weight in old.items()
             if weight.dim() == 2 and "embed" not in name]
    assert all(weight.dtype == torch.float32 for weight in state.values())
    assert sum(moved) / len(moved) > 0.6
    saved = transformers.AutoModelForCausalLM.from_pretrained(run / "round1" / "model")
    assert saved.dtype == torch.bfloat16


# ---------------------------------------------------------------- trees given, numbers gone bad


@pytest.fixture
def folders(tmp_path):
    for name, seed in ("model", 0), ("other", 1):
        tiny.model(seed=seed).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    with open(tmp_path / "trees.jsonl", "w") as out:
        out.writelines(tree.to_json() + "\n" for tree in search(tiny.model()))
    return tmp_path


def train_on_trees(folder, model, monkeypatch, *more):
    arguments = ["--model", folder / model, "--trees", folder / "trees.jsonl", "--eval-data", "--out",
                 folder / "run", "--lr", 1e-3, *more]
    monkeypatch.setattr(sys, "argv", ["dvo.py", *map(str, arguments)])
    tasks.run_command(dvo.main)


@pytest.mark.parametrize("objective", dvo.OBJECTIVES)
def test_any_objective_trains_on_given_trees(objective, folders, monkeypatch):
    train_on_trees(folders, "model", monkeypatch, "--objective", objective)
    events = [json.loads(line) for line in open(folders / "run" / "log.jsonl")]
    assert [e["event"] for e in events if e["event"] not in ("train", "value")] == ["trained"]
    load = transformers.AutoModelForCausalLM.from_pretrained
    new, old = load(folders / "run" / "round1" / "model"), load(folders / "model")
    assert any(not torch.equal(a, b) for a, b in zip(new.parameters(), old.parameters()))


@pytest.mark.parametrize("usual, other", [
    ([], ["--level", "response"]), ([], ["--targets", "value-model"]), ([], ["--paths", 1]),
    ([], ["--beta", 1]),
    (["--objective", "oreo"], ["--objective", "oreo", "--value-lr", 1e-2]),
    (["--targets", "value-model"], ["--targets", "value-model", "--value-lr", 1e-2])], ids=str)
def test_flags_of_the_objective_change_the_weights(usual, other, folders, monkeypatch):
    weights = []
    for flags in usual, other:
        train_on_trees(folders, "model", monkeypatch, *flags)
        folder = folders / "run"
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "round1" / "model")
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        folder.rename(folders / f"run{len(weights)}")
    assert not torch.equal(*weights)


def test_trees_of_another_model_are_refused(folders, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_on_trees(folders, "other", monkeypatch)
    assert stopped.value.code == 2 and "not sampled from this model" in capsys.readouterr().err


@pytest.mark.parametrize("fate", ["changed", "unknown"])
def test_trees_of_another_tokenizer_are_refused(fate, folders, monkeypatch, capsys):
    """A changed chat template is noticed; trees from before there were fingerprints are taken on trust."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(folders / "model")
    trees = folders / "trees.jsonl"
    if fate == "unknown":
        own = f', "tokenizer": "{mcts.fingerprint(tiny.tokenizer())}"'
        trees.write_text(trees.read_text().replace(own, ""))
        return train_on_trees(folders, "model", monkeypatch, "--epochs", 1)
    with pytest.raises(SystemExit) as stopped:
        train_on_trees(folders, "model", monkeypatch)
    assert stopped.value.code == 2 and "another tokenizer or chat template" in capsys.readouterr().err


def test_bad_gradients_are_skipped_and_then_stop_the_run(folders):
    """One bad step changes nothing; five in a row end the run with a sentence."""
    policy = dvo.Policy(tiny.model())
    examples = [e for e in map(dvo.make_example, mcts.read_trees(folders / "trees.jsonl")) if e][:1]
    dvo.add_reference(policy, examples, 4096)
    entries, calls = [], []

    def train(bad, epochs):
        def loss_fn(example, logprobs):
            calls.append(1)
            factor = float("nan") if len(calls) in bad else 1.0
            return factor * dvo.objective_loss("dvo", example, logprobs)

        dvo.train([dvo.Learner(policy, 1e-4)], examples, loss_fn, [[0]] * epochs, micro_tokens=4096,
                  log=lambda **e: entries.append(e))

    before = [p.clone() for p in policy.parameters()]
    train({1}, epochs=1)
    assert entries[-1]["skipped"] and all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    with pytest.raises(tasks.InputError, match="5 steps in a row"):
        train(range(99), epochs=9)
