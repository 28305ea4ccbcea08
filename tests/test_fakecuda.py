# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""On a GPU that is none (fakecuda.py): nothing mixes devices, the numbers are those of the CPU, and the host
waits for the GPU no more often than it must.

    python -m pytest -q tests/test_fakecuda.py
"""
import json
import os
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import tiny                                                         # first: it puts the project on sys.path
import dvo
import eval as tasks
import fakecuda
import gpu
import mcts

QUESTIONS = [f"Add {i} to {i + 1}." + " So double it." * (i % 3) for i in range(5)]
PROBLEMS = [{"question": question, "answer": "7"} for question in QUESTIONS]


def test_the_tests_see_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_the_search_of_any_command_takes_what_a_gpu_needs():
    """Attention of cuDNN is off, whoever calls; memory comes in segments that grow."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert "expandable_segments:True" in os.environ["PYTORCH_CUDA_ALLOC_CONF"]


def test_a_lone_process_takes_the_first_gpu(monkeypatch):
    """By its number, without which CUDA does not accept it as the present one."""
    joined, chosen = [], []
    monkeypatch.setattr(dvo.dist, "init_process_group", lambda backend, **how: joined.append(backend))
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    with fakecuda.gpu():
        assert dvo.start_ranks("cuda", None) == fakecuda.GPU
    assert chosen == [0] and joined == ["cuda:nccl,cpu:gloo"]


# ---------------------------------------------------------------- the GPU that is none


FIRST = torch.tensor([0])
BOTH = torch.tensor([0, 1])
MIXED = {"add": lambda gpu, cpu: gpu + cpu,
         "matmul": lambda gpu, cpu: cpu @ gpu.T,
         "cat": lambda gpu, cpu: torch.cat((gpu, cpu)),
         "in place": lambda gpu, cpu: gpu.mul_(cpu),
         "an index from the GPU": lambda gpu, cpu: cpu[gpu[0].long()],
         "values from the CPU": lambda gpu, cpu: gpu.index_put_((FIRST,), cpu[:1]),
         "index_copy": lambda gpu, cpu: gpu.index_copy_(0, BOTH, gpu)}


@pytest.mark.parametrize("mix", MIXED)
def test_devices_do_not_mix(mix):
    with fakecuda.gpu():
        gpu = torch.ones(2, 2, device=fakecuda.GPU)
        cpu = torch.ones(2, 2)
        sums = gpu + torch.tensor(2.0)                              # a single number may
        assert sums.tolist() == [[3, 3], [3, 3]]
        with pytest.raises(fakecuda.DeviceMix):
            MIXED[mix](gpu, cpu)


WAITING = {"item": lambda gpu: gpu.sum().item(),
           "bool": lambda gpu: bool(gpu[0] > 0),
           "tolist": lambda gpu: gpu.tolist(),
           "to the CPU": lambda gpu: gpu.cpu(),
           "to the GPU": lambda gpu: torch.ones(3).to(gpu.device),
           "a new tensor": lambda gpu: torch.tensor([1, 2], device=gpu.device),
           "a mask": lambda gpu: gpu[gpu > 0],
           "an index": lambda gpu: gpu[BOTH]}


@pytest.mark.parametrize("how", WAITING)
def test_waits_are_counted(how):
    with fakecuda.gpu() as waits:
        gpu = torch.arange(3.0, device=fakecuda.GPU)
        gpu = gpu + torch.zeros(3, device=fakecuda.GPU)
        gpu[1:] += gpu.float().exp()[1:]
        assert waits.total == 0
        WAITING[how](gpu)
        assert waits.total == 1


# ---------------------------------------------------------------- searching and sampling


def count_steps(monkeypatch, waits):
    """Count what each step of an engine waits for, until the next: its result, once all are done, is rows
    (waits, forwards drawn from, jobs started, samples ended)."""
    calls, before = Counter(), []

    def totals():
        return waits.total, calls["draw"], calls["begin"], calls["finish"]

    def counted(name):
        method = getattr(mcts.Engine, name)

        def call(self, *arguments):
            if name == "advance":
                before.append(totals())
            calls[name] += 1
            return method(self, *arguments)
        monkeypatch.setattr(mcts.Engine, name, call)

    for name in ("advance", "draw", "begin", "finish"):
        counted(name)
    return lambda: np.diff([*before, totals()], axis=0)


def check_waits(steps):
    waited, drawn, started, ended = steps.T
    assert (waited <= 2 * drawn + 4 * started + (ended > 0)).all()
    plain = (started == 0) & (ended == 0)
    assert (waited == 2 * drawn)[plain].all()                       # a table goes there, the tokens come back
    assert plain.sum() > 5                                          # else this proves little
    assert started.sum() >= 5
    assert ended.max() > 1


def search(model):
    settings = dict(iterations=3, breadth=3, depth=3, max_step_tokens=8, slots=3, kv_budget=150_000)
    trees = mcts.search(model, tiny.tokenizer(), PROBLEMS[:4], tasks.reward, **settings)
    return sorted(tree.to_json() for tree in trees)


def sample(model):
    return mcts.sample(model, tiny.tokenizer(), QUESTIONS, n=3, max_new_tokens=12, slots=3)


@pytest.mark.parametrize("draw", [search, sample])
def test_the_engine_waits_twice_a_step(draw, monkeypatch):
    expected = draw(tiny.model(dtype=torch.float64))
    with fakecuda.gpu() as waits:
        model = tiny.model(dtype=torch.float64).to(fakecuda.GPU)
        mcts.check_model(model)
        steps = count_steps(monkeypatch, waits)
        assert draw(model) == expected
    check_waits(steps())


# ---------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a model, questions, and trees of them."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny.model(dtype=torch.float64)
    for part in model, tiny.tokenizer():
        part.save_pretrained(folder / "model")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    settings = dict(iterations=8, breadth=4, depth=4, max_step_tokens=12)

    def reward(text, answer):                                       # a random model is right by luck only
        return 1 if len(text) % 2 else -1

    trees = mcts.search(model, tiny.tokenizer(), PROBLEMS[:3], reward, **settings)
    tiny.write_trees(folder / "trees.jsonl", trees)
    return folder


def arguments(monkeypatch, inputs, *others):
    monkeypatch.setattr(sys, "argv", ["dvo.py", *map(str, (
        "--model", inputs / "model", "--dtype", "float64", "--questions-per-step", 2, "--micro-tokens", 300,
        "--lr", 1e-3, *others))])


def learn(device, inputs):
    """What a round that trains on given trees logs, and the weights it ends with."""
    logged = []

    def training(event, label, state):
        return dict(micro_tokens=300, name=label, log=lambda event=event, **fields: logged.append(fields))

    policy = dvo.Policy(tiny.model(dtype=torch.float64).to(device))
    dvo.train_round(types.SimpleNamespace(
        args=dvo.parse_arguments(), policy=policy, tokenizer=tiny.tokenizer(), round=1, training=training,
        file=lambda name: None))
    weights = tiny.weights(policy).cpu()
    return [{**fields, "tokens_per_second": 0} for fields in logged], weights


@pytest.mark.parametrize("objective", [*dvo.OBJECTIVES, "dvo --targets value-model"])
def test_every_objective_learns_the_same(objective, inputs, monkeypatch):
    arguments(monkeypatch, inputs, "--trees", inputs / "trees.jsonl", "--epochs", 1, "--keep-unsolved",
              "--objective", *objective.split())
    monkeypatch.setattr(dvo, "save_model", lambda *_: None)
    expected, expected_weights = learn("cpu", inputs)
    with fakecuda.gpu():
        found, weights = learn(fakecuda.GPU, inputs)
    assert len(expected) > 1
    check_same(found, expected)
    assert (weights - expected_weights).abs().max() < 1e-7
    before = tiny.weights(tiny.model(dtype=torch.float64))
    assert (weights - before).abs().max() > 1e-5                    # it has learnt


def check_same(found, expected):
    """Equal in all but the last digits of numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for part, other in zip(found, expected):
            check_same(part, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    else:
        assert found == expected


def run(folder):
    """dvo.py; what it logs, without times."""
    sys.argv[-1] = str(folder)
    dvo.main()
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    timed = dict.fromkeys(("time", "seconds", "tokens_per_second"))
    return [line | timed for line in lines]


def test_a_run_of_two_rounds_is_the_same(inputs, tmp_path, monkeypatch):
    load = mcts.load_model

    def load_apart(name, device, dtype):        # transformers loads by way of `meta`
        with _disable_current_modes():
            model, tokenizer = load(name, "cpu", dtype)
        return model.to(device), tokenizer

    data = inputs / "data.jsonl"
    arguments(monkeypatch, inputs, "--data", data, "--eval-data", data, "--no-bootstrap", "--rounds", 2,
              "--epochs", 1, "--questions-per-round", 2, "--iterations", 5, "--breadth", 3, "--depth", 3,
              "--max-step-tokens", 6, "--eval-limit", 2, "--max-new-tokens", 4, "--trials", 1,
              "--keep-unsolved", "--out", "")
    expected = run(tmp_path / "cpu")
    monkeypatch.setattr(mcts, "load_model", load_apart)
    monkeypatch.setattr(dvo, "start_ranks", lambda device, dtype: fakecuda.GPU)
    with fakecuda.gpu():
        found = run(tmp_path / "gpu")
    assert [line["event"] for line in expected].count("train") == 2
    check_same(found, expected)


# ---------------------------------------------------------------- the GPU that somebody else has


def test_the_acceptance_of_a_gpu_runs_without_one(tmp_path, capsys):
    """What needs a GPU says so; all else passes."""
    with pytest.raises(SystemExit) as end:
        gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert end.value.code == 0, found[-1]
    verdicts = {check["check"]: check["verdict"] for check in found}
    assert [*verdicts] == [check.__name__.replace("_", " ") for check in gpu.CHECKS]
    passed = {name for name, verdict in verdicts.items() if verdict == "PASS"}
    assert passed == {"environment", "search in float64", "search in float32", "search in bfloat16",
                      "objectives", "unlikely rows", "kernels", "one rank runs"}
    assert capsys.readouterr().out.count("NOT CHECKED") == len(found) - len(passed)


def test_the_first_failure_ends_the_acceptance(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    with pytest.raises(SystemExit) as end:
        gpu.main(["--device", "cpu", "--tiny"])
    assert end.value.code == 1
    assert capsys.readouterr().out.startswith("FAIL        environment") and dvo.world() == 1
