"""Precision and memory: log-probs against plain forwards, bounded KV, the memory plan, bad numbers.

    python -m pytest -q tests/test_precision.py
"""
import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import tiny
import dvo
import eval as tasks
import mcts

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


def test_kv_stays_within_the_budget_and_is_recomputed():
    """A tenth of the KV that the search would like to keep: more prefill, the same trees."""
    def run(budget):
        searching = search(tiny.model(dtype=torch.float64), kv_budget=budget, slots=2)
        engine, most, trees = searching.gi_frame.f_locals["engine"], 0, []
        keep = engine._keep

        def watched(*arguments):
            nonlocal most
            keep(*arguments)
            most = max(most, engine.stored)
        engine._keep = watched
        trees = sorted((t.to_json() for t in searching))
        return trees, most, engine.stats["prefilled"]
    free, most, prefilled = run(2**30)
    bounded, kept, again = run(most // 10)
    assert bounded == free and kept <= most // 10 and again > prefilled


# ---------------------------------------------------------------- the memory plan


LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256)
LLAMA_70B = LLAMA_8B | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                            num_attention_heads=64)


def peaks(size, ranks, **flags):
    settings = dict(ranks=ranks, micro_tokens=4096, offload=False, activation_checkpointing=False,
                    shard_search=False, slots=None, candidates=None, breadth=5, max_step_tokens=256) | flags
    plan = dvo.memory_plan(transformers.LlamaConfig(**size), argparse.Namespace(**settings))
    return {phase: sum(parts.values()) for phase, parts in plan.items()}


def test_memory_plan_of_the_papers_model_and_of_a_large_one():
    """8B fits on 8 x 80 GB; 70B does not without offload; training state is 16 bytes a parameter."""
    small, large = peaks(LLAMA_8B, 8), peaks(LLAMA_70B, 8)
    assert max(small["train"], small["search"]) < 72 < min(large["train"], large["search"])
    offloaded = peaks(LLAMA_70B, 8, offload=True, activation_checkpointing=True, shard_search=True, slots=32)
    assert max(offloaded["train"], offloaded["search"]) < 72
    assert offloaded["host"] == pytest.approx(16 * 70.55e9 / 2**30, rel=1e-3)


def test_plan_command_reads_no_weights(tmp_path, monkeypatch, capsys):
    transformers.LlamaConfig(**LLAMA_8B).save_pretrained(tmp_path)  # no weights, no tokenizer
    arguments = ["--plan", "--model", str(tmp_path), "--ranks", "8", "--gpu-memory", "80"]
    monkeypatch.setattr(sys, "argv", ["dvo.py", *arguments])
    dvo.main()
    out = capsys.readouterr().out
    assert "AdamW" in out and "fits" in out and "--offload" in out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_memory_plan_agrees_with_a_measured_peak(tmp_path):
    tiny.model(chances=None, hidden_size=256, intermediate_size=1024, num_attention_heads=8, head_dim=32,
               num_hidden_layers=4, max_position_embeddings=1024).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    bench = Path(__file__).with_name("bench.py")
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536"}                    # freed memory goes back at once
    done = subprocess.run([sys.executable, bench, "plan", "--model", tmp_path, "--micro-tokens", "512"],
                          env=os.environ | malloc, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert abs(float(re.search(r"([+-][\d.]+)%", done.stdout)[1])) < 25, done.stdout


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
    monkeypatch.setattr(dvo.signal, "signal", lambda *_: None)
    mcts.run_command(dvo.main)


@pytest.mark.parametrize("objective", dvo.OBJECTIVES)
def test_any_objective_trains_on_given_trees(objective, folders, monkeypatch):
    train_on_trees(folders, "model", monkeypatch, "--objective", objective)
    events = [json.loads(line) for line in open(folders / "run" / "log.jsonl")]
    assert [e["event"] for e in events if e["event"] != "train"] == ["trained"]
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
    examples = [e for e in map(dvo.make_example, mcts.read_trees(folders / "trees.jsonl")) if e]
    dvo.add_reference(policy, examples, 4096)
    entries, calls = [], []

    def loss(bad):
        def loss_fn(example, logprobs):
            calls.append(1)
            factor = float("nan") if bad(len(calls)) else 1.0
            return factor * dvo.dvo_loss(logprobs, example.reference, example.credit, example.path)
        return loss_fn
    settings = dict(lr=1e-4, questions_per_step=1, micro_tokens=4096, log=lambda **e: entries.append(e))
    before = [p.clone() for p in policy.parameters()]
    dvo.train(policy, examples[:1], loss(lambda n: n == 1), epochs=1, **settings)
    assert entries[-1]["skipped"] and all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    with pytest.raises(mcts.InputError, match="5 steps in a row"):
        dvo.train(policy, examples[:1], loss(lambda n: True), epochs=9, **settings)
