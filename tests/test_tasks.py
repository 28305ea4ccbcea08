# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""The loader of problems, against a local server. Run with: python -m pytest tests/test_tasks.py"""
import hashlib
import http.server
import json
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval as tasks
from eval import InputError, evaluate, is_equiv, load_problems, open_lines, read_lines, write_line


def choices(*texts, labels="ABCDE"):
    return [{"text": text, "label": label} for text, label in zip(texts, labels)]


# One self-written row in each publisher's form, with the question and the answer it must become
ROWS = {
    "gsm8k": ({"question": "Ann has 1000 pens and buys 250. How many now?",
               "answer": "1000+250=<<1000+250=1250>>1250\n#### 1,250"},
              "Ann has 1000 pens and buys 250. How many now?", "1250"),
    "math": ({"problem": "Halve $x$.", "level": "Level 1", "type": "Algebra",
              "solution": r"Not \boxed{x}. It is $\boxed{\frac{x}{2^{1}}}$."},
             "Halve $x$.", r"\frac{x}{2^{1}}"),
    "agieval-math": ({"passage": None, "question": "Solve $x+1=3$.", "options": None, "label": None,
                      "answer": "2", "other": {"solution": "Take 1 away."}}, "Solve $x+1=3$.", "2"),
    "metamath": ({"type": "GSM_Rephrased", "query": "What is 2 + 2?", "original_question": "2 + 2?",
                  "response": "Two and two make four.\nThe answer is: 4"}, "What is 2 + 2?", "4"),
    "obqa": ({"id": "1", "answerKey": "B",
              "question": {"stem": "Snow is", "choices": choices("hot", "cold", "green", "loud")}},
             "Snow is\nA) hot\nB) cold\nC) green\nD) loud", "B) cold"),
    "csqa": ({"id": "2", "answerKey": "C",  # a repeated option is dropped
              "question": {"stem": "Where do boats rest?", "question_concept": "boat",
                           "choices": choices("desert", "attic", "harbour", "attic", "oven")}},
             "Where do boats rest?\nA) desert\nB) attic\nC) harbour\nD) oven", "C) harbour"),
    "arc": ({"id": "3", "answerKey": "2",
             "question": {"stem": "Ice melts to", "choices": choices("sand", "water", "air", labels="123")}},
            "Ice melts to\nA) sand\nB) water\nC) air", "B) water"),
}
ON_THE_HUB = [                                                      # the same there
    {"question": "Ice melts to", "choices": {"text": ["sand", "water"], "label": ["1", "2"]}, "answerKey": "2"},
    {"question_stem": "Ice melts to", "choices": {"text": ["sand", "water"], "label": ["A", "B"]},
     "answerKey": "B"}]
SCIQ = [{"question": f"What is number {i}?", "correct_answer": "right", "distractor1": "wrong",
         "distractor2": "worse", "distractor3": "worst", "support": ""} for i in range(20)]


class Publisher(http.server.BaseHTTPRequestHandler):
    """Serves `files`; a file named in `cut` breaks off in the middle."""
    files, cut, requests = {}, set(), []

    def do_GET(self):
        name = self.path.lstrip("/")
        self.requests.append(name)
        if name not in self.files:
            return self.send_error(404)
        body = self.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = len(body) // 2 if name in self.cut else len(body)
        self.wfile.write(body[:sent])

    def log_message(self, *args):
        pass


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """A publisher with one task, "shop", in the gsm8k form; the cache is a fresh folder."""
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(50)]
    body = "\n".join(map(json.dumps, rows)).encode()
    Publisher.files = {"shop.jsonl": body}
    Publisher.cut = set()
    Publisher.requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/shop.jsonl"
    checksum = hashlib.sha256(body).hexdigest()
    entry = (tasks._gsm8k, {"test": ("shop.jsonl", url, checksum[:32])})
    monkeypatch.setitem(tasks.TASKS, "shop", entry)
    monkeypatch.setenv("DVO_CACHE", str(tmp_path / "cache"))
    yield Publisher
    server.shutdown()
    server.server_close()


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ROWS)
def test_publishers_form(name, tmp_path):
    row, question, answer = ROWS[name]
    split, (file, _, _) = list(tasks.TASKS[name][1].items())[-1]
    write(tmp_path / file, row)
    problems = load_problems(name, split=split, data_dir=tmp_path)
    assert problems == [{"question": question, "answer": answer}]
    assert is_equiv(answer, answer)


@pytest.mark.parametrize("row", ON_THE_HUB)
def test_a_row_of_the_hub_is_known_by_its_form(row, tmp_path):
    path = write(tmp_path / "mine.jsonl", row)
    assert load_problems(path) == [{"question": "Ice melts to\nA) sand\nB) water", "answer": "B) water"}]


def test_a_device_is_no_file_of_records():
    """It is not read to its end, which it may not have."""
    tasks.open_lines("/dev/zero").close()
    assert not list(tasks.read_lines("/dev/zero"))


def test_a_json_list_reads_like_json_lines(tmp_path):
    row, question, answer = ROWS["metamath"]
    rows = [row, row | {"query": "Again?"}]
    (tmp_path / "MetaMathQA-395K.json").write_text(json.dumps(rows, indent=4))
    assert len(load_problems("metamath", split="train", data_dir=tmp_path)) == 2


GSM8K_FORMS = [
    ("1000+250=1250\n#### 1,250", "1250"),
    ("#### 12", "12"),
    ("####12", "12"),
    ("Add. #### 12", "12"),
    ("#### (1,2)", "(1,2)"),
    ("#### 1,200,300.50", "1200300.50"),
    ("#### $1,250", "$1250"),
    ("#### 3, 4", "3, 4"),
]


@pytest.mark.parametrize("answer, gold", GSM8K_FORMS)
def test_what_follows_the_mark_of_gsm8k_is_the_gold_answer(answer, gold, tmp_path):
    path = write(tmp_path / "mine.jsonl", {"question": "Which?", "answer": answer})
    assert load_problems(path) == [{"question": "Which?", "answer": gold}]


@pytest.mark.parametrize("answer, reason", [
    ("The answer is 12.", "looks like a solution"),
    ("We add.\nFinal Answer: 12", "looks like a solution"),
    (r"So it is \boxed{12} in all.", "looks like a solution"),
    ("a\n#### b\nc", "goes on after")])
def test_a_gold_answer_that_is_a_solution_is_refused(answer, reason, tmp_path):
    """Else no response would ever be right, without a word."""
    path = write(tmp_path / "mine.jsonl", GOOD, {"question": "Which?", "answer": answer})
    with pytest.raises(InputError, match=f"line 2: .*{reason}"):
        load_problems(path)


@pytest.mark.parametrize("name", ROWS)
def test_a_publishers_file_given_by_its_path_is_known_by_its_form(name, tmp_path):
    row, question, answer = ROWS[name]
    path = write(tmp_path / "copy.json", row)
    assert load_problems(path) == [{"question": question, "answer": answer}]


def test_options_of_a_file_given_by_its_path_are_shuffled_by_seed(tmp_path):
    path = tmp_path / "copy.json"
    path.write_text(json.dumps(SCIQ))
    once, again, other = (load_problems(path, seed=seed) for seed in (3, 3, 4))
    assert once == again != other


def test_tasks_are_mixed_by_seed(tmp_path):
    for name in ("obqa", "arc"):
        row = ROWS[name][0]
        stems = [{"stem": f"{name} {i}"} for i in range(9)]
        rows = [row | {"question": row["question"] | stem} for stem in stems]
        write(tmp_path / tasks.TASKS[name][1]["test"][0], *rows)

    def load(seed, limit=None):
        return load_problems(["obqa", "arc"], data_dir=tmp_path, seed=seed, limit=limit)

    mixed = load(seed=1)
    assert len(mixed) == 18
    assert mixed == load(seed=1)
    assert mixed != load(seed=2)
    assert mixed[:5] == load(seed=1, limit=5)
    early = {problem["question"][:3] for problem in mixed[:9]}
    assert len(early) == 2, "both tasks come early"


def test_generated_training_questions_hold_no_test_question():
    train, test = (load_problems("arithmetic", split=split) for split in ("train", "test"))
    asked = {problem["question"] for problem in train}
    assert len(asked) == 600
    assert len(test) == 300
    assert not asked & {problem["question"] for problem in test}
    assert load_problems("arithmetic", split="train", limit=7) == train[:7]


def test_more_chains_than_there_are_is_refused():
    """Else the search for one more would never end."""
    chains = tasks.arithmetic(300, low=1, high=1)
    assert len({problem["question"] for problem in chains}) == 300
    with pytest.raises(InputError, match="no 10000 chains of 1 to 1 operations"):
        tasks.arithmetic(10_000, low=1, high=1)


@pytest.mark.parametrize("limit", (0, -1))
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(InputError, match=f"--limit is {limit}, but must be at least 1"):
        load_problems("arithmetic", limit=limit)


def test_options_without_order_are_shuffled_by_seed_and_question_alone(tmp_path):
    def load(rows, seed):
        (tmp_path / "sciq_test.json").write_text(json.dumps(rows))
        problems = load_problems("sciq", data_dir=tmp_path, seed=seed)
        return {problem["question"].split("\n")[0]: problem for problem in problems}

    first = load(SCIQ, seed=1)
    assert first == load(SCIQ[::-1], seed=1)
    assert first != load(SCIQ, seed=2)
    letters = set()
    for problem in first.values():
        _, *options = problem["question"].split("\n")
        assert problem["answer"] in options
        assert problem["answer"].endswith(") right")
        letters.add(problem["answer"][0])
    assert len(letters) == 4, "20 right answers should take every letter"


def test_download_once_then_cache(publisher, tmp_path):
    assert len(load_problems("shop")) == 50
    assert load_problems("shop", limit=1) == [{"question": "0 + 1?", "answer": "1"}]
    assert publisher.requests == ["shop.jsonl"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["shop.jsonl"]


def test_the_data_folder_comes_first(publisher, tmp_path):
    write(tmp_path / "shop.jsonl", {"question": "Mine?", "answer": "#### 1"})
    [problem] = load_problems("shop", data_dir=tmp_path)
    assert problem["question"] == "Mine?"
    assert not publisher.requests


def test_changed_file_is_refused(publisher, tmp_path):
    publisher.files["shop.jsonl"] += b"\n"
    with pytest.raises(InputError, match=r"invalid hash value .* put shop.jsonl at .*cache"):
        load_problems("shop")
    assert not list((tmp_path / "cache").iterdir())


def test_interrupted_download_leaves_nothing_and_starts_again(publisher, tmp_path):
    publisher.cut.add("shop.jsonl")
    with pytest.raises(InputError, match="Cannot download .*put shop.jsonl"):
        load_problems("shop")
    assert not list((tmp_path / "cache").iterdir())
    publisher.cut.clear()
    assert len(load_problems("shop")) == 50


def test_a_git_blob_id_is_checked_where_it_is_what_is_known(publisher, tmp_path, monkeypatch):
    body = publisher.files["shop.jsonl"]
    blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    convert, files = tasks.TASKS["shop"]
    monkeypatch.setitem(tasks.TASKS, "shop", (convert, {"test": (*files["test"][:2], blob)}))
    publisher.files["shop.jsonl"] += b"\n"
    with pytest.raises(InputError, match="git blob id is not"):
        load_problems("shop")
    assert not list((tmp_path / "cache").iterdir())
    publisher.files["shop.jsonl"] = body
    assert len(load_problems("shop")) == 50


def test_offline_says_where_to_put_the_file(publisher, tmp_path, monkeypatch):
    entry = (tasks._gsm8k, {"test": ("shop.jsonl", "http://127.0.0.1:1/shop.jsonl", "")})
    monkeypatch.setitem(tasks.TASKS, "shop", entry)
    with pytest.raises(InputError) as error:
        load_problems("shop")
    assert str(error.value).endswith(f"put shop.jsonl at {tmp_path / 'cache' / 'shop.jsonl'}.")
    assert "\n" not in str(error.value)


def test_own_file(tmp_path):
    path = write(tmp_path / "own.jsonl", {"question": "1+1?", "answer": 2}, "\n",
                 {"question": "Why?", "answer": " so ", "more": []})
    assert load_problems(str(path)) == [{"question": "1+1?", "answer": "2"},
                                        {"question": "Why?", "answer": "so"}]


def test_repeated_questions_are_dropped_and_counted(tmp_path, capsys):
    options = {"stem": "Pick.", "choices": choices("x", "y")}
    path = write(tmp_path / "own.jsonl", *[{"question": q, "answer": "1"} for q in "abab"])
    assert [p["question"] for p in load_problems(path)] == ["a", "b"]
    assert "dropped 2 repeated questions, kept 2" in capsys.readouterr().err
    write(tmp_path / "arc_challenge_test.jsonl", {"answerKey": "A", "question": options},
          {"answerKey": "A", "question": options | {"choices": choices("y", "x")}})
    assert len(load_problems("arc", data_dir=tmp_path)) == 2, "other options make another question"


GOOD = {"question": "1 + 1?", "answer": "2"}
BAD_ROWS = [
    ("{not json}\n", "not JSON"),
    ('{"question": "cut o', "not JSON"),
    ('{"question": "a", "answer": "b"} x\n', "Extra data"),
    ("[" * 5000, "not JSON"),
    ({"question": "no answer"}, "lacks 'answer'"),
    ({"answer": "no question"}, "lacks 'question'"),
    ({"question": " ", "answer": "1"}, "empty"),
    ({"question": "a", "answer": ""}, "empty"),
    ({"question": 5, "answer": "1"}, "not text"),
    ({"question": "a", "answer": None}, "not text"),
    ({"question": "a", "answer": True}, "not text"),
    ("5\n", "not an object"),
    ("[1, 2]\n", "not an object"),
]


@pytest.mark.parametrize("bad, reason", BAD_ROWS)
def test_bad_row_names_file_line_and_remedy(bad, reason, tmp_path):
    path = write(tmp_path / "own.jsonl", GOOD, "\n", bad)
    with pytest.raises(InputError) as error:
        load_problems(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 3: ")
    assert reason in message
    assert "correct or delete" in message
    assert "\n" not in message


@pytest.mark.parametrize("name, row, reason", [
    ("gsm8k", {"question": "a", "answer": "no final number"}, "no '####'"),
    ("math", {"problem": "a", "solution": "no box"}, "lacks 'answer'"),
    ("obqa", {"question": {"stem": "a", "choices": choices("x", "y")}}, "lacks 'answerKey'"),
    ("obqa", {"question": {"stem": "a"}, "answerKey": "A"}, "lacks 'choices'"),
    ("obqa", {"question": {"stem": "a", "choices": []}, "answerKey": "A"}, "no choice is labelled 'A'"),
    ("arc", {"question": {"stem": "a", "choices": choices("x")}, "answerKey": "5"}, "labelled '5'"),
    ("sciq", {"question": "a", "correct_answer": "b", "distractor1": "c"}, "lacks 'distractor2'")])
def test_bad_row_in_a_publishers_form(name, row, reason, tmp_path):
    path = write(tmp_path / tasks.TASKS[name][1]["test"][0], row)
    with pytest.raises(InputError) as error:
        load_problems(name, data_dir=tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 1: ")
    assert reason in message


def test_bad_row_in_a_json_list_names_its_line(tmp_path):
    (tmp_path / "sciq_test.json").write_text("[\n " + json.dumps(SCIQ[0]) + ',\n\n {"question":\n "a"}\n]')
    with pytest.raises(InputError, match="item 2: it lacks 'correct_answer'"):
        load_problems("sciq", data_dir=tmp_path)


def test_a_cut_json_list_is_refused(tmp_path):
    path = tmp_path / "sciq_test.json"
    path.write_text(json.dumps(SCIQ, indent=1)[:-40])
    with pytest.raises(InputError, match=r"line \d+: not JSON"):
        load_problems("sciq", data_dir=tmp_path)


def test_missing_empty_and_unreadable_files(tmp_path):
    for content, reason in ((b"", "holds no problem"), (b"\n\n", "holds no problem"), (b"\xff\xfe", "UTF-8")):
        (tmp_path / "own.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=reason):
            load_problems(tmp_path / "own.jsonl")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="put gsm8k_test.jsonl at"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVO_CACHE", str(tmp_path / "file" / "cache"))
        load_problems("gsm8k")
    with pytest.raises(InputError, match="neither a file nor a task.*gsm8k"):
        load_problems(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="metamath has no split 'test': choose one of train"):
        load_problems("metamath")
    with pytest.raises(InputError, match="arithmetic has no split 'dev': choose one of train, test"):
        load_problems("arithmetic", split="dev")


# Evaluation

PROBLEMS = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(4)]


class Response:
    def __init__(self, text, end="eos"):
        self.text = text
        self.tokens = text.split()
        self.end = end


def sampler(asked=None):
    """Right but for "2 + 1?"; notes what it is asked; the last finishes first."""
    def sample(problems, n):
        if asked is not None:
            asked.extend(problem["question"] for problem in problems)
        for i in reversed(range(len(problems))):
            answer = problems[i]["answer"]
            said = Response("I do not", "cut") if answer == "3" else Response(f"Final Answer: {answer}")
            yield i, [said] * n
    return sample


def test_evaluation_of_an_iterator_in_any_order_and_of_plain_lists():
    result = evaluate(sampler(), PROBLEMS, trials=2)
    records = result.pop("responses")
    shares = {"unanswered": 0.25, "cut": 0.25}
    assert result == {"accuracy": 0.75, "sem": 0, "n": 4, "trials": [0.75, 0.75], **shares}
    assert [r["question"] for r in records] == [p["question"] for p in PROBLEMS]
    verdict = {"response": "Final Answer: 1", "correct": True, "answered": True, "tokens": 3, "end": "eos"}
    assert records[0]["responses"] == [verdict, verdict]

    def lists(problems, n):
        return [["Final Answer: 1"], [], ["Final Answer: 3"], []]

    result = evaluate(lists, PROBLEMS, trials=1)
    assert result["accuracy"] == 0.5 and result["unanswered"] == 0.5
    assert result["sem"] is None and result["cut"] == 0
    verdict = result["responses"][0]["responses"][0]
    assert verdict["tokens"] is None and verdict["end"] is None, "unknown of plain text"


def test_evaluation_says_that_a_sampler_gave_too_little():
    def lazy(problems, n):
        return [["1"] * n]

    with pytest.raises(InputError, match="gave 3 questions no list of responses, such as '1 [+] 1[?]'"):
        evaluate(lazy, PROBLEMS)


def test_evaluation_keeps_what_was_done_and_asks_the_rest(tmp_path):
    out = tmp_path / "responses.jsonl"

    def broken(problems, n):
        yield from list(sampler()(problems, n))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(broken, PROBLEMS, trials=2, out=out)
    assert [record["question"] for record in read_lines(out)] == ["3 + 1?", "2 + 1?"]
    out.write_text(out.read_text() + '{"question": "torn')
    asked = []
    result = evaluate(sampler(asked), PROBLEMS, trials=2, out=out)
    assert asked == ["0 + 1?", "1 + 1?"]
    assert result == evaluate(sampler(), PROBLEMS, trials=2)
    assert len(list(read_lines(out))) == 4
    asked.clear()
    assert evaluate(sampler(asked), PROBLEMS, trials=2, out=out) == result and not asked


STALE = [
    ({"correct": False}, 1),
    ({"answered": False}, 1),
    ({"response": "Final Answer: 9", "correct": True}, 0.75),
    ({"response": "I cannot say", "correct": True, "answered": True}, 0.75)]


@pytest.mark.parametrize("stale, accuracy", STALE)
def test_what_a_file_holds_is_judged_again(stale, accuracy, tmp_path):
    """A judge of another day said something else."""
    def right(problems, n):
        return [[Response(f"Final Answer: {problem['answer']}")] * n for problem in problems]

    out = tmp_path / "responses.jsonl"
    evaluate(right, PROBLEMS, trials=1, out=out)
    first, *others = read_lines(out)
    wrong = first | {"responses": [first["responses"][0] | stale]}
    write(out, wrong, *others)
    result = evaluate(None, PROBLEMS, trials=1, out=out)
    verdict, = result["responses"][0]["responses"]
    is_right = verdict["response"] == "Final Answer: 1"
    assert result["accuracy"] == accuracy and verdict["correct"] == is_right
    assert verdict["answered"] == verdict["response"].startswith("Final")


def test_what_a_file_holds_is_judged_by_the_present_marker(tmp_path):
    out = tmp_path / "responses.jsonl"
    problems = [{"question": "2+2?", "answer": "4"}]
    text = "X: 4\nThe next of the numbers is one more.\nY: 5"

    def sample(asked, n):
        return [[text] * n]

    def accuracy(marker):
        return evaluate(sample, problems, trials=1, out=out, marker=marker)["accuracy"]

    assert [accuracy(marker) for marker in ("Y:", "X:", "Y:", "Z:")] == [0, 1, 0, 0]


def test_a_file_without_ends_counts_as_not_cut(tmp_path):
    """Files of earlier versions lack it."""
    out = tmp_path / "responses.jsonl"
    assert evaluate(sampler(), PROBLEMS, trials=2, out=out)["cut"] == 0.25
    records = list(read_lines(out))
    for record in records:
        for verdict in record["responses"]:
            del verdict["end"]
    write(out, *records)
    assert evaluate(None, PROBLEMS, trials=2, out=out)["cut"] == 0


def test_evaluation_refuses_a_file_of_something_else(tmp_path):
    trees = write(tmp_path / "trees.jsonl", {"question": "a", "answer": "b", "nodes": []})
    with pytest.raises(InputError, match="holds something else"):
        evaluate(sampler(), PROBLEMS, out=trees)
    evaluate(sampler(), PROBLEMS, trials=2, out=tmp_path / "two.jsonl")
    with pytest.raises(InputError, match="holds 2 responses to a question, not 3"):
        evaluate(sampler(), PROBLEMS, trials=3, out=tmp_path / "two.jsonl")
    with pytest.raises(InputError, match="cannot write to .*nowhere"):
        evaluate(sampler(), PROBLEMS, out=tmp_path / "nowhere" / "out.jsonl")
    with pytest.raises(InputError, match="no problem"):
        evaluate(sampler(), [])
    with pytest.raises(InputError, match="--trials is 0"):
        evaluate(sampler(), PROBLEMS, trials=0)


def test_lines_survive_a_torn_end_and_half_an_emoji(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a"')
    with open_lines(path) as file:
        write_line(file, {"a": "\ud83d ü"})
    assert list(read_lines(path)) == [{"a": 1}, {"a": "\ud83d ü"}]
    assert "ü" in path.read_text()
    assert "dropped the last line" in capsys.readouterr().err
    assert list(read_lines(tmp_path / "none")) == []
    path.write_text('{"a": 3}')
    with open_lines(path) as file:
        write_line(file, {"a": 4})
    assert list(read_lines(path)) == [{"a": 3}, {"a": 4}], "only the end of the line was missing"
    path.write_text("{}\n{")
    with pytest.raises(InputError, match="line 2: not JSON"):
        list(read_lines(path))


@pytest.mark.skipif(tasks.fcntl is None, reason="no locks here")
def test_a_second_writer_is_kept_out(tmp_path):
    with open_lines(tmp_path / "a"), pytest.raises(InputError, match="another process"):
        open_lines(tmp_path / "a")
    open_lines(tmp_path / "a").close()


class FakeSearch:
    """What the command needs of mcts.py."""
    InputError = InputError

    @staticmethod
    def load_model(*args):
        return "model", "tokenizer"

    @staticmethod
    def build_prompt(tokenizer, question):
        return question

    @staticmethod
    def stream(model, tokenizer, prompts, *, n, progress, max_new_tokens, **settings):
        for i, prompt in enumerate(prompts):
            progress(n * max_new_tokens)
            ends = "eos", "cut", "answer"
            yield i, [Response(f"Final Answer: {len(prompt)}", end) for end in ends[:n]]


@pytest.mark.parametrize("trials, spread, cut", [(1, "± - %", "0.0 % cut"), (3, "± 0.0 %", "33.3 % cut")])
def test_the_command(trials, spread, cut, tmp_path, monkeypatch, capsys):
    data = write(tmp_path / "data.jsonl", {"question": "one", "answer": "3"}, {"question": "four", "answer": "5"})
    command = f"eval.py --model M --data {data} --trials {trials} --out {tmp_path / 'out.jsonl'}"
    monkeypatch.setitem(sys.modules, "mcts", FakeSearch)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys, "argv", command.split())
    for is_repeated in (False, True):
        tasks.main()
        shown = capsys.readouterr()
        assert "accuracy 50.0 " + spread in shown.out and shown.out.endswith(f", {cut}\n")
        assert ("tokens/s" in shown.out) != is_repeated
        assert ("100%" in shown.err) != is_repeated, "the bar has come to its end"


def test_as_many_responses_as_trials():
    problems = [{"question": "2+2?", "answer": "4"}]
    for n in 1, 5:
        with pytest.raises(tasks.InputError, match=f"gave {n} responses to a question, not 2"):
            tasks.evaluate(lambda asked, n, drawn=n: [["4"] * drawn], problems, trials=2)


def test_responses_of_other_settings_are_not_taken_for_these(tmp_path):
    """Else the accuracy of one model would be printed for another."""
    problems = [{"question": "2+2?", "answer": "4"}]

    def sample(asked, n):
        return [["Final Answer: 4"] * n for _ in asked]

    def accuracy(model):
        out = tmp_path / "responses.jsonl"
        return evaluate(sample, problems, trials=1, out=out, settings={"model": model})["accuracy"]

    assert accuracy("one") == 1
    assert accuracy("one") == 1
    with pytest.raises(InputError, match="of other settings, .*'one'"):
        accuracy("other")
