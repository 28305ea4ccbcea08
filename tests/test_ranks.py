# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Many ranks and restarts, on the CPU with gloo: 1, 2 and 4 ranks give the same run, as does a killed one.

    python -m pytest -q tests/test_ranks.py
    python tests/test_ranks.py --kills 20       # minutes: SIGKILL at random moments, then the same command
"""
import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tiny
import dvo
import eval as tasks
import mcts
from launch import ROOT, Command

SETTINGS = ["--no-bootstrap", "--rounds", 2, "--questions-per-round", 3,
            "--iterations", 14, "--breadth", 5, "--depth", 4, "--max-step-tokens", 12, "--slots", 4,
            "--lr", 1e-3, "--epochs", 2, "--questions-per-step", 3, "--micro-tokens", 300,
            "--max-new-tokens", 24, "--trials", 2, "--dtype", "float64", "--save-minutes", 0]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def make_inputs(folder):
    """A model folder, and three questions more than four ranks can share evenly."""
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    questions = [f"Add {i} to {i + 1}." + " So double it." * (i % 4) for i in range(7)]
    lines = [json.dumps({"question": q, "answer": "7"}) + "\n" for q in questions]
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    train.write_text("".join(lines))
    test.write_text("".join(lines[:3]))
    return ["--model", folder / "model", "--data", train, "--eval-data", test]


def launch(ranks, *arguments, **how):
    """Start dvo.py in one process (ranks = 0), or as ranks of a group."""
    return Command(*arguments, ranks=ranks, **how)


def finish(process, limit=150):
    """Wait; a hang is a failure that shows where every rank stood."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)         # each prints its stack
        pytest.fail("hang: " + process.communicate()[1][-9000:])
    assert process.returncode == 0, err[-9000:]
    return out, err


def wait_until(process, condition, limit=100):
    start = time.time()
    while not condition():
        assert process.poll() is None and time.time() - start < limit, "no moment to stop it"
        time.sleep(0.005)


def outcome(folder):
    """Everything of a run that must not depend on ranks or restarts: trees, weights, losses, accuracies."""
    rounds = [r for r in (1, 2) if (folder / f"round{r}" / "model").exists()]
    trees = {r: sorted(tree.to_json() for path in (folder / f"round{r}").glob("trees.rank*.jsonl")
                       for tree in mcts.read_trees(path)) for r in rounds}
    weights = {r: load_file(folder / f"round{r}" / "model" / "model.safetensors") for r in rounds}
    events = [json.loads(line) for line in open(folder / "log.jsonl")]
    losses = {(e["round"], e["step"]): e["loss"] for e in events if e["event"] == "train"}
    accuracy = {e["round"]: e["accuracy"] for e in events if e["event"].startswith("eval-")}
    return trees, weights, losses, accuracy


def tokens(trees):
    """Of `outcome`'s trees only what more than one rank leaves equal to the last digit."""
    names = "parent", "tokens", "visits", "value", "reward"
    return {r: [[[node[name] for name in names] for node in json.loads(line)["nodes"]] for line in lines]
            for r, lines in trees.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, inputs):
    """The run of one process, neither sharded nor interrupted."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(launch(0, *inputs, *SETTINGS, "--out", folder))
    return outcome(folder)


@pytest.mark.parametrize("ranks, how", [(2, ["--shard-search", "--activation-checkpointing"]), (4, [])],
                         ids=str)
def test_ranks_do_not_change_the_run(ranks, how, tmp_path, inputs, alone):
    """Same trees, losses and weights, with 3 questions for 2 or 4 ranks, so that one of 4 has nothing to
    search and to evaluate; weights sharded during search or resident."""
    finish(launch(ranks, *inputs, *SETTINGS, *how, "--out", tmp_path / "run"))
    trees, weights, losses, accuracy = outcome(tmp_path / "run")
    assert tokens(trees) == tokens(alone[0])
    assert losses == pytest.approx(alone[2], rel=1e-6)
    for r in weights:
        assert weights[r].keys() == alone[1][r].keys()
        for name, weight in weights[r].items():
            assert (weight - alone[1][r][name]).norm() <= 1e-6 * weight.norm(), name
    assert accuracy == alone[3]
    assert len(list((tmp_path / "run" / "round1").glob("trees.rank*.jsonl"))) == ranks


def test_two_machines_do_not_change_the_run(tmp_path, inputs, alone):
    """One rank on each, in a working folder of its own, with a run folder that both see; killed once."""
    run = tmp_path / "run"
    where = [tmp_path / "one", tmp_path / "other"]
    for folder in where:
        folder.mkdir()
    process = launch(2, *inputs, *SETTINGS, "--out", run, nodes=where)
    wait_until(process, lambda: (run / "round1" / "search.json").exists())
    process.kill()
    process.communicate()
    finish(launch(2, *inputs, *SETTINGS, "--out", run, nodes=where))
    trees, weights, losses, accuracy = outcome(run)
    assert tokens(trees) == tokens(alone[0]) and accuracy == alone[3]
    assert losses == pytest.approx(alone[2], rel=1e-6)
    assert not [*where[0].iterdir(), *where[1].iterdir()]           # nothing is written elsewhere


@pytest.fixture(scope="module")
def given(tmp_path_factory, inputs):
    """A run on given trees in float32: of 5 that can be trained on, packs of very different sizes, and of one
    that cannot; 6 optimiser steps of 3 or 2 questions. And the run of one process."""
    folder = tmp_path_factory.mktemp("given")
    problems = [{"question": "Add 3 to 4." + " So double it." * n, "answer": "7" if n else "none"}
                for n in (0, 1, 2, 4, 12, 40)]
    with open(folder / "trees.jsonl", "w") as out:
        for tree in mcts.search(tiny.model(), tiny.tokenizer(), problems, tasks.reward, iterations=20, breadth=8,
                                slots=2, max_step_tokens=12):
            out.write(tree.to_json() + "\n")
    arguments = [*inputs[:2], "--trees", folder / "trees.jsonl", "--eval-data", "--lr", 1e-4,
                 "--epochs", 3, "--questions-per-step", 3, "--micro-tokens", 300, "--dtype", "float32"]
    finish(launch(0, *arguments, "--out", folder / "run"))
    return arguments, outcome(folder / "run")


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_do_not_change_training_in_float32(ranks, given, tmp_path):
    arguments, alone = given
    finish(launch(ranks, *arguments, "--out", tmp_path / "run"))
    _, weights, losses, _ = outcome(tmp_path / "run")
    assert len(losses) == 6 and losses == pytest.approx(alone[2], rel=1e-5)
    for name, weight in weights[1].items():
        assert (weight - alone[1][1][name]).norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize("flag, value", [
    ("--objective", "kto"), ("--objective", "oreo"), ("--objective", "grpo"), ("--targets", "value-model")])
def test_ranks_do_not_change_what_needs_more_than_log_probs(flag, value, given, tmp_path, monkeypatch):
    """KTO's reference point over all ranks; a sharded critic, for OREO and as a value model."""
    arguments = [*given[0][:-2], flag, value, "--value-lr", 1e-2, "--dtype", "float64"]
    monkeypatch.setattr(sys, "argv", ["dvo.py", *map(str, arguments), "--out", str(tmp_path / "one")])
    dvo.main()
    finish(launch(2, *arguments, "--out", tmp_path / "two"))
    (_, one, losses, _), (_, two, again, _) = (outcome(tmp_path / name) for name in ("one", "two"))
    assert len(losses) == 6 and again == pytest.approx(losses, rel=1e-6)
    assert all((weight - one[1][name]).norm() <= 1e-6 * weight.norm() for name, weight in two[1].items())


def test_a_model_shaped_like_the_papers_goes_from_end_to_end(tmp_path):
    """Llama-3-8B but for depth and width, random: 128,256 entries, grouped keys, two EOS, a chat template,
    bfloat16; bootstrapping, search, training and evaluation on two ranks. The model loads again."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}<|turn|>{{ m.role + '\n\n' + m.content }}<|end|>"
                               "{% endfor %}<|turn|>assistant\n\n")
    tokenizer.save_pretrained(tmp_path / "model")
    lm = tiny.model(vocab_size=128256, max_position_embeddings=2048,
                    chances=tiny.CHANCES | {" 7": 99, "Final Answer:": 20})
    lm.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"question": f"Add {i} to 4.", "answer": "7"}) + "\n" for i in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, ROOT / "dvo.py", *map(str, (
        "--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--eval-data",
        tmp_path / "data.jsonl", "--dtype", "bfloat16", "--bootstrap-samples", 8, "--rounds", 1,
        "--iterations", 20, "--max-step-tokens", 12, "--max-new-tokens", 24, "--trials", 1, "--out",
        tmp_path / "run"))], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-9000:]
    events = [json.loads(line)["event"] for line in open(tmp_path / "run" / "log.jsonl")]
    assert [e for e in events if e not in ("train", "imitate")] == ["bootstrap", "eval-data", "search", "trained",
                                                                    "eval-data"]
    assert events.count("train") > 1 and "round 1" in done.stdout
    folder = tmp_path / "run" / "round1" / "model"
    lm, again = mcts.load_model(folder, "cpu", "bfloat16")
    assert len(lm.generation_config.eos_token_id) == 2 and again.chat_template == tokenizer.chat_template
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["dtype"]) == (128256, "bfloat16")
    assert mcts.sample(lm, again, ["Add 3 to 4."], max_new_tokens=4)[0][0].tokens


def test_the_end_of_a_search_outlives_the_time_limit_of_the_group(tmp_path):
    """A rank that comes 5 seconds late to a group with a limit of 3 is waited for, and named."""
    script = tmp_path / "late.py"
    script.write_text("import datetime, sys, time, torch.distributed as dist\nimport dvo\n"
                      "dist.init_process_group('gloo', timeout=datetime.timedelta(seconds=3))\n"
                      "time.sleep(5 * dist.get_rank())\n"
                      "dvo.wait_for_ranks('search', patience=1)\n"
                      "time.sleep(4 * (1 - dist.get_rank()))\ndvo.wait_for_ranks('search')\nprint('met')\n")
    out, err = finish(launch(2, script=script))
    assert out.count("met") == 2 and "search: still waiting for rank 1" in err


def test_a_hang_shows_where_every_rank_stands(tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text("import sys, time, torch.distributed as dist\ndist.init_process_group('gloo')\n"
                      "def asleep():\n    open(sys.argv[1], 'w')\n    time.sleep(100)\n"
                      "asleep() if dist.get_rank() else dist.barrier()\n")
    process = launch(2, tmp_path / "now", script=script)
    wait_until(process, (tmp_path / "now").exists)
    with pytest.raises(pytest.fail.Exception, match="(?s)hang.*Fatal Python error.*Fatal") as failure:
        finish(process, limit=1)
    assert "in barrier" in str(failure.value) and "in asleep" in str(failure.value)


# ---------------------------------------------------------------- restarts


def same(folder, alone):
    trees, weights, losses, accuracy = outcome(folder)
    assert trees == alone[0]                                        # to the last digit: one process, float64
    for r in weights:
        assert all((weight == alone[1][r][name]).all() for name, weight in weights[r].items())
    assert losses == alone[2] and accuracy == alone[3]


MOMENTS = {"in the search": lambda run: (run / "round1" / "trees.rank0.jsonl").exists()
           and (run / "round1" / "trees.rank0.jsonl").stat().st_size > 0,
           "in training": lambda run: (run / "round1" / "state").exists(),
           "while saving": lambda run: (run / "round2" / "state.new").exists()}


def test_a_killed_run_ends_like_any_other(tmp_path, inputs, alone):
    """SIGKILL in the search, in training and while saving: the same command finishes the run, bit for bit."""
    run = tmp_path / "run"
    for name, moment in MOMENTS.items():
        process = launch(0, *inputs, *SETTINGS, "--out", run)
        wait_until(process, lambda: moment(run))
        process.kill()
        process.communicate()
    _, err = finish(launch(0, *inputs, *SETTINGS, "--out", run))
    same(run, alone)
    assert not list(run.rglob("*.new"))                             # nothing half-written is left


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, inputs, alone):
    run = tmp_path / "run"
    process = launch(2, *inputs, *SETTINGS, "--out", run)
    wait_until(process, lambda: (run / "round1" / "state").exists())
    process.kill()
    process.communicate()
    finish(launch(0, *inputs, *SETTINGS, "--out", run))
    assert tokens(outcome(run)[0]) == tokens(alone[0])


def test_a_full_disk_loses_nothing(tmp_path, inputs, alone):
    """Writing fails within a file of trees, then within a state: one sentence each; the run goes on later."""
    run = tmp_path / "run"
    for limit in 3_000, 20_000:                                     # bytes that a file may have
        done = launch(0, *inputs, *SETTINGS, "--out", run, largest_file=limit)
        done.communicate(timeout=100)
        assert done.returncode == 2, done.stderr[-2000:]
        assert "goes on" in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr
    finish(launch(0, *inputs, *SETTINGS, "--out", run))
    same(run, alone)


# ---------------------------------------------------------------- kills at random moments, on demand


def phase(run):
    """What a run was doing when it was killed, from the files that it left."""
    half = [str(path.relative_to(run)) for path in run.rglob("*.new")]
    if half or not (run / "config.json").exists():
        return f"writing {half[0]}" if half else "starting"
    where = max((path for path in run.glob("round?")), default=run / "round1")
    files = {path.name for path in where.glob("*")}
    if "trained.json" in files:
        done = any(name.startswith("eval-") for name in files)
        return f"{where.name}: " + ("evaluated" if done else "evaluating")
    trees = where / "trees.rank0.jsonl"
    if "search.json" in files:
        return f"{where.name}: " + ("between state and model" if "state" in files else "training")
    torn = trees.exists() and not trees.read_bytes().endswith(b"\n")
    found = trees.read_text().count("\n") if trees.exists() else 0
    return f"{where.name}: {found} trees" + ", torn" * torn


def kill(times, folder):
    """Kill `times` runs at random moments, print what each was doing, and start each again: it must end equal
    to the undisturbed one, with the trees that it had when it was killed."""
    more = ["--questions-per-round", 7, "--iterations", 150, "--depth", 8, "--epochs", 30]
    arguments = [*make_inputs(folder), *SETTINGS, *more]
    begin = time.time()
    finish(launch(0, *arguments, "--out", folder / "alone"))
    alone, whole, draw = outcome(folder / "alone"), time.time() - begin, random.Random(0)
    print(f"undisturbed: {whole:.1f} s\nkill  second  what it was doing", flush=True)
    for number in range(1, times + 1):
        run, limit = folder / f"run{number}", draw.uniform(0, whole)
        process = launch(0, *arguments, "--out", run)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=limit)
        process.kill()
        process.communicate()
        print(f"{number:4}{limit:8.1f}  {phase(run)}", flush=True)
        trees = {path: path.read_text() for path in run.glob("round*/trees*")}
        finish(launch(0, *arguments, "--out", run))
        same(run, alone)
        for path, text in trees.items():                            # but for a line that was torn
            assert path.read_text().startswith(text[:text.rfind("\n") + 1])
        assert not list(run.rglob("*.new")) + list(run.rglob("*.old"))
    print("each ended equal to the undisturbed run: no tree searched twice, nothing left over")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, required=True)
    with tempfile.TemporaryDirectory() as folder:
        kill(parser.parse_args().kills, Path(folder))
