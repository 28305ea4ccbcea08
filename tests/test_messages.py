# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Whatever goes wrong, a command says it in one sentence: what, where, what to do. Nothing finished is lost.

A row of the tables below is a command: scripts, what to add to their usual arguments, words of the sentence.
Words in capitals are files and folders, which `files` makes. python -m pytest -q tests/test_messages.py
"""
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import dvo
import eval as tasks
import launch
import mcts
from launch import Command

ALL = "dvo mcts eval"
TRAIN = "--trees TREES --eval-data --slots 4"                       # no search, no evaluation
EXPORT = "- --export sft --trees TREES --model MODEL --out OUT"
USUAL = {
    "dvo": "--model MODEL --data DATA --eval-data TEST --trials 1 --max-new-tokens 8 --no-bootstrap "
           "--rounds 1 --iterations 3 --breadth 3 --max-step-tokens 12 --epochs 1 --out OUT",
    "mcts": "--model MODEL --data DATA --out OUT --iterations 3 --max-step-tokens 8",
    "eval": "--model MODEL --data DATA --out OUT --trials 1 --max-new-tokens 8",
}
MAINS = {"dvo": dvo.main, "mcts": mcts.main, "eval": tasks.main}
QUESTION = {"question": "Add 3 to 4.", "answer": "7"}


def rows(*questions):
    return "".join(json.dumps(QUESTION | {"question": question}) + "\n" for question in questions)


TEXTS = {
    "DATA": rows("Add 3 to 4.", "Add 2 to 5."),
    "TEST": rows("Add 1 to 6."),
    "EMPTY": "",
    "BROKEN": rows("Add 3 to 4.") + "not json\n",
    "NO_ANSWER": '{"question": "Add 1."}\n',
    "BLANK": '{"question": " ", "answer": "1"}\n',
    "NO_RESPONSES": '{"question": "Which?", "answer": "B", "responses": [null]}\n',
    "OPTIONS": '{"question": "Which?", "options": ["a", "b"], "answer": "B"}\n',
    "SOLUTION": '{"question": "1 + 1?", "answer": "The answer is 2."}\n',
    "EMOJI": rows("Add 3 \ud83d to 4."),
    "LONG": rows("Add 3. " * 999),
    "FILE": "A file.\n",
    "FOLDER/file": "A file.\n",
    "RUN/config.json": '{"objective": "dvo"}\n',
    "RUN/round1/trained.json": "{}\n",
    "GONE/config.json": "{",
    "GONE/round1/trained.json": "{}\n",
    "GONE/log.jsonl": "",
}


def spoil_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_weights(folder, change):
    path = folder / "model.safetensors"
    kept = {change(name): tensor for name, tensor in load_file(path).items() if change(name)}
    save_file(kept, path, metadata={"format": "pt"})


def point(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")


def add_tokens(folder):
    tok = tiny.tokenizer()
    tok.add_tokens([f"<{i}>" for i in range(9)])
    tok.save_pretrained(folder)


def raise_in_template(folder):
    tok = tiny.tokenizer()
    tok.chat_template = "{{ raise_exception('no turns at all') }}"
    tok.save_pretrained(folder)


def put_nan(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"].fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})


def bin_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGE = {                                                          # of a model: what, words
    "torn": (lambda f: os.truncate(f / "model.safetensors", 9000), "a file is torn"),
    "pointer": (lambda f: point(f / "model.safetensors"), "git-lfs pointer"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "none in the form of safetensors"),
    "other form": (bin_only, "none in the form of safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "there is no config.json"),
    "config is a pointer": (lambda f: point(f / "config.json"), "not a valid JSON"),
    "config of nothing": (lambda f: (f / "config.json").write_text("{}"), "or it names no type of model"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "its files are missing"),
    "tokenizer is a pointer": (lambda f: point(f / "tokenizer.json"), "git-lfs pointer"),
    "quantised": (lambda f: spoil_config(f, quantization_config={"quant_method": "fp8"}), "is quantised"),
    "other size": (lambda f: spoil_config(f, vocab_size=500), "other sizes than config.json says"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "prefix": (lambda f: spoil_weights(f, lambda name: "_orig_mod." + name), "lacks 21 weights"),
    "no head": (lambda f: spoil_weights(f, lambda name: "" if "head" in name else name), "lacks 1 weights"),
    "more tokens": (add_tokens, "has a token 373, but the model embeds only 370"),
    "own code": (lambda f: spoil_config(f, model_type="m", auto_map={"AutoConfig": "m.M"}), "never run"),
    "template that raises": (raise_in_template, "chat template (no turns at all)"),
    "NaN": (put_nan, "NaN"),
    "tied": (lambda f: spoil_config(f, tie_word_embeddings=True), "weights have both"),
    "torn ends": (lambda f: (f / "generation_config.json").write_text('{"eos'), "the generation config of"),
}


@pytest.fixture(scope="module")
def files():
    """A folder that anybody may read, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for file, text in TEXTS.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        (folder / "BINARY").write_bytes(b"\xff\xfe\x00")
        (folder / "CLOSED").mkdir(mode=0o555)
        lm, tok = tiny.model(), tiny.tokenizer()
        lm.save_pretrained(folder / "MODEL")
        tok.save_pretrained(folder / "MODEL")
        problems = tasks.load_problems(folder / "DATA")
        found = mcts.search(lm, tok, problems, tasks.reward, iterations=20, max_step_tokens=12)
        tiny.write_trees(folder / "TREES", found)
        trees = (folder / "TREES").read_text()
        (folder / "FOREIGN").write_text(trees.replace('"tokenizer": "', '"tokenizer": "x'))
        (folder / "TORN").write_text(trees[:-99] + "\n")
        record = QUESTION | {"responses": [{"response": "7", "correct": True, "answered": True, "tokens": 1}]}
        (folder / "RESPONSES").write_text(json.dumps(record) + "\n")
        for name, (spoil, _) in DAMAGE.items():
            name = name.replace(" ", "_")
            shutil.copytree(folder / "MODEL", folder / name)
            spoil(folder / name)
        spoil_run(folder)
        yield folder


def spoil_run(folder):
    """A run that has lost a part of its training state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["dvo.py", *arguments("dvo", f"{TRAIN} --model MODEL --out SPOILT")])
        dvo.main()
    next((folder / "SPOILT" / "round1" / "state").glob("*.distcp")).unlink()
    (folder / "SPOILT" / "round1" / "trained.json").unlink()


@pytest.fixture
def out(files):
    """A name that is not taken."""
    path = files / "OUT"
    yield path
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def arguments(script, more):
    """The usual arguments and `more`; or only what follows a dash."""
    line = more[2:] if more.startswith("- ") else f"{USUAL[script]} {more}"
    return line.split()


def start(files, script, more, **how):
    """A process of its own."""
    return Command(*arguments(script, more), script=f"{script}.py", cwd=files, **how)


@pytest.fixture
def refuse(files, monkeypatch, capsys):
    """Run a command in this process, and return the one line that it says before it ends with status 2."""
    def run(script, more):
        monkeypatch.chdir(files)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments(script, more)])
        with pytest.raises(SystemExit) as end:
            tasks.run_command(MAINS[script])
        told = capsys.readouterr().err
        assert end.value.code == 2 and told.startswith(f"{script}.py") and told.count("\n") == 1, told
        return told

    return run


def finish(command, status):
    command.communicate(timeout=300)
    assert "Traceback" not in command.stderr and "\r" not in command.stderr, command.stderr[-3000:]
    assert command.returncode == status, command.stderr[-3000:]
    return command.stderr


def only_line(told):
    """What a process said: one line, but for the one about a training that is too short, which is true."""
    [line] = [line for line in told.splitlines() if "end within the warmup" not in line]
    return line


def ends(files, script, more, status, *before):
    """The only line of a process, `before` which launch does something."""
    return only_line(finish(start(files, script, more, before=before), status))


def table(*rows):
    """One parameter set a script and row; the names of tests are the rows'."""
    return [pytest.param(script, *row[1:], id=f"{script} {row[1]}"[:90])
            for row in rows for script in row[0].split()]


# In the first part the model is not there: what is told before shows that none was loaded

ARGUMENTS = table(
    ("mcts eval", "--limit 0", "--limit is 0, but must be at least 1"),
    ("mcts eval", "--limit -1", "--limit is -1"),
    ("dvo", "--eval-limit 0", "--eval-limit is 0"),
    ("dvo", "--eval-limit -1", "--eval-limit is -1"),
    ("dvo eval", "--trials 0", "--trials is 0"),
    ("dvo eval", "--temperature -1", "--temperature is -1"),
    ("dvo eval", "--temperature nan", "--temperature is nan"),
    ("dvo eval", "--max-new-tokens 0", "--max-new-tokens is 0"),
    ("dvo mcts", "--breadth 0", "--breadth is 0"),
    ("dvo mcts", "--depth 0", "--depth is 0"),
    ("dvo mcts", "--slots 0", "--slots is 0"),
    ("dvo mcts", "--candidates 2 --breadth 3", "--candidates is 2"),
    ("dvo", "--beta -1", "--beta is -1"),
    ("dvo", "--beta 0", "--beta is 0"),
    ("dvo", "--beta inf", "--beta is inf, but must be finite"),
    ("dvo mcts", "--kv-budget inf", "--kv-budget is inf, but must be finite"),
    ("dvo", "--rounds -1", "--rounds is -1"),
    ("dvo", "--value-lr -1", "--value-lr is -1"),
    ("dvo", "--level response --objective dpo", "--objective dvo only"),
    ("dvo", "--targets value-model --objective kto", "--objective dvo only"),
    ("dvo", "--eval-data a/x.jsonl b/x.jsonl", "have the same name"),
    ("dvo", "- --export dpo", "--export needs --trees"),
    ("dvo", "- --export dpo --trees TREES --out TREES", "is one of --trees"),
    ("dvo", "- --export dpo --trees TREES --out DATA", "DATA holds something else than exported rows"),
    ("dvo", "- --eval-data DATA", "give --model too"),
    ("dvo", "- --export dpo --trees TREES --out OUT", "there is no model beside TREES"),
    ("dvo", "- --data DATA", "give --model too"),
    ("mcts", "- --model M", "give --model, --data and --out"),
    ("mcts", "- --show NOWHERE", "cannot read trees from NOWHERE"),
    ("mcts", "- --show FOLDER", "cannot read trees from FOLDER"),
    ("mcts", "- --show DATA", "DATA, line 1: not a search tree"),
    ("mcts", "- --html TORN", "TORN, line 2: not a search tree"),
    ("mcts", "- --html BINARY", "BINARY, line 1: not a search tree"),
    ("mcts", "--out DATA", "choose another file"),
    ("mcts", "--seed 1 --out TREES", "choose another --out"),
    ("eval", "--out DATA", "holds something else than responses"),
    ("eval", "--out TREES", "holds something else than responses"),
    ("eval", "--out NO_RESPONSES", "holds something else than responses"),
    ("eval", "--out RESPONSES", "of other settings"),
    (ALL, "--device gpu", "cannot use --device gpu (there is no such device)"),
    (ALL, "--device meta", "cannot use --device meta (there is no such device)"),
    (ALL, "--data NOWHERE", "NOWHERE is neither a file nor a task"),
    (ALL, "--data FOLDER", "FOLDER is neither a file nor a task"),
    (ALL, "--data EMPTY", "EMPTY holds no problem"),
    (ALL, "--data BROKEN", "BROKEN, line 2: not JSON"),
    (ALL, "--data BINARY", "BINARY cannot be read as UTF-8 text"),
    (ALL, "--data NO_ANSWER", "NO_ANSWER, line 1: it lacks 'answer'"),
    (ALL, "--data BLANK", "BLANK, line 1: the question or the answer is empty"),
    (ALL, "--data SOLUTION", "SOLUTION, line 1: the answer looks like a solution"),
    (ALL, "--data OPTIONS", "OPTIONS, line 1: its options are apart"),
    ("dvo", "--trees NOWHERE --eval-data", "cannot read trees from NOWHERE"),
    ("dvo", "--eval-data BROKEN", "BROKEN, line 2: not JSON"),
    (ALL, "--out FILE/out", "FILE/out"),
    ("mcts eval", "--out NOWHERE/out", "cannot write to NOWHERE/out"),
    ("mcts eval", "--out FOLDER", "cannot write to FOLDER"),
    ("dvo", "--out FILE", "FILE"),
    ("dvo", "--out FOLDER", "is not empty and holds no run"),
    ("dvo", "--out RUN", "holds a run with other settings"),
    ("dvo", "--out GONE", "cannot read GONE/config.json"),
    (ALL, "", "there is no folder no/such/MODEL"),
)


@pytest.mark.parametrize("script, more, words", ARGUMENTS)
def test_bad_arguments_are_told_before_a_model_is_loaded(script, more, words, refuse, out):
    if not more.startswith("- "):
        more = f"--model no/such/MODEL {more}"
    assert words in refuse(script, more)


@pytest.mark.parametrize("script", ALL.split())
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model(script, damage, refuse, out):
    more = f"--model {damage.replace(' ', '_')}"
    assert DAMAGE[damage][1] in refuse(script, more)


@pytest.mark.parametrize("more, words", [
    (TRAIN.replace("TREES", "DATA"), "DATA, line 1: not a search tree"),
    (TRAIN.replace("TREES", "FOREIGN"), "searched with another tokenizer"),
    (TRAIN.replace("TREES", "NOWHERE"), "cannot read trees from NOWHERE"),
    (f"{TRAIN} --out SPOILT", "cannot read the training state SPOILT/round1/state")])
def test_trees_and_states_that_are_none(more, words, refuse, out):
    assert words in refuse("dvo", more)


RANKS = table(                                                      # of the environment
    (ALL, "0x", "1", "RANK=0x"), (ALL, "3", "1", "RANK=3"), ("eval", "1", "2", "is one process"),
    ("dvo", "0", "2", "cannot join the group of ranks"))


@pytest.mark.parametrize("script, rank, world, words", RANKS)
def test_stray_ranks(script, rank, world, words, refuse, out, monkeypatch):
    monkeypatch.setattr(tasks.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert words in refuse(script, "").replace(f" (rank {rank})", "")


@pytest.mark.parametrize("error, rank, seconds, words", [
    (tasks.InputError("No data."), "0", [], "dvo.py: No data."),
    (tasks.InputError("No data."), "1", [15], "dvo.py (rank 1): No data."),
    (OSError(28, "No space left on device", "a"), "1", [0], "dvo.py (rank 1): a: No space left on device; "),
    (RuntimeError("CUDA out of memory. Tried"), "0", [], "dvo.py: out of memory: lower --slots"),
    (KeyboardInterrupt(), "0", [], "dvo.py: stopped; with --out, the same command goes on from what is finished"),
    (KeyboardInterrupt(), "1", [], "")])
def test_of_ranks_the_first_speaks_for_all(error, rank, seconds, words, monkeypatch, capsys):
    """torchrun ends the others while they wait; a rank's own trouble is told at once."""
    waited = []
    monkeypatch.setattr(tasks.time, "sleep", waited.append)
    monkeypatch.setattr(tasks.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["dvo.py"])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        tasks.run_command(main)
    told = capsys.readouterr().err
    assert end.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert told.startswith(words) and told.count("\n") == bool(words) and waited == seconds


def test_what_nobody_expects_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        tasks.run_command(lambda: 1 / 0)


def test_bad_data_under_torchrun(files, out):
    told = finish(start(files, "dvo", "--data NOWHERE", ranks=2), 2)
    assert only_line(told).startswith("dvo.py: NOWHERE is neither")


@pytest.mark.parametrize("script", ALL.split())
def test_questions_beyond_the_context(script, files, out):
    told = finish(start(files, script, "--data LONG --eval-data" if script == "dvo" else "--data LONG"),
                  2 if script == "dvo" else 0)
    assert "skipped: a prompt of" in told and "tokens does not fit the model's context of 512" in told


@pytest.mark.parametrize("script", ALL.split())
def test_a_device_that_is_not_there(script, refuse, out):
    assert "cannot use --device cuda" in refuse(script, "--device cuda")


@pytest.mark.parametrize("script", ALL.split())
def test_a_folder_that_is_closed(script, files, out):
    told = ends(files, script, "--out CLOSED/out", 2, (launch.obey,))
    assert "CLOSED/out" in told and "Permission denied" in told


@pytest.mark.parametrize("script", ALL.split())
def test_two_on_one_output(script, files, out):
    taken = out
    if script == "dvo":
        finish(start(files, script, "", before=[(launch.at, "dvo.load_policy", launch.stop, 0)]), 130)
        taken = out / "log.jsonl"
    with tasks.open_lines(taken):
        told = ends(files, script, "", 2)
    assert "another process is writing" in told


@pytest.mark.parametrize("script", ALL.split())
def test_ctrl_c_while_libraries_are_imported(script, files, tmp_path):
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt\n")
    command = [sys.executable, launch.ROOT / f"{script}.py", *arguments(script, "")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=files, env=environment, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert only_line(done.stderr).startswith(f"{script}.py: stopped")


def test_a_script_and_what_it_imports_share_one_module(files, out):
    """Else the InputError that mcts.py raises would not be the one that eval.py catches."""
    assert "no/such/MODEL" in only_line(finish(start(files, "eval", "--model no/such/MODEL"), 2))


STAGES = table(
    (ALL, "eval.parse_arguments", ""), (ALL, "eval.load_problems", ""), (ALL, "mcts.load_model", ""),
    (ALL, "mcts.advance", ""), (ALL, "eval.write_line", ""),
    ("eval", "eval.judge", ""),
    ("mcts", "mcts.picture", "- --show TREES"), ("mcts", "mcts.page", "- --html TREES"),
    ("dvo", "dvo.random_model", "- --out OUT"),
    ("dvo", "dvo.imitate_own", "--bootstrap --bootstrap-samples 2"),
    ("dvo", "dvo.accumulate", TRAIN),
    ("dvo", "dvo.save_model", TRAIN), ("dvo", "dvo.report", TRAIN), ("dvo", "dvo.export", EXPORT),
)


@pytest.mark.parametrize("script, place, more", STAGES)
def test_ctrl_c(script, place, more, files, out):
    if place == "eval.parse_arguments":
        place = {"dvo": "dvo.parse_arguments", "mcts": "mcts.main"}.get(script, place)
    told = ends(files, script, more, 130, (launch.at, place, launch.stop, 0))
    assert told.startswith(f"{script}.py: stopped"), told


FULL = table(
    ("mcts eval", "eval.write_line", "", "OUT"),
    ("dvo", "dvo._open", "", "OUT"), ("dvo", "dvo.log", "--eval-data TEST", "log.jsonl"),
    ("dvo", "dvo.put", "--eval-data TEST", "eval-TEST.json"),
    ("dvo", "dvo.sample_responses", "", "responses-TEST.rank0.jsonl"),
    ("dvo", "dvo.search_round", "", "trees.rank0.jsonl"),
    ("dvo", "dvo.save_state", TRAIN, "state"), ("dvo", "dvo.save_model", TRAIN, "model"),
    ("dvo", "dvo.write_card", TRAIN, "README.md"), ("dvo", "dvo.random_model", "- --out OUT", "random"),
    ("dvo", "dvo.export", EXPORT, "OUT"),
)


@pytest.mark.parametrize("script, place, more, words", FULL)
def test_a_full_disk(script, place, more, words, files, out):
    told = ends(files, script, more, 2, (launch.at, place, launch.limit_files, 0))
    assert told.startswith(f"{script}.py: cannot write ") and words in told and "free some space" in told


def test_a_full_disk_in_the_words_of_torch():
    with pytest.raises(tasks.InputError, match="cannot write a state .* free some space"):
        with tasks.told("write a state", errors=RuntimeError):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk here")
@pytest.mark.parametrize("script", ["mcts", "eval"])
def test_records_to_a_full_disk(script, files, out):
    told = ends(files, script, "--out /dev/full", 2)
    assert "cannot write to /dev/full (No space left" in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk here")
@pytest.mark.parametrize("script, more", [
    ("mcts", "- --show TREES"), ("mcts", "- --html TREES"), ("eval", "")])
def test_output_to_a_full_disk(script, more, files, out):
    told = ends(files, script, more, 2, (launch.print_to, "/dev/full"))
    assert "No space left" in told


# What is unusual, but right


def test_a_log_gets_lines_instead_of_a_bar(monkeypatch, capsys):
    clock = itertools.count(0, 10)                                  # seconds
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    for _ in tasks.progress("search", 10, "tree", iterable=range(10)):
        pass
    *lines, last = capsys.readouterr().err.splitlines()
    assert 0 < len(lines) < 5 and last.startswith("search: 100 % of 10 trees, 0")
    assert all(re.fullmatch(r"search: \d+ % of 10 trees, [\d:]+, [\d:]+ to go", line) for line in lines)


PIPES = table((ALL, "--data /dev/stdin", 0), ("mcts", "--data /dev/fd/63", 63))


@pytest.mark.parametrize("script, more, number", PIPES)
def test_data_from_a_pipe(script, more, number, files, out):
    more += " --seed -5" + " --rounds 0" * (script == "dvo")
    finish(start(files, script, more, before=[(launch.give, number, TEXTS["DATA"])]), 0)


@pytest.mark.parametrize("script", ALL.split())
def test_half_an_emoji(script, files, out):
    told = finish(start(files, script, "--data EMOJI"), 2 if script == "dvo" else 0)
    written = out / "round1" / "trees.rank0.jsonl" if script == "dvo" else out
    assert "Add 3 \ufffd to 4." in written.read_text(encoding="utf-8"), told


@pytest.mark.parametrize("script, more", [("dvo", "--rounds 0"), ("mcts", "- --show TREES"), ("eval", "")])
def test_an_ascii_terminal(script, more, files, out):
    command = start(files, script, more, before=[(launch.speak, "ascii")])
    finish(command, 0)
    assert "?" in command.stdout


def test_a_page_is_utf_8_everywhere(files):
    command = start(files, "mcts", "- --html TREES", before=[(launch.speak, "ascii")])
    finish(command, 0)
    assert "·" in command.stdout


@pytest.mark.parametrize("script, more", [
    ("dvo", TRAIN), ("mcts", "- --show TREES"), ("mcts", ""), ("eval", "")])
def test_what_windows_lacks(script, more, files, out):
    """The search, the evaluation, the pictures and a training in one process do without."""
    finish(start(files, script, more, before=[(launch.hide, "fcntl", "resource", "pwd", "grp")]), 0)
