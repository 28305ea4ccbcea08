# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Many ranks and restarts, on the CPU with gloo: 1, 2 and 4 ranks give the same run, as does a killed one.

    python -m pytest -q tests/test_ranks.py
    python tests/test_ranks.py --kills 20       # minutes: SIGKILL at random moments, then the same command
"""
import argparse
import contextlib
import functools
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from pytest import approx as about
from safetensors.torch import load_file

import tiny
import dvo
import mcts
from conftest import starts_early
from launch import ROOT, Command

SETTINGS = ["--no-bootstrap", "--rounds", 2, "--questions-per-round", 3,
            "--iterations", 10, "--breadth", 5, "--depth", 4, "--max-step-tokens", 12, "--slots", 4,
            "--lr", 1e-3, "--epochs", 2, "--questions-per-step", 3, "--micro-tokens", 300,
            "--max-new-tokens", 16, "--trials", 2, "--dtype", "float64", "--save-minutes", 0]

LIMIT = 600             # seconds after which a command hangs, on however busy a machine


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def make_inputs(folder):
    """A model folder, and three questions more than four ranks can share evenly."""
    tiny.save(folder / "model")
    questions = [f"Add {i} to {i + 1}." + " So double it." * (i % 4) for i in range(7)]
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    write_questions(train, questions)
    write_questions(test, questions[:3])
    return ["--model", folder / "model", "--data", train, "--eval-data", test]


def write_questions(path, questions):
    lines = [json.dumps({"question": question, "answer": "7"}) + "\n" for question in questions]
    path.write_text("".join(lines))


def launch(ranks, *arguments, **how):
    """Start dvo.py in one process (ranks = 0), or as ranks of a group."""
    return Command(*arguments, ranks=ranks, **how)


def finish(process, limit=LIMIT):
    """Wait; a hang is a failure that shows where every rank stood."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)         # each prints its stack
        _, stacks = process.communicate()
        pytest.fail("hang: " + stacks[-9000:])
    assert process.returncode == 0, err[-9000:]
    return out, err


def wait_until(process, condition, *given):
    start = time.time()
    while not condition(*given):
        assert process.poll() is None and time.time() - start < LIMIT, "no moment to stop it"
        time.sleep(0.005)


def kill_when(moment, run, ranks, *arguments, **how):
    """Start a run and kill it when moment(run) has come."""
    process = launch(ranks, *arguments, "--out", run, **how)
    wait_until(process, moment, run)
    process.kill()
    process.communicate()


@dataclass
class Outcome:
    """Everything of a run that must not depend on ranks or restarts."""
    trees: dict         # round -> JSON lines
    weights: dict       # (round, name) -> tensor
    losses: dict        # (round, step) -> float
    accuracy: dict      # round -> float

    @classmethod
    def of(cls, folder):
        trees, weights = {}, {}
        for r in 1, 2:
            grown = []
            for path in (folder / f"round{r}").glob("trees.rank*.jsonl"):
                grown += [tree.to_json() for tree in mcts.read_trees(path)]
            trees[r] = sorted(grown)
            model = folder / f"round{r}" / "model" / "model.safetensors"
            if model.exists():
                weights |= {(r, name): weight for name, weight in load_file(model).items()}
        losses, accuracy = {}, {}
        for event in tiny.read(folder / "log.jsonl"):
            if event["event"] == "train":
                losses[event["round"], event["step"]] = event["loss"]
            if event["event"].startswith("eval-"):
                accuracy[event["round"]] = event["accuracy"]
        return cls(trees, weights, losses, accuracy)

    def structure(self):
        """Of the trees only what more than one rank leaves equal to the last digit."""
        names = "parent", "tokens", "visits", "value", "reward"
        found = []
        for r, lines in self.trees.items():
            for line in lines:
                for node in json.loads(line)["nodes"]:
                    found.append([r, *(node[name] for name in names)])
        return found

    def expect_about(self, other, error):
        """Equal in trees and accuracy, and but for an error in losses and weights."""
        assert self.weights
        assert self.structure() == other.structure()
        assert self.accuracy == other.accuracy
        assert self.losses == about(other.losses, rel=error)
        assert self.weights.keys() == other.weights.keys()
        for name, weight in self.weights.items():
            assert (weight - other.weights[name]).norm() <= error * weight.norm(), name

    def expect_equal(self, other):
        """To the last digit: one process, float64."""
        assert self.weights
        assert self.trees == other.trees
        assert self.losses == other.losses
        assert self.accuracy == other.accuracy
        assert self.weights.keys() == other.weights.keys()
        for name, weight in self.weights.items():
            assert (weight == other.weights[name]).all(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory, inputs):
    """alone(): the outcome of the run of one process, neither sharded nor interrupted, when it has ended."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    process = launch(0, *inputs, *SETTINGS, "--out", folder)

    @functools.cache
    def outcome():
        finish(process)
        found = Outcome.of(folder)
        assert len(found.trees[1]) == len(found.trees[2]) == 3
        for by_round in found.weights, found.losses:
            assert {r for r, _ in by_round} == {1, 2}
        return found

    return outcome


@pytest.mark.parametrize("ranks, how", [
    (2, ["--shard-search", "--activation-checkpointing"]),
    (4, [])], ids=str)
def test_ranks_do_not_change_the_run(ranks, how, tmp_path, inputs, alone):
    """Same trees, losses and weights, with 3 questions for 2 or 4 ranks, so that one of 4 has nothing to
    search and to evaluate; weights sharded during search or resident."""
    run = tmp_path / "run"
    finish(launch(ranks, *inputs, *SETTINGS, *how, "--out", run))
    Outcome.of(run).expect_about(alone(), error=1e-6)
    files = list((run / "round1").glob("trees.rank*.jsonl"))
    assert len(files) == ranks


def searched(run):
    return (run / "round1" / "search.json").exists()


def test_two_machines_do_not_change_the_run(tmp_path, inputs, alone):
    """One rank on each, in a working folder of its own, with a run folder that both see; killed once."""
    run = tmp_path / "run"
    machines = [tmp_path / "one", tmp_path / "other"]
    for folder in machines:
        folder.mkdir()
    kill_when(searched, run, 2, *inputs, *SETTINGS, nodes=machines)
    finish(launch(2, *inputs, *SETTINGS, "--out", run, nodes=machines))
    Outcome.of(run).expect_about(alone(), error=1e-6)
    for folder in machines:
        assert not any(folder.iterdir())                            # nothing is written elsewhere


@pytest.fixture(scope="module")
def given(tmp_path_factory, inputs):
    """Arguments to train on 5 trees, packs of very different sizes, and one that cannot be trained on, in 4
    optimiser steps of 3 or 2 questions."""
    folder = tmp_path_factory.mktemp("given")
    settings = dict(iterations=20, breadth=8, slots=2)
    solvable = ["Add 3 to 4." + " So double it." * n for n in (1, 2, 4, 12, 40)]
    trees = tiny.search(tiny.model(), solvable, **settings)
    trees += tiny.search(tiny.model(), ["Add 3 to 4."], answer="none", **settings)
    tiny.write_trees(folder / "trees.jsonl", trees)
    return [*inputs[:2], "--trees", folder / "trees.jsonl", "--eval-data", "--lr", 1e-4, "--epochs", 2,
            "--questions-per-step", 3, "--micro-tokens", 300]


@pytest.mark.parametrize("flags, dtype, error, ranks", [
    ([], "float32", 1e-5, 4),
    (["--objective", "kto"], "float64", 1e-6, 2),
    (["--objective", "oreo"], "float64", 1e-6, 2),
    (["--objective", "grpo"], "float64", 1e-6, 2),
    (["--targets", "value-model"], "float64", 1e-6, 2)], ids=str)
def test_ranks_do_not_change_a_training(flags, dtype, error, ranks, given, tmp_path, monkeypatch):
    """In float32; KTO's reference point over all ranks; a sharded critic, for OREO and as a value model."""
    arguments = [*given, *flags, "--value-lr", 1e-2, "--dtype", dtype, "--out"]
    many = launch(ranks, *arguments, tmp_path / "many")
    tiny.run(dvo.main, monkeypatch, *arguments, tmp_path / "one")
    finish(many)
    one = Outcome.of(tmp_path / "one")
    assert len(one.losses) == 4
    Outcome.of(tmp_path / "many").expect_about(one, error)


SHAPED_TEMPLATE = ("{% for m in messages %}<|turn|>{{ m.role + '\n\n' + m.content }}<|end|>{% endfor %}"
                   "<|turn|>assistant\n\n")


def start_shaped():
    """torchrun and its folder. The model is Llama-3-8B but for depth and width, random: 128,256 entries,
    grouped keys, two EOS, a chat template, bfloat16."""
    home = tempfile.TemporaryDirectory()
    folder = Path(home.name)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = SHAPED_TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    likely = tiny.CHANCES | {" 7": 99, "Final Answer:": 20}
    lm = tiny.model(vocab_size=128256, max_position_embeddings=2048, chances=likely)
    lm.save_pretrained(folder / "model")
    data = folder / "data.jsonl"
    write_questions(data, [f"Add {i} to 4." for i in range(3)])
    arguments = ["--model", folder / "model", "--data", data, "--eval-data", data, "--out", folder / "run",
                 "--dtype", "bfloat16", "--bootstrap-samples", 6, "--rounds", 1, "--iterations", 8,
                 "--max-step-tokens", 12, "--max-new-tokens", 16, "--trials", 1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "dvo.py", *map(str, arguments)]
    with open(folder / "said", "w") as said:
        return subprocess.Popen(command, stdout=said, stderr=said), home


@starts_early(start_shaped)
def test_a_model_shaped_like_the_papers_goes_from_end_to_end(started):
    """Bootstrapping, search, training and evaluation on two ranks. The model loads again."""
    process, home = started
    status = process.wait(timeout=LIMIT)
    run = Path(home.name) / "run"
    said = (run.parent / "said").read_text()
    assert status == 0, said[-9000:]
    assert "round 1" in said
    events = [entry["event"] for entry in tiny.read(run / "log.jsonl")]
    stages = [event for event in events if event not in ("train", "imitate")]
    assert stages == ["bootstrap", "eval-data", "search", "trained", "eval-data"]
    assert events.count("train") > 1
    folder = run / "round1" / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == 128256
    assert config["dtype"] == "bfloat16"
    lm, again = mcts.load_model(folder, "cpu", "bfloat16")
    assert len(lm.generation_config.eos_token_id) == 2
    assert again.chat_template == SHAPED_TEMPLATE
    [[sample]] = mcts.sample(lm, again, ["Add 3 to 4."], max_new_tokens=4)
    assert sample.tokens


LATE = """
import datetime, time, torch.distributed as dist
import dvo
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=3))
time.sleep(5 * dist.get_rank())
dvo.wait_for_ranks("search", patience=1)
time.sleep(4 * (1 - dist.get_rank()))
dvo.wait_for_ranks("search")
print("met")
"""


def start_late():
    home = tempfile.TemporaryDirectory()
    script = Path(home.name) / "late.py"
    script.write_text(LATE)
    return launch(2, script=script), home


@starts_early(start_late)
def test_the_end_of_a_search_outlives_the_time_limit_of_the_group(started):
    """A rank that comes 5 seconds late to a group with a limit of 3 is waited for, and named."""
    process, _ = started
    out, err = finish(process)
    assert out.count("met") == 2
    assert "search: still waiting for rank 1" in err


STUCK = """
import sys, time, torch.distributed as dist
dist.init_process_group("gloo")

def asleep():
    open(sys.argv[1], "w")
    time.sleep(100)

asleep() if dist.get_rank() else dist.barrier()
"""


def test_a_hang_shows_where_every_rank_stands(tmp_path):
    script, now = tmp_path / "stuck.py", tmp_path / "now"
    script.write_text(STUCK)
    process = launch(2, now, script=script)
    wait_until(process, now.exists)
    with pytest.raises(pytest.fail.Exception, match="(?s)hang.*Fatal Python error.*Fatal") as failure:
        finish(process, limit=1)
    assert "in barrier" in str(failure.value)
    assert "in asleep" in str(failure.value)


# ---------------------------------------------------------------- restarts


def searching(run):
    trees = run / "round1" / "trees.rank0.jsonl"
    return trees.exists() and trees.stat().st_size > 0


def training(run):
    return (run / "round1" / "state").exists()


def saving(run):
    return (run / "round2" / "state.new").exists()


def test_a_killed_run_ends_like_any_other(tmp_path, inputs, alone):
    """SIGKILL in the search, in training and while saving: the same command finishes the run, bit for bit."""
    run = tmp_path / "run"
    for moment in searching, training, saving:
        kill_when(moment, run, 0, *inputs, *SETTINGS)
    finish(launch(0, *inputs, *SETTINGS, "--out", run))
    Outcome.of(run).expect_equal(alone())
    assert not any(run.rglob("*.new"))                              # nothing half-written is left


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, inputs, alone):
    run = tmp_path / "run"
    kill_when(training, run, 2, *inputs, *SETTINGS)
    finish(launch(0, *inputs, *SETTINGS, "--out", run))
    Outcome.of(run).expect_about(alone(), error=1e-6)


def last_line(text):
    return text.strip().splitlines()[-1]


def test_a_full_disk_loses_nothing(tmp_path, inputs, alone):
    """Writing fails within a file of trees, then within a state: one sentence each; the run goes on later."""
    run = tmp_path / "run"
    for limit, file in (3_000, "trees.rank0.jsonl"), (200_000, "state"):    # bytes that a file may have
        done = launch(0, *inputs, *SETTINGS, "--out", run, largest_file=limit)
        done.communicate(timeout=LIMIT)
        assert done.returncode == 2, done.stderr[-2000:]
        assert file in last_line(done.stderr)
        assert "goes on" in last_line(done.stderr)
        assert "Traceback" not in done.stderr
    finish(launch(0, *inputs, *SETTINGS, "--out", run))
    Outcome.of(run).expect_equal(alone())


# ---------------------------------------------------------------- kills at random moments, on demand


def phase(run):
    """What a run was doing when it was killed, from the files that it left."""
    half = [str(path.relative_to(run)) for path in run.rglob("*.new")]
    if half:
        return f"writing {half[0]}"
    if not (run / "config.json").exists():
        return "starting"
    where = max(run.glob("round?"), default=run / "round1")
    files = {path.name for path in where.glob("*")}
    if "trained.json" in files:
        done = any(name.startswith("eval-") for name in files)
        return f"{where.name}: " + ("evaluated" if done else "evaluating")
    if "search.json" in files:
        return f"{where.name}: " + ("between state and model" if "state" in files else "training")
    trees = where / "trees.rank0.jsonl"
    text = trees.read_text() if trees.exists() else ""
    torn = text and not text.endswith("\n")
    return f"{where.name}: {text.count(chr(10))} trees" + (", torn" if torn else "")


def kill(times, folder):
    """Kill `times` runs at random moments, print what each was doing, and start each again: it must end equal
    to the undisturbed one, with the trees that it had when it was killed."""
    longer = ["--questions-per-round", 7, "--iterations", 150, "--depth", 8, "--epochs", 30]
    arguments = [*make_inputs(folder), *SETTINGS, *longer, "--out"]
    begin = time.time()
    finish(launch(0, *arguments, folder / "alone"))
    whole = time.time() - begin
    alone = Outcome.of(folder / "alone")
    draw = random.Random(0)
    print(f"undisturbed: {whole:.1f} s\nkill  second  what it was doing", flush=True)
    for number in range(1, times + 1):
        run = folder / f"run{number}"
        limit = draw.uniform(0, whole)
        process = launch(0, *arguments, run)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=limit)
        process.kill()
        process.communicate()
        print(f"{number:4}{limit:8.1f}  {phase(run)}", flush=True)
        trees = {path: path.read_text() for path in run.glob("round*/trees*")}
        finish(launch(0, *arguments, run))
        Outcome.of(run).expect_equal(alone)
        for path, text in trees.items():
            whole_lines = text[:text.rfind("\n") + 1]               # but for a line that was torn
            assert path.read_text().startswith(whole_lines)
        assert not any(run.rglob("*.new"))
        assert not any(run.rglob("*.old"))
    print("each ended equal to the undisturbed run: no tree searched twice, nothing left over")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill(args.kills, Path(folder))
