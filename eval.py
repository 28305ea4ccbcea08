# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Problems, answers and their judge: tasks, extraction of the final answer, equivalence, evaluation; at the
end what all commands share: files of records, errors, bars.

    python eval.py --model M --data gsm8k              # a task, or a JSON Lines file with question and answer

The same `grade` is the reward of the search, the label of training data and the verdict of the evaluation.
What it wrongly accepts a policy learns to say, so where it is in doubt it says no. Model output is read,
never run. Importing this file costs milliseconds: neither torch nor transformers.
"""
import argparse
import contextlib
import decimal
import functools
import hashlib
import json
import math
import operator
import os
import random
import re
import signal
import statistics
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows: files are not locked
    fcntl = None

MARKER = "Final Answer:"


class InputError(ValueError):
    """Something the user can put right, told in one sentence: commands print it and exit with status 2."""


@contextlib.contextmanager
def told(task: str, remedy: str = "choose another file", errors=OSError, unless=()):
    """Inside, an exception of the kind `errors` becomes an InputError: cannot TASK (reason); REMEDY."""
    try:
        yield
    except (InputError, *unless):
        raise
    except errors as error:
        why = reason(error)
        if re.search("No space left|File too large|quota exceeded|unexpected pos", why, re.I):     # last: torch
            remedy = "free some space, and the same command goes on from what is saved"
        raise InputError(f"cannot {task} ({why}); {remedy}") from error


_NO_MEMORY = "out of memory|can't allocate memory|MemoryError"
_MEANINGS = {  # what libraries say, and what it means
    "Error while deserializing": "a file is torn, or is none (a git-lfs pointer?): fetch it again",
    "Error no file named": "there are none in the form of safetensors",
    "Expected one of cpu|the '.*' backend|meta tensor": "there is no such device",
    "mismatch": "they have other sizes than config.json says",
    "custom code": "it needs code of its own, which is never run",
    "Unrecognized model": "there is no config.json, or it names no type of model",
    "backend tokenizer": "its files are missing",
    "JSONDecodeError": "a file is torn, or is no JSON (a git-lfs pointer?): fetch it again",
    _NO_MEMORY: "out of memory: lower --slots, --kv-budget or --micro-tokens",
}


def reason(error: BaseException) -> str:
    """Why something failed, in a few words: what the system, torch, transformers, tokenizers, safetensors or
    a template says, or what that means."""
    for failure, _ in getattr(error, "failures", {}).values():  # a CheckpointException
        return reason(failure)
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    for words, meaning in _MEANINGS.items():
        if re.search(words, f"{type(error).__name__}: {said}"):
            return meaning
    return said.splitlines()[0][:200].rstrip(" .:;")


def resolved(setting):
    """A setting, or a list or dict of them, in which a file or folder has one name, however it is written."""
    if isinstance(setting, dict):
        return {name: resolved(value) for name, value in setting.items()}
    if isinstance(setting, list):
        return [resolved(value) for value in setting]
    is_path = isinstance(setting, str) and (os.path.isfile(setting) or os.path.isdir(setting))
    return os.path.realpath(setting) if is_path else setting


def check_range(**settings):
    """Raise InputError for the first of name=(value, least) that is too small; None stands for a default."""
    for name, (value, least) in settings.items():
        if value is not None and not least <= value < math.inf:
            needed = "finite" if value == math.inf else f"at least {least:g}"
            raise InputError(f"--{name.replace('_', '-')} is {value}, but must be {needed}")


# Tasks: how one row of each becomes a question and an answer, and where its files come from ---------------


def _pair(row, seed):
    question, answer = row["question"], row["answer"]
    if row.get("options") or row.get("choices"):
        raise ValueError("its options are apart; write them into the question, a letter before each")
    if not isinstance(answer, str):
        return question, str(answer) if type(answer) in (int, float) else answer
    if "####" in answer:
        return _gsm8k(row, seed)
    is_box = _BOX.match(answer.strip("$ "))
    if not is_box and extract_answer(answer) not in (None, answer):
        raise ValueError("the answer looks like a solution; keep the final answer alone, or after ####")
    return question, answer


def _gsm8k(row, seed):
    answer = _after("####", row["answer"]).strip()
    if "\n" in answer:
        raise ValueError("the answer goes on after the line that starts with ####")
    is_number = re.fullmatch(r"[-+$ ]*\d{1,3}(?:,\d{3})+(?:\.\d+)?", answer)
    return row["question"], answer.replace(",", "") if is_number else answer


def _math(row, seed):
    return row["problem"], _boxed(row["solution"]) or row["answer"]


def _metamath(row, seed):
    return row["query"], _after("The answer is:", row["response"])


def _after(mark, solution):
    if mark not in solution:
        raise ValueError(f"no {mark!r} in the solution")
    return solution.rpartition(mark)[2]


def _choice(row, seed):
    if isinstance(row.get("question"), dict):  # as published
        question = row["question"]["stem"]
        texts, labels = ([choice[key] for choice in row["question"]["choices"]] for key in ("text", "label"))
    else:  # as on the Hugging Face hub
        question = row.get("question_stem") or row["question"]
        texts, labels = row["choices"]["text"], row["choices"]["label"]
    if row["answerKey"] not in labels:
        raise ValueError(f"no choice is labelled {row['answerKey']!r}")
    return _lettered(question, texts, texts[labels.index(row["answerKey"])])


def _sciq(row, seed):
    options = sorted({row[key] for key in ("correct_answer", "distractor1", "distractor2", "distractor3")})
    random.Random(f"{seed}:{row['question']}").shuffle(options)  # the source has no order of its own
    return _lettered(row["question"], options, row["correct_answer"])


def _lettered(question, options, correct):
    options = list(dict.fromkeys(options))  # real files repeat an option; two right letters would be unfair
    lines = [f"{chr(65 + i)}) {option}" for i, option in enumerate(options)]
    return "\n".join([question, *lines]), lines[options.index(correct)]


def _by_form(row, seed):
    """A row of a file given by its path: its fields show whose form it has."""
    forms = {"answerKey": _choice, "correct_answer": _sciq, "query": _metamath, "problem": _math}
    return next((form for field, form in forms.items() if field in row), _pair)(row, seed)


_GITHUB = "https://raw.githubusercontent.com/"
_PRM800K = "https://media.githubusercontent.com/media/openai/prm800k/00811d6de065642a6967b9017d4cee59550c0ef4"
_MIRROR = _GITHUB + "pangr2/dataset_collection/52d6686c0aef1a55241f3fc8f42345b1af9ce544/"  # of AI2's zips
_SOURCES = {  # task: (row converter, address)
    "gsm8k": (_gsm8k, _GITHUB + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"),
    "math": (_math, _GITHUB + "QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/"),
    "math500": (_math, _PRM800K + "/prm800k/math_splits/"),
    "agieval-math": (_pair, _GITHUB + "ruixiangcui/AGIEval/5c77d073fda993f1652eaae3cf5d04cc5fd21d40/"),
    "metamath": (_metamath, "https://huggingface.co/datasets/meta-math/MetaMathQA/resolve/main/"),
    "obqa": (_choice, _MIRROR + "OpenBookQA-V1-Sep2018/Data/Main/"),
    "csqa": (_choice, "https://s3.amazonaws.com/commensenseqa/"),
    "arc": (_choice, _MIRROR + "ARC-V1-Feb2018/ARC-V1-Feb2018-2/ARC-Challenge/"),
    "sciq": (_sciq, _MIRROR + "SciQ/"),
}
# Task, split, file name, digest and path at the address. A digest is the first 32 hexadecimal digits of the
# file's sha256, or the 40 of its git blob id, or - where none is known. MATH are the paper's 7,500 and 5,000
# problems; the answers of CSQA's test split are not public
_FILES = """
gsm8k train gsm8k_train.jsonl 17f347dc51477c50d4efb83959dbb7c5 grade_school_math/data/train.jsonl
gsm8k test gsm8k_test.jsonl 3730d312f6e3440559ace48831e51066 grade_school_math/data/test.jsonl
math train math_7500_train.jsonl 47bc5462da8374bdcf53a7339bd48a7e28567676 evaluation/data/math/train.jsonl
math test math_5000_test.jsonl 9ef3334841057f53caac5522332e38391d3fb33b evaluation/data/math/test.jsonl
math500 test math500_test.jsonl 35dc41080a3680858b27fa7e0533d2d5 test.jsonl
agieval-math test agieval_math.jsonl 43e783af2025318125a96a970a0df379 data/v1/math.jsonl
metamath train MetaMathQA-395K.json fb39a5d8c05c042ece92eae37dfd5ea4 MetaMathQA-395K.json
obqa train openbookqa_main_train.jsonl 388ce25926fa33b573ba6556d7245a61 OpenBookQA_train.jsonl
obqa dev openbookqa_main_dev.jsonl a08f720be757a0f0b6aaf8e1e1162c2b dev.jsonl
obqa test openbookqa_main_test.jsonl feb2bd9bfa6161dca4c44ce90e51e8cd test.jsonl
csqa train csqa_train_rand_split.jsonl 58ffa3c8472410e24b8c43f423d89c8a train_rand_split.jsonl
csqa dev csqa_dev_rand_split.jsonl 3210497fdaae614ac085d9eb873dd7f4 dev_rand_split.jsonl
csqa test csqa_dev_rand_split.jsonl 3210497fdaae614ac085d9eb873dd7f4 dev_rand_split.jsonl
arc train arc_challenge_train.jsonl e02837c53ee86f6d73c259f91c77725c ARC-Challenge-Train.jsonl
arc dev arc_challenge_dev.jsonl 55224364abd2477f66a9a57c5cbef109 ARC-Challenge-Dev.jsonl
arc test arc_challenge_test.jsonl 9fa8ffb3e3a1f88cb302d53dd95aae81 ARC-Challenge-Test.jsonl
sciq train sciq_train.json - train.json
sciq dev sciq_valid.json b201bc1c002b31cabc8581d05f8a5ce9 valid.json
sciq test sciq_test.json 7340983c427dc2ffd3dccf1adb758b6c test.json
"""
# task: (row converter, {split: (file name, address, digest)})
TASKS = {}
for _row in _FILES.strip().splitlines():
    _task, _split, _file, _digest, _path = _row.split()
    _convert, _address = _SOURCES[_task]
    TASKS.setdefault(_task, (_convert, {}))[1][_split] = (_file, _address + _path, _digest.strip("-"))
TASKS["arithmetic"] = (None, {"train": 600, "test": 300})  # generated below; the numbers of problems

# Loading --------------------------------------------------------------------------------------------------


def load_problems(name: str | Path | list, *, split: str = "test", limit: int | None = None,
                  data_dir: str | Path | None = None, seed: int = 0) -> list[dict]:
    """A task of `TASKS`, or a file, as a list of {"question", "answer"} without repeats, at most `limit`.

    A file is JSON Lines or one JSON list, with the fields question and answer or in the form of GSM8K, MATH,
    MetaMath, ARC, OBQA, CSQA or SciQ. A list of names is mixed by `seed`, which also orders SciQ's options.
    A task's file is looked for in `data_dir` and the cache folder ($DVO_CACHE, else ~/.cache/dvo), and
    downloaded into that. Raises InputError for what is unknown or unusable, naming the line.
    """
    check_range(limit=(limit, 1))
    if isinstance(name, (list, tuple)):
        parts = [load_problems(part, split=split, data_dir=data_dir, seed=seed) for part in name]
        problems = {problem["question"]: problem for problem in sum(parts, [])}
        mixture = list(problems.values())
        random.Random(f"mixture {seed}").shuffle(mixture)
        return mixture[:limit]
    convert, files = TASKS.get(str(name), (_by_form, None))
    if files is None:
        path = Path(name)
        if path.is_dir() or not path.exists():
            raise InputError(f"{path} is neither a file nor a task; the tasks are {', '.join(TASKS)}.")
    elif split not in files:
        raise InputError(f"{name} has no split {split!r}: choose one of {', '.join(files)}.")
    elif name == "arithmetic":
        test = arithmetic(files["test"], seed="test")
        drawn = arithmetic(files["train"] + len(test), seed="train")
        train = [problem for problem in drawn if problem not in test][:files["train"]]
        return {"test": test, "train": train}[split][:limit]
    else:
        path = _locate(*files[split], data_dir)
    return _problems(path, convert, limit, seed)


def _problems(path, convert, limit, seed):
    answers = {}
    repeats = 0
    for place, row in _rows(path):
        if len(answers) == limit:
            break
        try:
            if not isinstance(row, dict):
                raise TypeError("it is not an object with named fields")
            question, answer = map(_encodable, convert(row, seed))
            if not question.strip() or not answer.strip():
                raise ValueError("the question or the answer is empty")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{path}, {place}: {why}; correct or delete this row.") from error
        repeats += question in answers
        answers.setdefault(question, answer.strip())
    if not answers:
        raise InputError(f"{path} holds no problem: put one JSON object a line in it, or delete it.")
    if repeats:
        print(f"{path}: dropped {repeats} repeated questions, kept {len(answers)}", file=sys.stderr)
    return [{"question": question, "answer": answer} for question, answer in answers.items()]


def _encodable(text):
    """The text with � for half an emoji, which no tokenizer takes."""
    if not isinstance(text, str):
        raise TypeError("the question or the answer is not text")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _rows(path):
    """Yield (place, object) of a JSON Lines file, a line at a time, or of one JSON list."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.lstrip().startswith("[") and number == 1:
                    for item, row in enumerate(json.loads(line + file.read()), 1):
                        yield f"item {item}", row
                elif line.strip():
                    yield f"line {number}", json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        line = error.lineno if number == 1 and isinstance(error, json.JSONDecodeError) else number
        raise InputError(f"{path}, line {line}: not JSON ({error}); correct or delete it.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}): replace the file.") from error


def _locate(file, url, digest, data_dir):
    cache = Path(os.environ.get("DVO_CACHE") or Path.home() / ".cache" / "dvo")
    for path in (Path(data_dir or cache, file), cache / file):
        if path.is_file():
            return path
    _download(url, path, digest)
    return path


def _download(url, path, digest):
    """Fetch to a temporary name, check, rename: `path` is whole or absent, with several processes too."""
    from torch.hub import download_url_to_file

    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    is_git = len(digest) == 40
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(partial), hash_prefix=None if is_git else digest)
        content = partial.read_bytes() if is_git else b""
        if is_git and hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != digest:
            raise OSError(f"its git blob id is not {digest}")
        os.replace(partial, path)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: another sha256
        raise InputError(f"Cannot download {url} ({error}): put {path.name} at {path}.") from error
    finally:
        if partial.exists():
            partial.unlink()


# The arithmetic task: generated, nothing to download -------------------------------------------------------

OPERATIONS = {
    "Add": ("+", operator.add),
    "Subtract": ("-", operator.sub),
    "Multiply by": ("*", operator.mul),
}
LARGEST = 29  # every intermediate value lies in 0 ... LARGEST


def arithmetic(n: int, seed: int | str = 0, low: int = 3, high: int = 6) -> list[dict]:
    """n different chains of `low` to `high` operations as {"question", "answer"}; the same for the same seed.

    >>> arithmetic(1, low=2, high=2)
    [{'question': 'Start with 19. Subtract 1. Add 1.', 'answer': '19'}]
    """
    draw = random.Random(f"arithmetic {seed}")
    problems = {}
    repeats = 0
    while len(problems) < n:
        value = draw.randint(0, LARGEST)
        question = f"Start with {value}."
        for _ in range(draw.randint(low, high)):
            after = -1
            while not 0 <= after <= LARGEST:
                word = draw.choice(list(OPERATIONS))
                operand = draw.randint(1, 6)
                after = OPERATIONS[word][1](value, operand)
            question = f"{question} {word} {operand}."
            value = after
        repeats = repeats + 1 if question in problems else 0
        if repeats > 10_000:
            raise InputError(f"there are no {n} chains of {low} to {high} operations; ask for fewer")
        problems[question] = {"question": question, "answer": str(value)}
    return list(problems.values())


def demonstrate(question: str, draw: random.Random, skip: float = 0.0) -> str:
    """A worked solution. With probability `skip` a step runs on over the next operation and states only the
    result of both: such examples teach a model steps that it cannot do reliably.

    >>> demonstrate("Start with 24. Multiply by 1. Subtract 5.", random.Random(0))
    '24 * 1 = 24.\\n\\n24 - 5 = 19.\\n\\nFinal Answer: 19'
    """
    start, *chain = question.removesuffix(".").split(". ")
    value = int(start.split()[-1])
    solution = ""
    step = str(value)
    for i, operation in enumerate(chain):
        word, operand = operation.rsplit(" ", 1)
        sign, apply = OPERATIONS[word]
        value = apply(value, int(operand))
        step = f"{step} {sign} {operand}"
        if i + 1 == len(chain) or draw.random() >= skip:
            solution += f"{step} = {value}.\n\n"
            step = str(value)
    return f"{solution}{MARKER} {value}"


def single_operations(text: str) -> tuple[int, int]:
    """(right, all) of the steps of `text` that do one operation.

    >>> single_operations("24 * 1 = 24.\\n\\n24 - 5 = 18.\\n\\n18 + 2 * 3 = 1.\\n\\nFinal Answer: 1")
    (1, 2)
    """
    apply = dict(OPERATIONS.values())
    steps = re.findall(r"^(\d+) ([-+*]) (\d) = (\d+)\.$", text, re.MULTILINE)
    right = [apply[sign](int(a), int(b)) == int(result) for a, sign, b, result in steps]
    return sum(right), len(steps)


# Extraction: the final answer in a response ---------------------------------------------------------------

MAX_RESPONSE = 20_000  # characters, from the end: an answer is not looked for before them


def _any_word(words):
    return rf"\b(?:{'|'.join(words.split())})\b"


_THINK = r"(?:seed:)?(?:think(?:ing)?|thought|reasoning)"
_OPENER = rf"(?:<{_THINK}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>)"
_CLOSER = rf"(?:</{_THINK}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>)"
_THOUGHT = re.compile(rf"{_OPENER}.*?(?:{_CLOSER}|\Z)"
                      r"|<\|channel\|>analysis.*?(?:<\|channel\|>final<\|message\|>|\Z)", re.S | re.I)
_FINAL = re.compile(r"""final\s+answer(?:\s\(in\s(?!dozens|tens|hundreds|thousands|[mb]illions)[^()\n]+\))?
    [\s*]*(?:is\b(?!\s+not\b)|:|\n|[-–]\s)""", re.I | re.X)
_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])\s*(?=\{|\w|\\[A-Za-z])")
_CUE = re.compile(_BOX.pattern + r"""  |  <answer>  |  (?<!错)(?<!错.)(?<!错误的)答案\s*[是为]?\s*:?
  | (?<!\#)\#\#\#\#(?!\#)(?=[ \t]*[^\s\d]{0,9}\d\S{0,40}[ \t]*(?:\n|\Z)|[^\n]{0,60}\s*\Z)  # not a heading
  | (?:\A|[.,;:!?*\#)>\]}$"\n])\ {0,2}  # only such words stand before "answer" in its clause
    (?:(?:so|thus|hence|therefore|then|finally|and|but|the|my|our|final|correct|right|best|most|logical|likely
       |required|I\s(?:think|believe)|(?:find|conclude|means|shows|confirms)\s+that)\b,?\s{1,2}){0,6}
    (?:answer|option|choice)(?:\s+(?:to|for|of)\s+(?:the|this)\s+(?:question|problem))?\**(?:\s*[:=]
      |\s+(?:is|(?:must|would|should|will)\ be|comes\ (?:out\ )?to)\b(?!\s(?:correct|right|wrong|not)\b))
  | \bI\s(?:would\s)?choose\s(?=\**\(?[A-J][).:*])  |  (?<=\n)A:(?=[^\n]{0,60}\s*\Z)""", re.I | re.X | re.M)
_SENTENCE_END = re.compile(r"""
    (?<!\b[A-J])(?<!\b[A-Z][a-z])[.!?][)"'*]*\s+(?=[A-Z<\[(])(?!\(?[A-J][.):])  |  <\|  |  </""", re.X)
_CUE_END = re.compile(r"\n|" + _SENTENCE_END.pattern, re.X)
_PUNCTUATION = str.maketrans({"：": ":", "。": ". "})
_GAP = re.compile(r"\A(?:\\[)\]]|[\s$*.…:)\]}#>\"'`])+")  # between a statement and what follows it
_JOINT = re.compile(r"[^.]*(?:,|;|\band\b|\bor\b)(?:[^A-Za-z\\]|\\[A-Za-z]*|[A-Za-z](?![A-Za-z]))*")

# "Not this", in lists; a new word belongs into the first that fits. _DENIAL: it denies a statement, before it
# or right after; _RETRACTION: takes one back, at the start of what follows or anywhere in it; _DISBELIEF: the
# sentence is not said in earnest; _OBJECTION: it states no value, or another; _FACTOR_...: a box is part of a
# formula; _OTHERWISE: after an option's letter, it speaks of another, or of all; _NO_UNIT: a word after a
# number makes another number of it
_DENIAL = re.compile(_any_word(r"""not \w*n't never no nor neither nobody cannot wrong false incorrect wait
    (?<!\A)or sorry hmm oops instead actually rather maybe perhaps possibly"""), re.I)
_RETRACTION = re.compile(r"""\A\W*(?:
      (?:no|not|never)\b(?=\W*(?:\d|\\|\Z)|\s?[^\s\w]|\s(?:it|that|this|quite|really)\b)
    | (?:wait|oops|sorry|hmm|oh|actually|in\sfact|rather|maybe|perhaps|possibly|or|unless|wrong|incorrect
      |false|correction|(?:minus|plus|times|doubled?|twice|half|halve|triple|add|subtract)(?!-|\scheck)|final\schoice|scratch|strike|ignore|hold\son|that\ssaid|but|however|yet|though)\b
    | (?:this|that|it|they|is|was|I|we|(?:my|the)\s(?:above|answer|result|value|total|number))\b
      [^.!?\n]{0,30}\b(?:not|\w*n't|cannot|doubt|wrong|incorrect|false)\b
    | [^.,!?\n]{0,20}\b(?:not|\w+n't)\W*[.!\n])
  | \b(?:apologi[sz]e|misread|second\s(?:thought|solution)|mistakes?|error|slip|forg[eo]t\w*|overlook\w*
    |re-?(?:consider|calculat|comput|evaluat)\w*|(?:up)?on\sre(?:flection|view)|after\s(?:re-?)?checking
    |neglect\w*|left\sout|off\sby|I\smissed|my\sbad|let\sme\s(?:correct|fix)|should\s(?:be|have)
    |answer\swould\sbe)\b""", re.I | re.X)
_CONCLUSION = re.compile(r"""\W*(?:so|thus|hence|therefore|then|since|altogether|in\s(?:total|all)
    |it(?:'s|\sis)|(?:s?he|they|we|I)\s(?:ha|ge|fin)\w+)\b | .*\b(?:answer|total|result|correct)\b
    """, re.I | re.X)
_DISBELIEF = re.compile(_any_word(r"""wrong false incorrect doubt wonder an?\slie guess claim\w* says? said
    suppos\w+ assum\w+ mistakes? nobody maybe perhaps possibly probably rule\sout
    (?:one|you|it)\s(?:might|could|should|may) no\s(?:reason|way|proof|sign)
    (?:not|n't|never|cannot)\s(?:true|clear|certain|think|believe|claim|say|agree|mean)""")
    + r"""| \b(?:might|could|may)\sbe\s*\Z | \bif\b.*\swould\b | \b(?:if|unless|whether|let)\b[^,]*\Z
    | \A\W*without\b[^,]*\Z""", re.I | re.X)
_OBJECTION = re.compile(rf"{_DENIAL.pattern}|(?x:{_DISBELIEF.pattern})|" + _any_word(r"""without except next
    (?:exceed|exclud|fail|lack|reject|removed|discard|dream|pretend|wish|regret|estimate)\w* might debts? owes
    negative none nowhere hope[sd] roughly few seldom rarely hardly barely scarcely nearly almost bound
    at\s(?:least|most) places? (?<!-)digits? plus minus divided multiplied increased decreased squared
    doubled? tripled twice half reciprocal mod thinks (?:more|less|fewer)\sthan should\shave less\s\d
    times\s(?:the|that|it) (?<!\d\s)times\s(?:\d|two|three|four|five|ten)
    (?:about|around|over|under|below|above|close\sto|short\sof)\sa\s(?:total|sum|profit)\sof
    (?:percent|square|cube|root|log|opposite|inverse|factorial|remainder)\sof""")
    + r"|\?|\A\W*(?:(?:option|choice)\s)?(?-i:[B-HJ]\b|A(?:\W*[:.)=]|\sis\b))", re.I)
_BECAUSE = re.compile(r"""(?<=\S)\s\((?!\W*\d(?!.*\beach\b))(?=[^()\\]*[A-Za-z]{2}[^()\\]*\)\W*\Z)
    | [\s,;:.(-]{1,3}(?:because|since|as\ (?=it|the|they|we|shown|above)
      |(?:is|are)\ (?:the|our)\ (?:only\ )?(?:solution|answer)s?\W*\Z)""", re.I | re.X)
_FACTOR_BEFORE = re.compile(r"""(?:[-+*/^_}\d|≠]|\{\s*|(?<![A-Za-z])[<>]\s?|(?<!\\)\(|[\w}]\ [-+*/]\s
    |\d[,.:]?\s?(?:\\[,;:]\s?)?|\b\d*[b-z]\s
    |\\(?:neq?|cdot|times|[lg]eq?|[lg]t|pm|sqrt|ln|log|sin|cos|tan)(?:_\S+)?\s?)\$*\Z""", re.X)
_NTHS = r"\w*(?:four|fif|six|seven|eigh|nin|ten|leven|twelf|teen|tie|dred|sand|illion)ths?"
_FACTOR_AFTER = re.compile(rf"""
      \$?(?:\s|\\,)*(?:[-+*/!\d<>|?]|\\?%|\^(?!\{{?\\circ)|\.\d|(?:[,:]|\{{,\}})\s?\d)
    | \\(?!text|end|q?quad|mbox|p?mod|equiv)[A-Za-z] | [A-Za-z] | (?:\ |\\[,;:]\s?)[b-fi-kn-rt-z]\$
    | (?:[ $]|and\s)*\\(?:[dt]?frac|times|cdot|[lg]eq?|neq?|pm)(?![A-Za-z])
    | (?:\W|\\text)*(?:or|was|should|could|might|may|and\W*\d|and\s\w+\s(?:half|third|quarter)
        |halves|thirds|{_NTHS}|tens|squared|cubed|plus|minus|out\sof|(?:times|to|(?:more|less)\sthan)\W*\d|times\s(?:two|three|four|five|ten))\b
    | \W*[(\[][^)\]\n]*\b(?:wrong|incorrect|off\sby|doubled|tripled|halved|real\sanswer|should)\b
    | [^.\n]*\b(?:but|however)\b | [^.,;:\n]*\b(?:dozen|hundred|thousand|[mb]illion|lakh|crore)""", re.X)


def visible(text: str) -> str:
    """The text without its thoughts: what stands outside <think> ... </think>, or tags like these. An unclosed
    one hides the rest; a </think> that the prompt opened hides what stands before it."""
    outside = _THOUGHT.sub("", text)
    return re.split(_CLOSER, outside, flags=re.I)[-1]


def opened_thought(prompt: str) -> str:
    """The tag, such as <think>, with which a prompt has opened a thought; "" if it has not."""
    opened = re.search(rf"{_OPENER}(?=\s*\Z)", prompt, re.I)
    return opened[0] if opened else ""


def extract_answer(text: str, marker: str = MARKER) -> str | None:
    r"""Return the final answer that a response states, or None where it marks none.

    What follows the last use of `marker` counts (the usual one in any case, as "final answer is" or a heading
    too), else of the last five among \boxed{}, "####", "the answer is", "Answer:", <answer>, 答案 and a last
    line "A:" the last that holds. Boxes joined by "and" are one list. A sentence that the next one takes back
    comes with it: it equals nothing but what the next one states. Another value, marked after the one of the
    marker, comes with it, after "or". Raises TypeError for what is no text.

    >>> extract_answer("First 7. **Final Answer**: $\\boxed{\\frac{1}{2}}$. I checked it.")
    '\\frac{1}{2}'
    """
    _require_text(text, marker)
    text = _shown(text)
    mark = _FINAL if marker == MARKER else re.compile(re.escape(marker))
    ends = [use.end() for use in mark.finditer(text)]
    rest = text[ends[-1]:] if ends else ""
    if ends and marker.endswith("{") and (stop := _box_end(text, ends[-1] - 1)):
        rest = text[ends[-1]:stop - 1]
    found = _sentence(rest)
    lines = rest.lstrip(" \t\r\n:*=").partition("\n")[2]
    if found.endswith(":") and lines.strip():  # "Final Answer: The sum is:", and a display on the next lines
        rest = lines
        found = _sentence(rest)
    if found:
        if _BOX.search(found):
            found = _boxed(rest) or rest
        stated = _last_cued(found) or found  # "Final Answer: the answer is 5"
        later = _last_cued(rest) if mark is _FINAL else None
        return f"{stated} or {later}" if later and _is_another(later, stated) else stated
    return _last_cued(text)


def _require_text(*texts):
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a response, an answer and a marker are text (str), not {type(text).__name__}")


def _shown(text):
    shown = visible(text).strip() or text
    return shown[-MAX_RESPONSE:].translate(_PUNCTUATION).replace("...", "…")  # no full stops


def _last_cued(text):
    for use in list(_CUE.finditer(text))[:-6:-1]:
        if found := _boxed(text) if "box" in use[0] else _sentence(text[use.end():]):
            return found


def _is_taken_back(after, stated):
    """Whether what follows a statement retracts it, is hardly more than another value, or ends with one."""
    after = _GAP.sub("", re.sub(r"\A(?:\W*\w+>)+", "", after[:MAX_CHARS]))  # and closing tags
    following = _CUE_END.split(after, maxsplit=1)[0]
    if _RETRACTION.search(after) or re.match(r"\(?[A-J][).:]", following):  # another option
        return True
    short, words = re.subn(r"(?<![\\A-Za-z])[A-Za-z']{2,}|\b[aI]\b", "", following)
    if words > 4 or re.match(r"(?i)\W*(?:we )?(?:check|verif|note).*=", following):
        short = ""
    last = _SENTENCE_END.split(after.strip().rpartition("\n")[2])[-1]
    ending = _prose_value(last.replace("answer", "total")) if _CONCLUSION.match(last) else None
    return any(_is_another(value, stated) for value in (short.lstrip(" :"), ending) if value)


def _is_another(value, stated):
    with decimal.localcontext(_CONTEXT):
        is_value = re.search(r"\w", value) and _parse(_clean(value)) is not None
    return (is_value or re.match(r"\(?[A-J][).:]", value)) and not grade(stated, value)


def _boxed(text):
    """The content of the last box, after that of boxes joined to it by a comma, "and" or "or"; or None where
    there is none, or it is not closed, denied, or a part of a formula."""
    found = []
    start = len(text)
    for box in reversed(list(_BOX.finditer(text))):
        end = _box_end(text, box.end())
        if end is None or end > start:
            break
        between = text[end:start]
        if found and between.strip(" $.\n") and not _JOINT.fullmatch(between):
            break
        content = text[box.end():end].removeprefix("{").removesuffix("}").strip()
        if not found and _is_overruled(between, content):
            return None
        found.insert(0, content)
        start = box.start()
    before = text[max(0, start - 60):start]  # about a clause
    clause = re.split(r"[.;:!=\n]|, ?(?:so|but|or)\b", before.replace("$", ""))[-1]
    words = _TO_LAST_VERB.sub("", clause).lstrip()  # right before the box
    is_denied = _OBJECTION.search(words) or _DISBELIEF.search(clause)
    if is_denied or _FACTOR_BEFORE.search(before[-15:]):
        return None
    return ", ".join(dict.fromkeys(found)) or None


def _is_overruled(after, content):
    """Whether what follows a box makes it part of a formula, denies it in its sentence, or takes it back."""
    sentence, *rest = _CUE_END.split(after, maxsplit=1)
    words = re.split("[.,;\n]", sentence[:20])[0]
    is_denied = _DENIAL.search(f". {words}") and not re.match(r"[\s$,(]*not\s[$(]*(?:\d|[A-J]\b)", after)
    clause = re.split(r"(?=[,;]\s|\((?=[a-z]{2})|\band\b)", sentence)[-1]
    clause = _BECAUSE.split(clause)[0].strip(" ,;().$").replace("answer", "total")
    ending = clause and _prose_value(clause, is_earnest=False)
    return (_FACTOR_AFTER.match(after) or is_denied or ending and _is_another(ending, content)
            or rest and _is_taken_back(rest[0], content))


def _box_end(text, start):
    if text[start] != "{":  # \boxed7
        return re.compile(r"\\[A-Za-z]+|\w").match(text, start).end()
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.end()


def _sentence(rest):
    """The sentence or display that opens the text; all of it where the next sentence takes that one back."""
    rest = rest.lstrip(" \t\r\n:*=")
    if display := re.match(r"(?:\$\$(.+?)\$\$|\\\[(.+?)\\\])[ .]*(?:\n|\Z)", rest, re.S):
        return (display[1] or display[2]).strip()
    line, *following = _CUE_END.split(rest, maxsplit=1)
    is_question = rest.startswith("?", len(line))
    return _bare(rest if is_question or following and _is_taken_back(following[0], line) else line)


def grade(response: str, answer: str, marker: str = MARKER) -> bool:
    """Whether a response's final answer, or without one the response itself, is equivalent to `answer`: the
    gold answer alone, or a solution of GSM8K's, which has it after ####. If that is prose ("The largest is
    $34$ of them"), the one value counts that the last sentence of its last line states; in an announced
    sentence ("Final Answer: Josh makes a profit of $70.") its only number.

    >>> grade("Half of 14 is 7. Final Answer: 7 apples", "7"), grade("It is not 7.", "7")
    (True, False)
    """
    _require_text(response, answer, marker)
    answer = answer.rpartition("####")[2]
    announced = extract_answer(response, marker)
    prediction = announced or _shown(response)
    if is_equiv(prediction, answer):
        return True
    values = _prose_value(prediction), _only_number(announced or "")
    return any(is_equiv(value, answer) for value in values if value not in (None, prediction))


def reward(response: str, answer: str, marker: str = MARKER) -> int:
    """The outcome of a solution: +1 if its final answer is right, else -1."""
    return 1 if grade(response, answer, marker) else -1


# The value that a sentence states: all that stands between its verb and a circumstance at its end

_VERBS = _any_word(r"""is are was were equals? has have had gets? got makes? made gives? giving becomes?
    costs? needs? takes? pays? paid earns? yields? did (?:stands|travels|meets?)\sat increases\sby
    started\swith (?:comes?|evaluates|simplifies)\sto find\sthat total\sof there""")
_TO_LAST_VERB = re.compile(rf"\A.*\b(?<!not\s)(?<!n't\s)(?<!never\s)(?<!neither\s)(?:{_VERBS}|\bbe\b)", re.I)
_OTHER_VERB = r"""\b(?:(?:will|can|must|(?:has|had|have|needs?)\sto)\s(?!be\b)[a-z]+
    |(?:bak|carri|contain|collect|cover|earn|fill|pick|plant|produc|rais|receiv|sav|scor|travel|us|walk|work
    )e?[sd]|(?:buy|drive|eat|give|keep|read|sell|spend|weigh)s|gave|wrote|took|spent|kept|ate|bought|sold|ran
    )(?:\s(?:only|exactly|together))? (?=[^A-Za-z]*(?:\$|\d\W{0,3}\s[a-z]))"""  # money, or so many things
_PROSE = re.compile(rf"""
    (?: .*\s(?=\d+\s\w+\sago\b) | \W*(?:result|total|solution|therefore|ans)\W*[:.]\W*\s+
      | .*(?:[A-Za-z]{{4,30}}\s{{0,3}}=|(?:{_VERBS}|will\sbe)(?:\s(?:at|only|exactly|together|him|her|them))?
         |{_OTHER_VERB}|'s\b|:(?=\s*(?:\$|\\[(\[])))\s+
      | (?:(?:so|thus|hence|therefore|in\stotal|in\sall|altogether)\b,?\s+)?)
    (?P<value>(?![a-z]{{2,}}\s|.*\\f?box)(?=.*(?:\d|\\[a-z]))\S.*?)
    (?:,?\s(?:(?:(?:is|are)\s)?(?:left|needed)|ago|remain(?:s|ing)?|long|old|now|only|here|today
       |for\sit|of\sthem|(?:al)?together|(?:after|in)\s\d+\s(?:hour|minute|day|week|month|year)s?
       |(?:after|in|on|at|from|last)(?:\s[A-Za-z]{{2,}}|\sa\b){{1,4}}))*""", re.I | re.X)
_OF_SOMETHING_ELSE = re.compile(rf"""  # before a value: 2x is 7; he tries to buy 7; Ann has 5, Ben has 7
    (?:\A|[,;:]|\b(?:so|then|thus|hence|therefore|that|and)\b) (?=[^,;:]*(?<![a-z])[a-z](?![a-z]))
      (?=[^,;:]*(?:[-+*/^|]|\\(?:frac|sqrt|cdot|times)|\d\s?\(?[a-z](?![a-z])))
      (?:\\[a-z]+|(?![a-z]{{2}})[^,;:=])*\b{_VERBS}\s+\Z
    | (?<!has)(?<!had)(?<!have)(?<!need)(?<!needs)\sto\s(?!get)\w+\s+\Z | \A[^\d]*\sto\sget\s+\Z
    | (?-i:\banswers?\s) | \bwho(?:ever)?\s(?:\w+\s)+\Z | (?:{_VERBS}|{_OTHER_VERB})[^A-Za-z]*\d
      (?!.*\b(?:so|thus|hence|therefore|but)\b) .*\Z""", re.I | re.X)
_BOLD = re.compile(r"(?<![\w)\]}*])\*\*(?=\S)([^*\n]+?)(?<=\S)\*\*(?![\w(*])")


def _prose_value(text, is_earnest=True):
    """The value that the last sentence states, as text; None where it states a second one in the same words,
    or, if it must be in earnest, where it denies or doubts it."""
    text = _BOLD.sub(r"\1", _translate(text[-MAX_CHARS:].partition("<|")[0]))
    last_line = _WRAPPED.sub(r" \1 ", text).strip().rpartition("\n")[2]
    *earlier, sentence = [part.rstrip(" .") for part in _SENTENCE_END.split(last_line)]
    stated = _PROSE.fullmatch(_BECAUSE.split(sentence)[0])
    if stated is None:
        return None
    lead = sentence[:stated.start("value")]
    others = sentence.replace(stated["value"], "", 1)
    is_repeated = lead and any(part.startswith(lead) and part != sentence for part in earlier)
    is_doubted = is_earnest and (_OBJECTION.search(f". {others}") or _OF_SOMETHING_ELSE.search(lead))
    return None if is_repeated or is_doubted else stated["value"]


_BEFORE_NO_VALUE = re.compile(_any_word(r"""\w*ly about above after all an? and another any around as at
    before below between beyond both but by each every exceeds? few for from grade his her if in into item its
    least less like line minus more most my near no not number of off on or option our over page part past per
    plus point question several since some step than that the their these this those through till times to
    towards? under until up versus with within without your""") + r"\Z", re.I)
# A second value in words; two to ten only after "and", as "two weeks" are mostly a circumstance
_SECOND = re.compile(r"""\b(?:eleven|twelve|hundred|(?:twen|thir|fou?r|fif|six|seven|eigh|nine)(?:ty|teen))\b
    | \band\s.*\b(?:two|three|four|five|six|seven|eight|nine|ten|half|halves|thirds|quarters)\b""", re.I | re.X)
_ONE_NUMBER = re.compile(r"""(?P<lead>[A-Z][A-Za-z.'-]*\s[A-Za-z\s.,'-]*[A-Za-z])\s
    (?P<value>\$?\d(?:[\d,]*\d)?(?:\.\d+)?)(?:\s(?P<unit>[a-z]+))?(?P<rest>(?:\s[A-Za-z'-]+)*)""", re.X)


def _only_number(sentence):
    """The only number of a sentence, with a unit after it; None where it may say something else: after a
    function word, of which there are few, or with a word of objection, or one that makes another number."""
    stated = _ONE_NUMBER.fullmatch(_BOLD.sub(r"\1", sentence).strip(" ."))
    if stated is None:
        return None
    lead, value, unit, rest = stated.groups(default="")
    is_sum = value.startswith("$") and re.search(r"\ban?\s[a-z]+\sof\Z", lead)  # a profit of $70
    is_compared = unit == "more" and " than " in rest  # 24 more girls than boys
    is_other = re.match(_NO_UNIT, unit) and unit not in _SCALES and not is_compared
    is_before = _BEFORE_NO_VALUE.search(lead) and not is_sum
    words = f"{lead} {unit}{rest}"
    is_denied = _OBJECTION.search(f". {words}") or _OF_SOMETHING_ELSE.search(f"{lead} ")
    if is_other or is_before or is_denied or _SECOND.search(words):
        return None
    return f"{value} {unit}" if unit in _UNITS or unit in _SCALES else value


# Equivalence: equal as option or as text, else read as mathematics and compared by value ------------------

MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_BITS, MAX_LIST = 2000, 200, 40, 4096, 30  # beyond: equal only as text

_GOLD_OPTION = re.compile(r"\(?([A-J])(?:[).:]?|\) (.+))", re.S)  # B, (B), or B) with the text of the option
_OPTION = re.compile(r"""[(\[]?([A-J])(?![\w'])([)\].:]*)
    (?: [\s,;:.(-]*\b(?:is\s(?:the\s)?(?:correct|right|best)(?:\s(?:option|choice|answer|one))?
       |not\s(?!\1)[A-J])[\s.)]* | (.*))""", re.I | re.S | re.X)
_AFTER_LETTER = re.compile(r"\s*[,:]?\s*(?:-\s)?(?P<bracket>\()?(?P<text>.*?)(?(bracket)\))", re.S)
_LETTER_THEN_WORDS = re.compile(r"""[\s,(:-]+(?:a\s|[A-Za-z]{2}|[\d$])
    (?!.*(?<![A-Za-z])(?:[B-HJ](?![A-Za-z'])|A\Z|[A-J][).:]))""", re.X)  # and no other letter
_BECAUSE_OR_WHICH = re.compile(_BECAUSE.pattern + r"|,\ which\b", _BECAUSE.flags)
_OTHERWISE = re.compile(_DENIAL.pattern + "|" + _any_word(r"""all none both any each others? every\w* well
    right eliminated guess\w* doubt\w* (?:is|so|in)\s(?-i:[A-J])""") + r"|\A\s*[/?]|\A\W*[A-J]\W*\Z", re.I)
_SPACE_BESIDE_SIGN = re.compile(r"(?<![A-Za-z\d])\s|\s(?![A-Za-z\d])")  # beside signs


def is_equiv(prediction: str, answer: str) -> bool:
    r"""Whether two answers mean the same: numbers, expressions, lists, tuples, intervals, equations, options.

    A unit, currency sign, delimiter, final full stop, thousands separator or "x =" does not change an answer.
    Tuples are ordered, brackets of intervals matter, lists and sets are unordered. Rational numbers are
    compared exactly. Runs no part of its input, is bounded by the MAX_ constants, raises only TypeError.

    >>> is_equiv(r"x = \frac{3}{4}", "0.75"), is_equiv("(a+b)^2", "a^2+2ab+b^2"), is_equiv("[0,1)", "[0,1]")
    (True, True, False)
    """
    _require_text(prediction, answer)
    prediction, answer = map(_clean, (prediction, answer))
    if not prediction or not answer or max(len(prediction), len(answer)) > MAX_CHARS:
        return prediction == answer != ""
    option = _GOLD_OPTION.fullmatch(_WRAPPED.sub(r"\1", answer))
    with decimal.localcontext(_CONTEXT):
        if option:
            return _is_option(_WRAPPED.sub(r"\1", prediction).replace("**", ""), *option.groups())
        return _same_answer(prediction, answer)


def _is_option(prediction, letter, text):
    """Whether that letter is chosen, alone, with its text or with a reason; or that text given."""
    label = re.match(r"\(?([A-J])(?:\)|:|\s*=|\sis\b)", prediction)
    if text and (label is None or label[1] == letter) and _same_answer(prediction, text, is_option=True):
        return True
    chosen = _OPTION.fullmatch(prediction)
    if chosen is None or chosen[1].upper() != letter:
        return False
    rest = chosen[3] or ""
    if not rest.strip():
        return True
    words, *why = _BECAUSE_OR_WHICH.split(rest, maxsplit=1)
    parts = [rest, words] if why and not _OTHERWISE.search(f". {why[0]}") else [rest]
    if not words.strip():
        return words in parts
    if not chosen[2] and not re.match(r"\s*[,(:-]", rest):
        return False
    if text:
        return any(_same_answer(_AFTER_LETTER.fullmatch(part)["text"], text) for part in parts)
    return bool(_LETTER_THEN_WORDS.match(words)) and not _OTHERWISE.search(rest)


def _same_answer(prediction, answer, is_option=False):
    """By value where both are mathematics, else as text."""
    if _SPACE_BESIDE_SIGN.sub("", prediction) == _SPACE_BESIDE_SIGN.sub("", answer):
        return True
    left = _parse(prediction)
    right = _parse(answer)
    if left is None or right is None:
        is_wrapped = _WRAPPED.fullmatch(prediction) or _WRAPPED.fullmatch(answer)
        return _plain(prediction, is_wrapped) == _plain(answer, is_wrapped)
    return _same(left, right, is_option)


# Text, cleaned of what does not matter: _shown strips a response, _bare a statement, _clean either answer,
# _plain what is no mathematics

_WRAPPED = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname)\s*\{([^{}]*)\}")
_LATEX_SPACE = re.compile(
    r"(?<!\\)\\[,;:\s]|(?<=\w)~(?!~)|\\q?quad|\\(?:left|right|[bB]igg?[lrm]?|displaystyle)(?![A-Za-z])")
_MONEY = re.compile(r"\A([^$]*?)(?<![\d.])(?:\\?\$|\b(euros|pounds))"
                    r"\s*([\d.,]+(?:\s(?:thousand|[mb]illion))?)(?=[^$\w]*\Z)")
_DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]")
_CONNECTIVE = re.compile(r"\A(?i:therefore|thus|hence|so|then|finally|option|choice|answer|exactly)\b,?\s*"
                         r"(?=[^\sA-Za-z]|[A-Z]\b|[b-z]\b)")  # before a value, a letter
_BASED = re.compile(r"\A\(?([\dA-Z.]+)\)?_\{?\s*(\d+)\s*\}?\Z")  # (101)_{2}
_UNICODE = str.maketrans("−–—×·⋅÷⁄’\0", "---***//' ") | str.maketrans({
    "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "θ": r"\theta ", "±": r"\pm ", "∪": r"\cup ",
    "∈": r"\in ", "∅": r"\emptyset ", "≈": r"\approx ", "≤": "<=", "≥": ">=", "≠": "!=",
    "€": " euros ", "£": " pounds "})


def _clean(text):
    if text.isalnum() and text.isascii():  # faster
        return text
    if "box" in text:
        text = _boxed(text[-MAX_RESPONSE:]) or text
    if len(text) > MAX_CHARS:
        return text.strip()
    text = _translate(text).replace("{,}", ",").replace(r"\varnothing", r"\emptyset")
    if "\\" in text or "~" in text:
        text = _LATEX_SPACE.sub(" ", re.sub(r"\\!\s*", "", text))
    text = _MONEY.sub(lambda money: f"{money[1]}{money[3]} {money[2] or 'dollars'}", text)
    text = _bare(_DELIMITERS.sub(" ", text)).rstrip(" .;,:\n\\")
    return _BASED.sub(r"\1_\2", _CONNECTIVE.sub("", text)).rstrip(" .$✓✔✅🎉\ufe0f").lstrip()


def _bare(text):
    """Without quotes, bold marks and full stop around it; a * after a space, of a product cut off, stays."""
    text = text.lstrip(" \t\r\n*`\"'").rstrip(" \t\r\n`\"'.")
    return re.sub(r"(?<=[^\s*])\*+\Z", "", text).rstrip(" .`\"'")


def _translate(text):
    """Plain ASCII for the signs, fractions and digits that have one."""
    if text.isascii():  # faster
        return text.replace("...", "…").replace("\0", " ")
    text = re.sub("[²³¹⁰⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}", text)
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)  # 2½ is not 21/2
    return unicodedata.normalize("NFKC", text).replace("...", "…").translate(_UNICODE)


def _plain(text, is_folded):
    """Text without wrappers, delimiters, full stop and spaces beside signs. Case counts in formulas, and
    where words have a capital inside, such as genes."""
    text = " ".join(_WRAPPED.sub(r" \1 ", text).split()).rstrip(" .")
    if is_folded or "\\" not in text and not re.search(r"[A-Za-z][A-Z]", text):
        text = text.casefold()
    return text


# Reading: text becomes tokens (kind, value), tokens become expressions, groups and relations


class Expression(NamedTuple):
    """A formula: its values at a few points (one if it has no letter), each a Fraction, a Decimal of DIGITS
    digits where a root, a function, pi or e entered, or None where undefined; and the words after it."""
    values: tuple
    unit: str = ""


class Group(NamedTuple):
    """A tuple or interval (form "()" or "[)"), a row of a matrix, a ratio (":"), a "time", a set ("{}")."""
    form: str
    items: tuple


class Relation(NamedTuple):
    """Its signs, left minus right side at each, and the name that it gives a value: x > 5 gives x (5, ∞)."""
    signs: str
    gaps: tuple
    name: str | None
    value: Expression | Group | None


_INFINITY = Expression((Fraction(1),), "∞")  # no arithmetic but a sign
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}


def _table(spellings):
    """{spelling: the first of its group}."""
    return {name: group.split()[0] for group in re.split("[;\n]", spellings) for name in group.split()}


_UNITS = _table("""millimeter mm; centimeter cm; kilometer km; inch inche in; foot feet ft; yard yd; mile mi
    kilogram kg; milligram mg; pound lb; ounce oz; milliliter ml mL; hour hr; minute min; second sec; mph
    % percent; ° degree; dollar usd; point; meter; gram; liter; day; week; month; year; unit; cent; am; pm""")
_UNITS |= {f"{name}s": unit for name, unit in _UNITS.items()}
_UNITS |= {"m": "meter", "g": "gram", "l": "liter", "h": "hour", "s": "second"}  # else variables, see _TOKEN
_ESSENTIAL = {"am", "pm", "cent", "∞"}  # units without which it is another answer
_NO_UNIT = _any_word(_NTHS + r""" half halves thirds? quarters? tens zeros? pairs? scores? gross mil bn mn
    dozens? hundreds? thousands? \w+illions? lakhs? crores? (?:one|two|three|four|five|seven|eight|nine)s?
    six(?:es)? ten eleven twelve \w+fold (?:twen|thir|fou?r|fif|six|seven|eigh|nine)(?:ty|ties|teen)
    squares squared cubes cubed roots factorials? remainders? kilo halved negative mod plus minus times digits
    more less fewer too fails is was has not no nor or and but than with without to from by over under""")
_UNIT_PHRASE = re.compile(rf"""(?!.*(?:{_NO_UNIT}))(?:(?!of\s)[a-z]+\s){{0,2}}(?P<noun>[a-z.]+)(?:\^[23])?
    (?:\s(?:per|(?<!cent\s)(?<!cents\s)of)\s[a-z.]+)?""", re.X)


_KINDS = _table(r"""* \cdot \times; ^ **; , and or \cup; sqrt \sqrt; frac \frac \dfrac \tfrac; \pi pi e
    ≈ \approx; ≠ \ne \neq !=; < \lt; ≤ \le \leq <=; > \gt; ≥ \ge \geq >=; ∈ \in
    % \%; ∞ \infty; \langle; \rangle""")
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|omega|Delta|Omega|pm"
_NO_PRODUCTS = {*_UNITS, *_KINDS, *"mod is of csc cot exp lim max gcd lcm det one two six ten not".split()}
_SHORT = "|".join(word for word in sorted(_NO_PRODUCTS) if re.fullmatch("[A-Za-z]{2,3}", word))
_TOKEN = re.compile(rf"""\s?(?:
      (?P<num>(?:(?<!,)\d{{1,3}}(?:[, ]\d{{3}})+(?!\d|,\S)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?![.]\d)
              (?:[eE][+-]?\d{{1,3}}(?![A-Za-z\d]))?)
    | \\?(?P<fn>ln|log|sin|cos|tan|(?<=\\)sec)(?=[xyzt]?(?![A-Za-z]))  # \sin, sin or sinx; 5 sec are seconds
    | (?P<word>(?:{_WRAPPED.pattern}
                 | (?<![A-Za-z\\])(?:[A-Za-z]{{4,}}|(?<=\s)[A-Za-z]{{3}}|(?:{_SHORT})s?)(?![A-Za-z])
                 | (?<=\d\ )[mgL](?=[\s^{{}}23]*\Z|/) | (?<=[mi]/)[hs](?![A-Za-z]))
               (?:\s?\^\s?\{{?[23]\}}?)?)  # and its power
    | (?P<name>(?:[A-Za-z]|\\(?:{_GREEK})(?![A-Za-z]))(?:\s?_\s?(?:\{{[\w\s,+-]*\}}|\w))?)
    | (?P<command>\\[A-Za-z]+)
    | (?P<sign>\*\*|[<>!]=|\\[\\{{}}%]|[-+*/^_=<>:;,(){{}}\[\]&%°]) | (?P<unknown>.))""", re.X)


@functools.lru_cache(maxsize=4096)
def _parse(text):
    """What a text lists, as an unordered group, or None if it is not mathematics."""
    is_range = re.fullmatch(r"\d+\s*-\s*\d+", text)  # or a difference: 4-6 is not 7-9
    if len(text) > MAX_CHARS or is_range or _is_words(text):
        return None
    parts = []
    closer = ""
    try:
        reader = _Reader(_tokens(text))
        while closer != "end of text":
            found, closer = reader.items(";", "end of text")
            parts.append(found)
    except (ValueError, LookupError):
        return None
    pairs = [_named_values(part) for part in parts]  # x=1, y=2; x=3, y=4
    if None not in pairs and not re.search(r"\bor\b", text):
        return _set(pairs)
    return _set(sum(parts, []))


_LETTERS = re.compile("(?i:[^eilo])[^A-Zeilo]|[^A-Zaeiou]{3}|[abc]{3}|[uvw]{3}")  # xy is yx; cat is not act


def _is_words(text):
    """Whether there are only words, which are no product of letters; "ab" is one, "on" is not."""
    if re.search(r"[^A-Za-z\s,.'-]", text):
        return False
    known = _KINDS.keys() | _FUNCTIONS.keys()
    words = re.findall(r"[A-Za-z]{2,}", text)
    return any(word.casefold() not in known and not _LETTERS.fullmatch(word) for word in words)


_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{\s*(\d+)\s*\}")
_MIXED = re.compile(r"(?<![\d.^_/])(\d+)(?:\s+(\d+)\s*/\s*(\d+)|\s*\\[dt]?frac\{(\d+)\}\{(\d+)\})")
_TUPLE = re.compile(r"[(\[]\s*[^\s()\[\]]+\s*[)\]]|(?:\\|\A)\{\s*[^\s{}]+\s*\\?\}")
_MATRIX = re.compile(r"\\begin\s*\{(?:[bp]?matrix|array)\}(?:\s*\{[clr|\s]*\})?(.*?)\\end\s*\{\w+\}", re.S)


def _repeating(match):
    """0.1\\overline{6} is 0.1 + 6/90."""
    whole, start, period = match.groups()
    return f"({whole}.{start}0+{period}/{'9' * len(period)}{'0' * len(start)})"


def _mixed(match):
    """1 1/2 and 1\\frac12 are 3/2, but 1\\frac32 is a product."""
    whole, over, under = filter(None, match.groups())
    return f"({whole}+{over}/{under})" if int(over) < int(under) else match[0]


def _matrix(match):
    """A tuple of rows, and a column as one of numbers."""
    rows = re.split(r"\\\\(?:\s*\[[\d.]*\w\w\])?", match[1])  # \\[4pt] is a space between rows
    rows = [rf"\langle {row} \rangle" if "&" in row else row for row in rows if row.strip()]
    return f"({','.join(rows)})".replace("&", ",")


def _tokens(text):
    text = text.replace(r"\langle", "(").replace(r"\rangle", ")")
    text = re.sub(r"(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ\b|°)|°)(?:\s*C\b)?", "°", text)
    text = re.sub(r"\\pm(?![A-Za-z])", r"+\\pm *", text)  # ± is one more letter, and a factor
    text = re.sub(r"frac\s*(\d)", r"frac{\1}", text)  # \frac12 is 1/2
    text = re.sub(r"(frac\s*\{\d+\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"(?<=\d)\s*x\s*(?=10\s*\^)", "*", text)  # 1.5 x 10^3
    text = re.sub(r"\b(?:an?|each|every)(?= (?:hour|minute|day|week|month|year)\b)", "per", text)
    text = _REPEATING.sub(_repeating, _MIXED.sub(_mixed, _MATRIX.sub(_matrix, text)))
    text = _TUPLE.sub(lambda match: match[0].replace(",", ", "), text)  # (1,200) is a pair
    tokens = []
    for match in _TOKEN.finditer(" ".join(text.split())):
        kind = match.lastgroup
        value = match[kind]
        if kind == "word":
            value = re.sub(r"[{}]|\s*(?=\^)", "", _WRAPPED.sub(r"\1", value)).strip()
            kind = "num" if value.isdigit() else _KINDS.get(value.casefold(), "word")
        elif kind == "name":
            value = re.sub(r"[\s{}]", "", value)
            kind = _KINDS.get(value, kind)
        elif kind in ("command", "sign"):
            kind = _KINDS.get(value, value if kind == "sign" else kind)
        if kind in ("unknown", "command") or len(tokens) == MAX_TOKENS:
            raise ValueError("no sign of mathematics, or too long")
        tokens.append((kind, value))
    return [*tokens, ("end of text", "")]


_BRACKETS = {"(": ")]", "[": ")]", "{": "}", r"\{": (r"\}",), r"\langle": (r"\rangle",)}
_STARTS = {"name", r"\pi", "∞", "frac", "sqrt", "fn", *_BRACKETS}  # of a factor without a sign before it


class _Reader:
    """Recursive descent: one method a level of binding, loosest first."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.at = 0
        self.depth = 0

    def peek(self):
        return self.tokens[self.at][0]

    def take(self, *kinds):
        """Step over the next token and return it if it is one of these kinds; else None."""
        token = self.tokens[self.at]
        if token[0] in kinds:
            self.at += 1
            return token

    def items(self, *closers):
        """What is listed up to one of the closing symbols, and that symbol."""
        found = []
        while not (closer := self.take(*closers)):
            while self.take(","):
                pass
            found.append(self.relation())
            if self.peek() not in (",", *closers):
                raise ValueError(f"{self.peek()} in a list")
        return found, closer[0]

    def relation(self):
        signs = ""
        terms = []
        names = []
        sign = True
        while sign:
            start = self.at
            terms.append(self.ratio())
            names.append(_name(self.tokens[start:self.at]))
            if sign := self.take(*"=≈≠<≤>≥∈"):
                signs += sign[0]
        return _relation(signs, terms, names) if signs else terms[0]

    def ratio(self):
        start = self.at
        parts = [self.quantity()]
        while self.take(":"):
            parts.append(self.quantity())
        return _ratio(parts, self.tokens[start:self.at]) if len(parts) > 1 else parts[0]

    def quantity(self):
        """A sum with the words after it: cm^2, miles/hour."""
        node = self.term()
        while self.peek() in ("+", "-"):  # the next factor takes it
            node = _apply(operator.add, node, self.term())
        words = []
        while word := self.take("word", *("/" if words else "")):
            words += ["per"] if word[0] == "/" else word[1].casefold().replace("/", " per ").split()
        return _measured(node, words) if words else node

    def term(self):
        node = self.factor()
        while (sign := self.take("*", "/")) or self.peek() in _STARTS:
            operate = operator.truediv if sign and sign[0] == "/" else operator.mul
            node = _apply(operate, node, self.factor())
        return node

    def factor(self, marks="^%°"):
        """An operand with its signs and the `marks` after it. Every recursion passes here."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("too deep")
        is_negative = False
        while sign := self.take("+", "-"):
            is_negative ^= sign[0] == "-"
        node = self.atom(*self.take(self.peek()))  # whatever comes
        while self.take(*marks[:1]):
            node = _apply(_power, node, self.factor("^"))
        if is_negative:
            node = _negative(node)
        while mark := self.take(*marks[1:]):
            node = Expression(_operand(node), mark[0])
        self.depth -= 1
        return node

    def atom(self, kind, value):
        """The operand that begins with the token (kind, value), which was taken."""
        if kind == "num":
            return _number(re.sub("[, ]", "", value))
        if kind == "name":
            return _letter(value)
        if kind == "∞":
            return _INFINITY
        if kind == r"\pi":
            return Expression((Decimal(1).exp() if value == "e" else _PI,))
        if kind == "frac":
            return _apply(operator.truediv, self.factor(""), self.factor(""))
        if kind == "sqrt":
            degree = self.items("]")[0][0] if self.take("[") else _number(2)
            return _apply(_power, self.factor(""), _apply(operator.truediv, _number(1), degree))
        if kind == "fn":
            return self.function(_FUNCTIONS[value])
        if kind not in _BRACKETS:
            raise ValueError(f"{kind} begins no operand")
        found, closer = self.items(*_BRACKETS[kind])
        if len(found) == 1 and kind + closer in ("()", "[]", "{}"):
            return found[0]
        return _set(found) if closer in ("}", r"\}") else Group(kind + closer, tuple(found))

    def function(self, function):
        """The power and the argument of a named function: `\\sin^2 x`, `\\cos 2x`."""
        power = self.factor("^") if self.take("^") else _number(1)
        if power == _number(-1):
            raise ValueError("an inverse function")
        if self.peek() in _BRACKETS:
            argument = self.factor("")
        else:
            argument = self.factor()
            while self.peek() in _STARTS and self.peek() not in ("fn", "(", "["):
                argument = _apply(operator.mul, argument, self.factor())
        return _apply(_power, _apply(function, argument), power)


def _negative(node):
    if node == _INFINITY:
        return node._replace(values=(Fraction(-1),))
    return _apply(operator.neg, node)


def _measured(node, words):
    """The value with the words after it: those of scale as factors, the others as its unit in one spelling,
    centimeters as cm. A unit is a known one, a plural, or of one thing any word that does not deny it."""
    while words and words[0] in _SCALES:
        node = _apply(operator.mul, node, _number(_SCALES[words.pop(0)]))
    if not _are_plain([node]):
        raise ValueError("words after a group or a unit")
    if not words:
        return node
    phrase = _UNIT_PHRASE.fullmatch(" ".join(words))
    noun = phrase["noun"] if phrase else ""
    is_plural = re.search("[^s]s$|people|children|(?:men|sheep|fish|teeth)$", noun)
    is_thing = node.values == (1,) and noun and not _OBJECTION.search(phrase[0])
    if noun.replace(".", "") not in _UNITS and not is_plural and not is_thing:
        raise ValueError(f"{words} are no unit")
    spelled = [_UNITS.get(word.replace(".", ""), word.removesuffix("s")) for word in words]
    return node._replace(unit=" ".join(spelled))


def _ratio(parts, tokens):
    """1:2, or a time of the day, which has no multiples."""
    if not _are_plain(parts):
        raise ValueError("a ratio of groups")
    text = "".join(value for _, value in tokens)
    is_time = re.fullmatch(r"(?:[01]?\d|2[0-4])(?::[0-5]\d)+", text)
    return Group("time" if is_time else ":", tuple(parts))


def _are_plain(terms):
    return all(isinstance(term, Expression) and not term.unit for term in terms)


def _name(span):
    """The name that the tokens are: x, f(x), (x, y), dy/dx; else None."""
    if not {kind for kind, _ in span} <= {"name", "(", ")", ",", "/", ":", "frac", "{", "}"}:
        return None
    name = " ".join(value for _, value in span)
    return None if _DENIAL.search(name.replace("_", " ")) else name


def _relation(signs, terms, names):
    """A relation with < and ≤ for > and ≥; z in S is S, and x < 5 gives x (-infinity, 5)."""
    if signs == "∈" and names[0] and isinstance(terms[1], Group):
        return terms[1]
    if set(signs) <= set("=≈"):
        return _equation(signs, terms, names)
    if set(signs) <= set(">≥"):
        signs = signs[::-1].replace(">", "<").replace("≥", "≤")
        terms = terms[::-1]
        names = names[::-1]
    name = value = None
    if set(signs) <= set("<≤") and len(terms) < 4:
        i = 0 if names[0] and len(terms) == 2 else 1
        name = names[i]
        ends = [_negative(_INFINITY), *terms, _INFINITY]
        openers = ["[" if sign == "≤" else "(" for sign in f"<{signs}"]
        closers = ["]" if sign == "≤" else ")" for sign in f"{signs}<"]
        value = Group(openers[i] + closers[i], (ends[i], ends[i + 2]))
    return Relation(signs, _gaps(terms), name, value if name else None)


def _equation(signs, terms, names):
    """A chain of equations gives its name, or the sum on its left, or nothing, the value that it works out:
    x = 1 + 1 = 2 gives 2, x = 2 = 3 and x = y = 2 no value. What follows ≈ must round that value."""
    name = names[0]
    signs = "=" + signs[1:] if name else signs  # x ≈ 0.33 gives x 0.33
    exact = signs.find("≈") + 1 or len(terms)
    has_letter = [isinstance(term, Expression) and len(term.values) > 1 for term in terms]
    is_named_sum = exact > 2 and has_letter[0] and not any(has_letter[1:])  # p + q = 1 + 1 = 2
    worked = terms[1:exact] if name or is_named_sum else terms[:exact]
    value = worked[-1]
    is_formula = not name and has_letter[exact - 1]
    if is_formula or not all(_same(term, value) for term in worked):
        value = None
    elif not all(_are_plain([term, value]) and _is_rounding(term.values[0], value.values[0])
                 for term in terms[exact:]):
        raise ValueError("no rounding of the value before it")
    letters = re.findall(r"\b[A-Za-z]\b", name or "")
    if isinstance(value, Group) and letters != sorted(letters):  # (y, x) = (2, 5)
        value = None
    return Relation("=" * (exact - 1), _gaps(terms[:exact]), name, value)


def _gaps(terms):
    """The left side minus the right one at each sign, for formulas."""
    if not _are_plain(terms):
        return ()
    return tuple(_apply(operator.sub, left, right) for left, right in zip(terms, terms[1:]))


def _set(nodes):
    """An unordered group; sets among the nodes, as in a union, lend it their members."""
    members = []
    for node in nodes:
        members += node.items if isinstance(node, Group) and node.form == "{}" else [node]
    return Group("{}", tuple(members))


def _named_values(nodes):
    """The tuple (1, 2) of x = 1, y = 2, in the order of the names; None for all else."""
    values = {node.name: node.value for node in nodes if isinstance(node, Relation) and node.name}
    letters = {name[0] for name in values}  # x_1 and x_2 are solutions, not a pair
    if len(letters) < 2 or len(letters) < len(nodes) or None in values.values():
        return None
    return Group("()", tuple(values[name] for name in sorted(values)))


# Comparing: containers by their parts, expressions by their values


def _same(a, b, is_option=False):
    if isinstance(b, Relation):
        a, b = b, a
    if isinstance(a, Relation):
        if isinstance(b, Relation):
            return _same_relation(a, b)
        return a.value is not None and _same(a.value, b)
    if isinstance(a, Expression) and isinstance(b, Expression):
        return _same_unit(a, b, is_option) and _agree(a.values, b.values)
    if type(a) is not type(b) or a.form != b.form or len(a.items) != len(b.items):
        return False
    if a.form == ":":
        ratios = [_apply(operator.truediv, *pair) for pair in zip(a.items, b.items)]
        return all(_agree(ratio.values, ratios[0].values) for ratio in ratios) and ratios[0].values[0] != 0
    if a.form != "{}":
        return all(map(_same, a.items, b.items))
    units = [{item.unit for item in group.items if isinstance(item, Expression)} - {""} for group in (a, b)]
    if units[0] != units[1] and max(map(len, units)) > 1:  # 2 hours and 30 minutes are not 30 and 2
        return False
    rest = list(b.items) if len(b.items) <= MAX_LIST else []
    for item in a.items:
        twin = next((i for i, other in enumerate(rest) if _same(item, other, is_option)), None)
        if twin is None:
            return False
        del rest[twin]
    return True


def _same_unit(a, b, is_option):
    """Whether both are the same, or one is missing that is not essential."""
    units = {a.unit, b.unit} - {""}
    if a.unit == b.unit or len(units) > 1 or not _ESSENTIAL.isdisjoint(units):
        return a.unit == b.unit
    if units == {"%"} and abs(a.values[0] or 0) < 1:  # 1/2 is not 1/2 %
        return False
    return not is_option or units <= set(_UNITS.values())  # 3 is not "3 neutrons", beside "3 protons"


def _same_relation(a, b):
    """Whether a's gaps are multiples of b's, as for 2x < 4 and x < 2; positive ones for an inequality."""
    if a.signs != b.signs or not a.gaps or len(a.gaps) != len(b.gaps):
        return False
    for sign, left, right in zip(a.signs, a.gaps, b.gaps):
        if any(_agree(gap.values, gap.values[:1]) for gap in (left, right)):  # without a free letter
            return False
        ratios = _apply(operator.truediv, left, right).values
        defined = [ratio for ratio in ratios if ratio is not None]
        if not _agree(ratios, tuple(defined[:1])) or sign in "<≤" and defined[0] < 0:
            return False
    return True


def _agree(left, right):
    points = _by_point(left, right) if left and right else []
    defined = [point for point in points if None not in point]
    return len(defined) >= min(len(points), 2) > 0 and all(_equal(x, y) for x, y in defined)


def _equal(x, y):
    """Rational numbers are equal exactly, irrational ones to 80 digits; or one is a decimal of 12 places or
    more, and the other has no end and begins so, rounded or cut off."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        are_equal = x == y
    else:
        left = _decimal(x)
        right = _decimal(y)
        are_equal = abs(left - right) <= max(abs(left), abs(right)) * _RELATIVE
    return are_equal or _is_rounding(x, y, least=12) or _is_rounding(y, x, least=12)


def _is_rounding(finite, number, least=0):
    """Whether a decimal of `least` places or more has those of `number`: rounded or cut off."""
    places = _places(finite)
    if places is None or places < least or number is None or least and _places(number) is not None:
        return False
    last_place = Fraction(1, 10**places)
    number = Fraction(number)
    lacking = abs(number) - abs(finite)
    return -last_place / 2 <= lacking < last_place and number * finite > 0


def _places(number):
    """How many decimal places a rational number has; None for more than 40, and for a Decimal."""
    if isinstance(number, Fraction):
        return next((k for k in range(41) if 10**k % number.denominator == 0), None)


# Arithmetic on expressions: at all points at once, exact as long as the numbers are rational and small

DIGITS = 100
_CONTEXT = decimal.Context(prec=DIGITS, Emax=10_000, Emin=-10_000)  # raises where a result is undefined
_CONTEXT.traps[decimal.Underflow] = True
_RELATIVE = Decimal("1e-80")
_ZERO = Decimal("1e-97")  # what rounding may leave of zero
_PI = Decimal("3.14159265358979323846264338327950288419716939937510"
              "58209749445923078164062862089986280348253421170679821480865132823")


def _number(value):
    value = Fraction(value)
    if _bits(value) > MAX_BITS:
        raise ValueError("too large")
    return Expression((value,))


def _bits(number):
    return max(map(int.bit_length, number.as_integer_ratio()))


@functools.lru_cache(maxsize=4096)
def _letter(name):
    """Small to large values, more of them positive, because roots and logarithms need that."""
    draw = random.Random(name)
    tops = 900, 3000, 12000, 3000, 900, 3000, -12000, -3000
    values = [Fraction(draw.randint(1, abs(top)), 997) for top in tops]
    signed = [value if top > 0 else -value for value, top in zip(values, tops)]
    return Expression(tuple(signed))


def _apply(operate, *operands):
    points = _by_point(*map(_operand, operands))
    return Expression(tuple(_calculate(operate, point) for point in points))


def _operand(node):
    """The values of an operand: 180° is pi, here and nowhere else."""
    if not isinstance(node, Expression) or node.unit not in ("", "°"):
        raise ValueError("arithmetic on a group, or on a unit")
    if not node.unit:
        return node.values
    return tuple(_calculate(operator.mul, (value, _PI / 180)) for value in node.values)


def _by_point(*columns):
    """The values of several expressions point by point; a number is the same at all points."""
    points = max(map(len, columns))
    columns = [column * (points // len(column)) for column in columns]
    return list(zip(*columns))


def _calculate(operate, numbers):
    """One operation at one point, exact on rational numbers where it can be; None where it is undefined or
    too large."""
    if None in numbers:
        return None
    is_exact = operate in _EXACT and all(isinstance(number, Fraction) for number in numbers)
    try:
        result = operate(*(numbers if is_exact else map(_decimal, numbers)))
    except (ArithmeticError, ValueError):
        return None
    if operate in (operator.add, operator.sub) and not is_exact:
        low, high = sorted(map(abs, map(_decimal, numbers)))
        if 0 < low < high * _RELATIVE:  # too small to be seen in the sum
            return None
    is_small = _bits(result) <= MAX_BITS if isinstance(result, Fraction) else result.is_finite()
    return result if is_small else None


def _decimal(number):
    if isinstance(number, Decimal):
        return number
    return Decimal(number.numerator) / number.denominator


def _sine(x):
    """The power series."""
    x %= 2 * _PI
    total = term = x
    n = 1
    while abs(term) > _ZERO * abs(x) / 1000:
        n += 2
        term *= -x * x / (n * (n - 1))
        total += term
    return total if abs(total) > _ZERO else Decimal(0)


def _power(base, exponent):
    if isinstance(base, Fraction) and exponent.denominator == 1 and _bits(base) * abs(exponent) < MAX_BITS:
        return base ** exponent
    if exponent == 0.5:  # faster
        return _decimal(base).sqrt()
    return _decimal(base) ** _decimal(exponent)


_FUNCTIONS = {
    "ln": Decimal.ln, "log": Decimal.log10, "sin": _sine,
    "cos": lambda x: _sine(x + _PI / 2),
    "tan": lambda x: _sine(x) / _sine(x + _PI / 2),
    "sec": lambda x: 1 / _sine(x + _PI / 2),
}
_EXACT = {operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, _power}


# Evaluation -----------------------------------------------------------------------------------------------


def evaluate(sample: Callable, problems: list[dict], trials: int = 3, *,
             out: str | Path | None = None, marker: str = MARKER, settings: dict | None = None) -> dict:
    """Accuracy on `problems`: the summary of `trials` responses to each, and the `responses`, judged.

    `sample`, called as sample(problems, n=trials), returns a list with n responses to each problem, or an
    iterator of (index, responses) in any order. A response is a str or has `.text` (and `.tokens`); a problem
    with an empty list counts as wrong. To the JSON Lines file `out` every problem's record (see `judge`) is
    appended as it comes; what it holds already is not asked again, but judged again. `settings`, on which the
    responses depend, are kept in each record. Raises InputError if the file cannot be written, holds
    something else, or responses of other settings.

    >>> sums = [{"question": "2+2?", "answer": "4"}]
    >>> result = evaluate(lambda problems, n: [["Final Answer: 4"] * n], sums)
    >>> result["accuracy"], result["unanswered"]
    (1.0, 0.0)
    """
    check_range(trials=(trials, 1))
    if not problems:
        raise InputError("there is no problem to evaluate on")
    with open_lines(out) if out else contextlib.nullcontext() as file:
        records = _known_records(out, trials, settings, marker) if out else {}
        asked = [problem for problem in problems if _key(problem) not in records]
        drawn = sample(asked, n=trials) if asked else []
        if isinstance(drawn, list):
            drawn = enumerate(drawn)
        for i, responses in drawn:
            if len(responses) not in (0, trials):
                raise InputError(f"the sampler gave {len(responses)} responses to a question, not {trials}")
            record = judge(asked[i], responses, marker)
            if settings:
                record["settings"] = settings
            records[_key(record)] = record
            if file:
                write_line(file, record)
    if missing := [problem["question"] for problem in problems if _key(problem) not in records]:
        raise InputError(f"the sampler gave {len(missing)} questions no list of responses, such as "
                         f"{missing[0]!r}")
    records = [records[_key(problem)] for problem in problems]
    return summarise(records, trials) | {"responses": records}


_key = operator.itemgetter("question", "answer")


def _known_records(path, trials, settings, marker):
    """The records that an earlier run left in the file, judged again."""
    records = {}
    for record in read_lines(path):
        try:
            n = len(record["responses"])
            verdicts = [verdict | _verdict(verdict["response"], record["answer"], marker)
                        for verdict in record["responses"]]
            records[_key(record)] = record | {"responses": verdicts}
        except (KeyError, TypeError):
            raise InputError(f"{path} holds something else than responses; choose another --out") from None
        if n not in (0, trials):
            raise InputError(f"{path} holds {n} responses to a question, not {trials}: "
                             "repeat that --trials, or choose another --out")
        other = record.get("settings")
        if resolved(other) != resolved(settings):
            raise InputError(f"{path} holds responses of other settings, {other}: repeat those, "
                             "or choose another --out")
    return records


def judge(problem: dict, responses: list, marker: str = MARKER) -> dict:
    """The record of one problem: question, answer and its responses, each {"response": text, "correct": bool,
    "answered": whether it announces an answer, "tokens": their number, "end": how it ended ("eos", "answer",
    or "cut" by a limit)}; the last two are None where unknown."""
    verdicts = []
    for response in responses:
        text = response if isinstance(response, str) else response.text
        tokens = getattr(response, "tokens", None)
        ending = {"tokens": None if tokens is None else len(tokens), "end": getattr(response, "end", None)}
        verdicts.append(_verdict(text, problem["answer"], marker) | ending)
    return {"question": problem["question"], "answer": problem["answer"], "responses": verdicts}


def _verdict(text, answer, marker):
    is_answered = extract_answer(text, marker) is not None
    return {"response": text, "correct": grade(text, answer, marker), "answered": is_answered}


def summarise(records: list[dict], trials: int) -> dict:
    """Accuracy of `judge`'s records: the mean over trials in [0, 1], its standard error (sem, None for one
    trial), each trial's own; the share of responses that announce no answer (some are right nevertheless) and
    of those cut by a limit. A problem without responses counts as wrong.

    >>> right = {"correct": True, "answered": True}
    >>> wrong = {"correct": False, "answered": False, "end": "cut"}
    >>> summarise([{"responses": [right, right]}, {"responses": [right, wrong]}], trials=2)
    {'accuracy': 0.75, 'sem': 0.25, 'n': 2, 'trials': [1.0, 0.5], 'unanswered': 0.25, 'cut': 0.25}
    """
    n = len(records)
    rows = [record["responses"] for record in records if record["responses"]]
    accuracies = [sum(row[k]["correct"] for row in rows) / n for k in range(trials)]
    responses = [response for row in rows for response in row]
    answered = sum(response["answered"] for response in responses)
    cut = sum(response.get("end") == "cut" for response in responses)
    return {
        "accuracy": sum(accuracies) / trials,
        "sem": math.sqrt(statistics.variance(accuracies) / trials) if trials > 1 else None,
        "n": n, "trials": accuracies,
        "unanswered": 1 - answered / (n * trials), "cut": cut / (n * trials),
    }


# Files of records, one a line, that survive a crash


def open_lines(path: str | Path):
    """A JSON Lines file opened to append: a torn last line is dropped with a message, a second process kept
    out. Raises InputError if it cannot be opened or is in use."""
    with told(f"write to {path}"):
        file = open(path, "ab", buffering=0)
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing {path}; wait for it, or choose another") from None
        _mend(file, path)
    return file


def _mend(file, path):
    """Complete or drop a last line without its end."""
    last = b""
    if not os.path.isfile(path):  # a device may have no end
        return
    with open(path, "rb") as lines:
        for last in lines:
            pass
    if last and not last.endswith(b"\n"):
        try:
            json.loads(last)
            file.write(b"\n")
        except ValueError:
            print(f"{path}: dropped the last line, which is not complete", file=sys.stderr)
            file.truncate(os.path.getsize(path) - len(last))


def write_line(file, record: dict):
    """Append one record to a file of open_lines. Raises InputError where the disk is full."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    left = line.encode("utf-8", "backslashreplace")  # half an emoji as \ud83d
    with told(f"write to {file.name}"):
        while left:
            left = left[file.write(left):]  # a disk that fills up takes a part


def read_lines(path: str | Path) -> Iterator:
    """The records of a JSON Lines file; none without a file, or of a device, which may have no end. Raises
    InputError for a line that is no JSON."""
    if os.path.isfile(path):
        yield from (record for _, record in _rows(path))


# The command ----------------------------------------------------------------------------------------------


def run_command(main: Callable):
    """Run a command's main(). What its user can put right becomes one sentence on stderr and exit status 2,
    Ctrl-C one and 130; what nobody expects keeps its traceback."""
    for stream in sys.stdout, sys.stderr:  # of any encoding: ? for what it lacks
        stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout, such as `head`, has seen enough
        _flush()
    except (Exception, KeyboardInterrupt) as error:
        leave(error)


def watch_imports():
    """From here on Ctrl-C is one sentence, also while torch is imported, which takes seconds."""
    def hook(error_class, error, trace):
        if isinstance(error, KeyboardInterrupt):
            leave(error)
        sys.__excepthook__(error_class, error, trace)

    sys.excepthook = hook


def leave(error: BaseException):
    """Say why the command ends, and exit. Of many ranks the first speaks for all, and torchrun ends the
    others meanwhile; what it does not end has a trouble of its own and says so, with the rank."""
    _flush()
    name = os.path.basename(sys.argv[0])
    rank = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends another
        if rank == "0":
            print(f"{name}: stopped; with --out, the same command goes on from what is finished", file=sys.stderr)
        sys.exit(130)
    sentence = reason(error)
    if isinstance(error, InputError):
        sentence = error
    elif isinstance(error, OSError):  # a full disk, most likely
        where = f"{error.filename}: " if error.filename else ""
        sentence = f"{where}{sentence}; the same command goes on from what is saved"
    elif sentence != _MEANINGS[_NO_MEMORY]:
        raise error
    if rank != "0":
        name += f" (rank {rank})"
        is_own = getattr(error.__cause__ or error, "errno", None)  # of its disk, its file
        time.sleep(0 if is_own else 15)
    print(f"{name}: {sentence}", file=sys.stderr)
    sys.exit(2)


def _flush():
    """Print what is left; where nobody takes it, nowhere, else Python complains once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def ranks() -> tuple[int, int]:
    """Rank and number of ranks, as torchrun announces them. Raises InputError for what is no group."""
    rank = os.environ.get("RANK", "0")
    world = os.environ.get("WORLD_SIZE", "1")
    if rank.isdecimal() and world.isdecimal() and int(rank) < int(world):
        return int(rank), int(world)
    raise InputError(f"the environment says RANK={rank} and WORLD_SIZE={world}, which is no rank of a group: "
                     "start with torchrun, or unset both")


def progress(label: str, total: int, unit: str, **how):
    """A bar of tqdm; in a log instead of a terminal, a line every half minute."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        log = SimpleNamespace(write=_write_to_log, flush=sys.stderr.flush)
        how |= {"file": log, "mininterval": 30, "miniters": 1, "delay": 30, "smoothing": 0}
        how["bar_format"] = "{desc}: {percentage:.0f} % of {total_fmt} {unit}s, {elapsed}, {remaining} to go"
    return tqdm(desc=label, total=total, unit=unit, **how)


def _write_to_log(text):
    """A state of tqdm becomes a line."""
    if text.strip():
        print(text.strip(), file=sys.stderr)


def parse_arguments():
    """The parsed command line."""
    parser = argparse.ArgumentParser(description="Zero-shot accuracy of a model on a task (paper, Sec. 5).")
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--data", required=True,
                        help=f"JSON Lines file, or a task (its test questions): {', '.join(TASKS)}")
    parser.add_argument("--data-dir", help="folder that holds the task's file already")
    parser.add_argument("--split", default="test", help="of the task (default: test)")
    parser.add_argument("--limit", type=int, help="take the first N problems")
    parser.add_argument("--trials", type=int, default=3, help="responses to each problem; paper: 3")
    parser.add_argument("--temperature", type=float, default=0.7, help="paper: 0.7")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of a response (default: 1024)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"),
                        help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--out", help="file for every judged response; the same command continues it")
    return parser.parse_args()


def main():
    """The command: sample answers, print accuracy and its spread over the trials."""
    args = parse_arguments()
    if ranks() != (0, 1):
        raise InputError("an evaluation is one process: start it without torchrun")
    check_range(max_new_tokens=(args.max_new_tokens, 1), temperature=(args.temperature, 0))
    problems = load_problems(args.data, split=args.split, limit=args.limit, data_dir=args.data_dir)

    how = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens, "seed": args.seed}

    def sample(asked, n):
        import mcts

        model, tokenizer = mcts.load_model(args.model, args.device, args.dtype)
        prompts = [mcts.build_prompt(tokenizer, problem["question"]) for problem in asked]
        drawn = 0
        start = time.time()
        with progress("sample", len(asked) * n * args.max_new_tokens, "token", unit_scale=True) as bar:
            for i, samples in mcts.stream(model, tokenizer, prompts, n=n, progress=bar.update, **how):
                drawn += sum(len(response.tokens) for response in samples)
                yield i, samples
        print(f"{drawn} tokens, {drawn / (time.time() - start):.0f} tokens/s")

    settings = {"model": args.model} | how
    result = evaluate(sample, problems, args.trials, out=args.out, settings=settings)
    trials = ", ".join(f"{100 * accuracy:.1f}" for accuracy in result["trials"])
    spread = "-" if result["sem"] is None else f"{100 * result['sem']:.1f}"
    print(f"{args.data}: {len(problems)} questions, trials {trials} %\n"
          f"accuracy {100 * result['accuracy']:.1f} ± {spread} % (mean, standard error of the trials), "
          f"{100 * result['unanswered']:.1f} % of the responses without an answer, "
          f"{100 * result['cut']:.1f} % cut")


if __name__ == "__main__":
    sys.modules["eval"] = sys.modules["__main__"]  # what mcts imports: one InputError, not two
    run_command(main)
