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
from eval import InputError, is_equiv, load_problems


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
        self.wfile.write(body[:len(body) // 2] if name in self.cut else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """A publisher with one task, "shop", in the gsm8k form; the cache is a fresh folder."""
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(50)]
    body = "\n".join(map(json.dumps, rows)).encode()
    Publisher.files, Publisher.cut, Publisher.requests = {"shop.jsonl": body}, set(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/shop.jsonl"
    entry = (tasks._gsm8k, {"test": ("shop.jsonl", url, hashlib.sha256(body).hexdigest()[:32])})
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


def test_a_json_list_reads_like_json_lines(tmp_path):
    row, question, answer = ROWS["metamath"]
    (tmp_path / "MetaMathQA-395K.json").write_text(json.dumps([row, row | {"query": "Again?"}], indent=4))
    assert len(load_problems("metamath", split="train", data_dir=tmp_path)) == 2


def test_a_file_of_worked_solutions_reads_like_gsm8k(tmp_path):
    """Else every response to a copy of GSM8K under another name would be graded wrong. A heading stays."""
    row, question, answer = ROWS["gsm8k"]
    path = tmp_path / "mine.jsonl"
    heading = {"question": "Which?", "answer": "a\n#### b\nc"}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(heading)}\n")
    first, second = load_problems(path)
    assert first == {"question": question, "answer": answer} and second["answer"] == "a\n#### b\nc"


def test_options_without_order_are_shuffled_by_seed_and_question_alone(tmp_path):
    (tmp_path / "sciq_test.json").write_text(json.dumps(SCIQ))
    def load(seed):
        problems = load_problems("sciq", data_dir=tmp_path, seed=seed)
        return {problem["question"].split("\n")[0]: problem for problem in problems}

    first = load(seed=1)
    (tmp_path / "sciq_test.json").write_text(json.dumps(SCIQ[::-1]))
    assert load(seed=1) == first and load(seed=2) != first
    assert len({p["answer"][0] for p in first.values()}) == 4, "20 right answers should take every letter"
    for problem in first.values():
        assert problem["answer"].endswith(") right") and problem["answer"] in problem["question"].split("\n")


def test_download_once_then_cache(publisher, tmp_path):
    assert len(load_problems("shop")) == 50
    assert load_problems("shop", limit=1) == [{"question": "0 + 1?", "answer": "1"}]
    assert publisher.requests == ["shop.jsonl"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["shop.jsonl"]


def test_the_data_folder_comes_first(publisher, tmp_path):
    write(tmp_path / "shop.jsonl", {"question": "Mine?", "answer": "#### 1"})
    assert load_problems("shop", data_dir=tmp_path)[0]["question"] == "Mine?" and not publisher.requests


def test_changed_file_is_refused(publisher, tmp_path):
    publisher.files["shop.jsonl"] += b"\n"
    with pytest.raises(InputError, match=r"sha256 is .* put shop.jsonl at .*cache"):
        load_problems("shop")
    assert not list((tmp_path / "cache").iterdir())


def test_interrupted_download_leaves_nothing_and_starts_again(publisher, tmp_path):
    publisher.cut.add("shop.jsonl")
    with pytest.raises(InputError, match="connection closed after"):
        load_problems("shop")
    assert not list((tmp_path / "cache").iterdir())
    publisher.cut.clear()
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
    ("{not json}\n", "not JSON"), ('{"question": "cut o', "not JSON"),
    ('{"question": "a", "answer": "b"} x\n', "more follows"),
    ("[" * 5000, "not JSON"), ({"question": "no answer"}, "lacks 'answer'"),
    ({"answer": "no question"}, "lacks 'question'"),
    ({"question": " ", "answer": "1"}, "empty"), ({"question": "a", "answer": ""}, "empty"),
    ({"question": 5, "answer": "1"}, "not text"),
    ({"question": "a", "answer": None}, "not text"), ({"question": "a", "answer": True}, "not text"),
    ("5\n", "not an object"), ("[1, 2]\n", "not an object"),
]


@pytest.mark.parametrize("bad, reason", BAD_ROWS)
def test_bad_row_names_file_line_and_remedy(bad, reason, tmp_path):
    path = write(tmp_path / "own.jsonl", GOOD, "\n", bad)
    with pytest.raises(InputError) as error:
        load_problems(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 3: ") and reason in message and "correct or delete" in message
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
    assert str(error.value).startswith(f"{path}, line 1: ") and reason in str(error.value)


def test_bad_row_in_a_json_list_names_its_line(tmp_path):
    (tmp_path / "sciq_test.json").write_text("[\n " + json.dumps(SCIQ[0]) + ',\n\n {"question":\n "a"}\n]')
    with pytest.raises(InputError, match="line 4: it lacks 'correct_answer'"):
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
