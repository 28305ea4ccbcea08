# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""real.py: its commands are ones that the project understands, and its statistics are right."""
import argparse
import json
import sys
from pathlib import Path

import pytest

import tiny  # noqa: F401 - first: it puts the project on sys.path
import dvo
import eval as tasks
import mcts
import real

MAINS = {"dvo.py": dvo.main, "mcts.py": mcts.main, "eval.py": tasks.main}


class Understood(Exception):
    """The command was parsed, and would begin."""


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(model="M", train="TRAIN", test="TEST", out=tmp_path, dtype="bfloat16", device=None)


def test_every_stage_is_a_command_that_the_project_understands(args, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def understand(parser, *given):
        parse(parser, *given)
        raise Understood

    commands = []
    monkeypatch.setattr(real, "run", commands.append)
    monkeypatch.setattr(real, "write_questions", lambda *of: None)
    for name, work in real.stages(args):
        if not name.startswith("fit-"):
            work()
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", understand)
    for _, script, *flags in commands:
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with pytest.raises(Understood):
            MAINS[Path(script).name]()
    assert len(commands) == 5 + 2 * len(real.METHODS) + 3


def test_searched_and_held_out_questions_are_disjoint(args, tmp_path):
    args.train = tmp_path / "train.jsonl"
    rows = [json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(500)]
    args.train.write_text("".join(rows))
    parts = []
    for name, part in real.SEARCHED.items():
        real.write_questions(args, part, tmp_path / name)
        parts.append({problem["question"] for problem in tasks.load_problems(tmp_path / name)})
    assert [len(part) for part in parts] == [100, 20, 100]
    assert len(set.union(*parts)) == 220


def test_an_interval_holds_the_mean_and_shrinks_with_the_spread():
    assert real.interval([1, 1, 1]) == [1, 1, 1]
    mean, low, high = real.interval([0, 1] * 50)
    assert mean == 0.5
    assert 0.5 - low == pytest.approx(1.96 * 0.05, abs=0.01)       # of the mean of 100, spread 0.5
    assert high - 0.5 == pytest.approx(1.96 * 0.05, abs=0.01)


def test_a_difference_is_paired_by_question():
    one = {"a": 1.0, "b": 0.5, "only here": 0.0}
    other = {"a": 0.5, "b": 0.0}
    assert real.difference(one, other) == [0.5, 0.5, 0.5]


def test_the_report_reads_what_the_stages_leave(args, tmp_path, capsys):
    for name, right in ("base", False), ("dvo", True):
        text = f"Final Answer: {2 if right else 3}"
        response = {"response": text, "correct": False, "answered": True, "tokens": 320 if right else 10}
        record = {"question": "1 + 1?", "answer": "2", "responses": [response]}
        (tmp_path / f"eval-{name}.jsonl").write_text(json.dumps(record) + "\n")
    args.report = tmp_path / "real.json"
    real.report(args)
    found = json.loads(args.report.read_text())["methods"]
    assert found["dvo"]["accuracy"] == [1, 1, 1]
    assert found["dvo"]["minus base"] == [1, 1, 1]
    assert found["dvo"]["cut"] == 1
    assert "| dvo | 100.0 [100.0, 100.0] |" in capsys.readouterr().out
