"""Problems, answers and their judge: tasks, extraction of the final answer, equivalence of answers, evaluation.

    python eval.py --model M --data gsm8k              # a task, or a JSON Lines file with question and answer

The same `grade` is the reward of the search, the label of training data and the verdict of the evaluation. Model output
is parsed, never run. Four parts, each usable alone: `load_problems`, `extract_answer`, `is_equiv`, `evaluate`.
"""
import argparse
import cmath
import functools
import hashlib
import json
import math
import operator
import os
import random
import re
import sys
import time
import unicodedata
import urllib.request
from fractions import Fraction
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from mcts import MARKER, InputError, build_prompt, load_model, run_command, sample

# ----------------------------------------------------------------------------------------------------------
# Tasks: where each file comes from, and how one row of it becomes a question and an answer


def _after(marker, solution):
    if marker not in solution:
        raise ValueError(f"no {marker!r} in the solution")
    return solution.rpartition(marker)[2]


def _gsm8k(row, seed):
    return row["question"], _after("####", row["answer"]).replace(",", "")


def _math(row, seed):
    return row["problem"], _boxed(row["solution"]) or row["answer"]


def _metamath(row, seed):
    return row["query"], _after("The answer is:", row["response"])


def _pair(row, seed):
    answer = row["answer"]
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    return row["question"], answer


def _choice(row, seed):
    question, choices = row["question"]["stem"], row["question"]["choices"]
    correct = [choice["text"] for choice in choices if choice["label"] == row["answerKey"]]
    if not correct:
        raise ValueError(f"no choice is labelled {row['answerKey']!r}")
    return _lettered(question, [choice["text"] for choice in choices], correct[0])


def _sciq(row, seed):
    options = sorted({row[key] for key in ("correct_answer", "distractor1", "distractor2", "distractor3")})
    random.Random(f"{seed}:{row['question']}").shuffle(options)  # the source has no order of its own
    return _lettered(row["question"], options, row["correct_answer"])


def _lettered(question, options, correct):
    options = list(dict.fromkeys(options))  # real files repeat an option; two right letters would be unfair
    lines = [f"{chr(65 + i)}) {option}" for i, option in enumerate(options)]
    return "\n".join([question, *lines]), lines[options.index(correct)]


_GITHUB, _CSQA = "https://raw.githubusercontent.com/", "https://s3.amazonaws.com/commensenseqa/"
_GSM8K = _GITHUB + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
_AGIEVAL = _GITHUB + "ruixiangcui/AGIEval/5c77d073fda993f1652eaae3cf5d04cc5fd21d40/data/v1/"
_PRM800K = ("https://media.githubusercontent.com/media/openai/prm800k/"
            "00811d6de065642a6967b9017d4cee59550c0ef4/prm800k/math_splits/")  # 12,000 and 500 problems
_METAMATH = "https://huggingface.co/datasets/meta-math/MetaMathQA/resolve/main/"
_MIRROR = _GITHUB + "pangr2/dataset_collection/52d6686c0aef1a55241f3fc8f42345b1af9ce544/"  # of AI2's zips
_OBQA, _SCIQ = _MIRROR + "OpenBookQA-V1-Sep2018/Data/Main/", _MIRROR + "SciQ/"
_ARC = _MIRROR + "ARC-V1-Feb2018/ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-"
_CSQA_DEV = ("csqa_dev_rand_split.jsonl", _CSQA + "dev_rand_split.jsonl", "3210497fdaae614ac085d9eb873dd7f4")

# task: (row converter, {split: (file name, address, first 32 hexadecimal digits of its sha256 where known)})
TASKS = {
    "gsm8k": (_gsm8k, {
        "train": ("gsm8k_train.jsonl", _GSM8K + "train.jsonl", "17f347dc51477c50d4efb83959dbb7c5"),
        "test": ("gsm8k_test.jsonl", _GSM8K + "test.jsonl", "3730d312f6e3440559ace48831e51066")}),
    "math": (_math, {
        "train": ("math_train.jsonl", _PRM800K + "train.jsonl", "90d96daeac3fe343ebb1e22ce93dd996"),
        "test": ("math_test.jsonl", _PRM800K + "test.jsonl", "35dc41080a3680858b27fa7e0533d2d5")}),
    "agieval-math": (_pair, {
        "test": ("agieval_math.jsonl", _AGIEVAL + "math.jsonl", "43e783af2025318125a96a970a0df379")}),
    "metamath": (_metamath, {
        "train": ("MetaMathQA-395K.json", _METAMATH + "MetaMathQA-395K.json",
                  "fb39a5d8c05c042ece92eae37dfd5ea4")}),
    "obqa": (_choice, {
        "train": ("openbookqa_main_train.jsonl", _OBQA + "OpenBookQA_train.jsonl",
                  "388ce25926fa33b573ba6556d7245a61"),
        "dev": ("openbookqa_main_dev.jsonl", _OBQA + "dev.jsonl", "a08f720be757a0f0b6aaf8e1e1162c2b"),
        "test": ("openbookqa_main_test.jsonl", _OBQA + "test.jsonl", "feb2bd9bfa6161dca4c44ce90e51e8cd")}),
    "csqa": (_choice, {  # the answers of its own test split were never published
        "train": ("csqa_train_rand_split.jsonl", _CSQA + "train_rand_split.jsonl",
                  "58ffa3c8472410e24b8c43f423d89c8a"),
        "dev": _CSQA_DEV, "test": _CSQA_DEV}),
    "arc": (_choice, {
        "train": ("arc_challenge_train.jsonl", _ARC + "Train.jsonl", "e02837c53ee86f6d73c259f91c77725c"),
        "dev": ("arc_challenge_dev.jsonl", _ARC + "Dev.jsonl", "55224364abd2477f66a9a57c5cbef109"),
        "test": ("arc_challenge_test.jsonl", _ARC + "Test.jsonl", "9fa8ffb3e3a1f88cb302d53dd95aae81")}),
    "sciq": (_sciq, {
        "train": ("sciq_train.json", _SCIQ + "train.json", ""),
        "dev": ("sciq_valid.json", _SCIQ + "valid.json", "b201bc1c002b31cabc8581d05f8a5ce9"),
        "test": ("sciq_test.json", _SCIQ + "test.json", "7340983c427dc2ffd3dccf1adb758b6c")}),
    "arithmetic": (None, {"train": 600, "test": 300}),  # generated below; the numbers of problems
}


def load_problems(name_or_path, *, split="test", limit=None, data_dir=None, seed=0):
    """Load a task of `TASKS`, or a JSON Lines file with `question` and `answer`, as a list of such dicts.

    Args:
        name_or_path: a task name, or the path of a file (then `split` and `data_dir` are not used).
        split: "train", "dev" or "test", where the task has it.
        limit: keep at most this many problems, in file order; None keeps all.
        data_dir: a folder looked into before the cache folder ($DVO_CACHE, else ~/.cache/dvo).
        seed: orders the options where the source has no order (SciQ), by seed and question alone.

    A file found nowhere is downloaded into the cache folder. Repeated questions are dropped and counted.
    Raises InputError for an unknown task or split, a failed download, and a missing, empty or malformed file.
    """
    if name_or_path == "arithmetic":
        return arithmetic(min(TASKS["arithmetic"][1][split], limit or sys.maxsize), seed=split)
    if name_or_path in TASKS:
        convert, files = TASKS[name_or_path]
        if split not in files:
            raise InputError(f"{name_or_path} has no split {split!r}: choose one of {', '.join(files)}.")
        path = _locate(*files[split], data_dir)
    else:
        convert, path = _pair, Path(name_or_path)
        if not path.is_file():
            raise InputError(f"{path} is neither a file nor a task; the tasks are {', '.join(TASKS)}.")
    problems, repeats = {}, 0
    for line, row in _rows(path):
        if limit is not None and len(problems) >= limit:
            break
        try:
            if not isinstance(row, dict):
                raise TypeError("it is not an object with named fields")
            question, answer = convert(row, seed)
            if not isinstance(question, str) or not isinstance(answer, str):
                raise TypeError("the question or the answer is not text")
            if not question.strip() or not answer.strip():
                raise ValueError("the question or the answer is empty")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{path}, line {line}: {reason}; correct or delete this row.") from error
        repeats += question in problems
        problems.setdefault(question, answer.strip())
    if not problems and limit != 0:
        raise InputError(f"{path} holds no problem: put one JSON object a line in it, or delete it.")
    if repeats:
        print(f"{path}: dropped {repeats} repeated questions, kept {len(problems)}", file=sys.stderr)
    return [{"question": question, "answer": answer} for question, answer in problems.items()]


def _rows(path):
    """Yield (line number, object) from a JSON Lines file or from one JSON list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}): replace the file.") from error
    is_list, decoder, position, line = text.lstrip().startswith("["), json.JSONDecoder(), 0, 1
    skip, rest_of_line = re.compile(r"[\s,\[\]]*" if is_list else r"\s*"), re.compile(r"[^\n]*")
    while True:
        start = skip.match(text, position).end()
        line, position = line + text.count("\n", position, start), start
        if start == len(text):
            return
        try:
            row, end = decoder.raw_decode(text, start)
            if not is_list and rest_of_line.match(text, end)[0].strip():
                raise ValueError("more follows the object")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {line}: not JSON ({error}); correct or delete it.") from error
        yield line, row
        line, position = line + text.count("\n", start, end), end


def _locate(file, url, sha256, data_dir):
    cache = Path(os.environ.get("DVO_CACHE") or Path.home() / ".cache" / "dvo")
    for folder in [data_dir, cache]:
        if folder is not None and (Path(folder) / file).is_file():
            return Path(folder) / file
    _download(url, cache / file, sha256)
    return cache / file


def _download(url, path, sha256):
    """Fetch to a temporary name, check, rename: `path` is whole or absent, with several processes too."""
    partial, digest = path.with_name(f"{path.name}.{os.getpid()}.part"), hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as reply, open(partial, "wb") as out:
            size = int(reply.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := reply.read(1 << 20):
                    digest.update(chunk)
                    bar.update(out.write(chunk))
        if partial.stat().st_size < size:
            raise OSError(f"the connection closed after {partial.stat().st_size} of {size} bytes")
        if not digest.hexdigest().startswith(sha256):
            raise OSError(f"its sha256 is {digest.hexdigest()}, not {sha256}...")
        os.replace(partial, path)
    except (OSError, HTTPException) as error:
        raise InputError(f"Cannot download {url} ({error}): put {path.name} at {path}.") from error
    finally:
        if partial.exists():
            partial.unlink()


# ----------------------------------------------------------------------------------------------------------
# The arithmetic task: generated, nothing to download

OPERATIONS = {"Add": ("+", lambda a, b: a + b), "Subtract": ("-", lambda a, b: a - b),
              "Multiply by": ("*", lambda a, b: a * b)}
LARGEST = 29                                    # every intermediate value lies in 0 ... LARGEST


def arithmetic(n, seed=0, low=3, high=6):
    """n different chains of `low` to `high` operations, as {"question", "answer"}; the same for the same seed.

    >>> arithmetic(1, low=2, high=2)
    [{'question': 'Start with 19. Subtract 1. Add 1.', 'answer': '19'}]
    """
    draw, problems = random.Random(f"arithmetic {seed}"), {}
    while len(problems) < n:
        value, words = draw.randint(0, LARGEST), []
        question = f"Start with {value}."
        for _ in range(draw.randint(low, high)):
            after = -1
            while not 0 <= after <= LARGEST:
                word, operand = draw.choice(list(OPERATIONS)), draw.randint(1, 6)
                after = OPERATIONS[word][1](value, operand)
            question, value = f"{question} {word} {operand}.", after
        problems.setdefault(question, {"question": question, "answer": str(value)})
    return list(problems.values())


def demonstrate(question, draw, skip=0.0):
    """A worked solution. With probability `skip` a step runs on over the next operation and states the result of both
    only: what a model learns from such examples is to take steps that it cannot do reliably.

    >>> demonstrate("Start with 24. Multiply by 1. Subtract 5.", random.Random(0))
    '24 * 1 = 24.\\n\\n24 - 5 = 19.\\n\\nFinal Answer: 19'
    """
    start, *chain = question.removesuffix(".").split(". ")
    value, steps, i = int(start.split()[-1]), [], 0
    while i < len(chain):
        step, more = str(value), True
        while more:
            word, operand = chain[i].rsplit(" ", 1)
            sign, apply = OPERATIONS[word]
            step, value, i = f"{step} {sign} {operand}", apply(value, int(operand)), i + 1
            more = i < len(chain) and draw.random() < skip
        steps.append(f"{step} = {value}.\n\n")
    return "".join(steps) + f"{MARKER} {value}"


def single_operations(text):
    """(right, all) of the steps of `text` that do one operation.

    >>> single_operations("24 * 1 = 24.\\n\\n24 - 5 = 18.\\n\\n18 + 2 * 3 = 1.\\n\\nFinal Answer: 1")
    (1, 2)
    """
    found = re.findall(r"^(\d+) ([-+*]) (\d) = (\d+)\.$", text, re.MULTILINE)
    apply = dict(OPERATIONS.values())
    return sum(apply[sign](int(a), int(b)) == int(c) for a, sign, b, c in found), len(found)


# ----------------------------------------------------------------------------------------------------------
# Extraction: the final answer in a response

_FINAL = re.compile(r"final\s+answer[\s*]*(?:is\b|:)[\s:*]*", re.I)
_WEAKER = [re.compile(pattern, re.I) for pattern in (
    r"(?<!#)####(?!#)(?=[ \t]*[^\s\d]{0,9}\d\S{0,40}[ \t]*(?:\n|\Z)|[^\n]{0,60}\s*\Z)",  # not a heading
    r"\b(?:answer|(?:correct|right|best)\s+(?:option|choice))\b[^.:\n]{0,40}?\bis\b\s*:?",
    r"\banswer\**\s*(?:[:=]|(?=\$|\\[(\[]))", r"(?:\A|\n)A:(?=[^\n]{0,60}\s*\Z)")]
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*[.\s]*\Z")
_SENTENCE_END = re.compile(r"(?<!\b[DMS][rst])[.!?][)\"'*]*\s+(?=[A-Z<\[(])|<\|")  # not after Dr, Mr, Ms
_BOX, _BRACE = re.compile(r"\\f?boxed\s*(?=\{)"), re.compile(r"\\.|[{}]", re.S)
_JOINT = re.compile(r"[^.]*(?:,|;|\band\b|\bor\b)(?:[^A-Za-z\\]|\\[A-Za-z]*|[A-Za-z](?![A-Za-z]))*")
_VALUE = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]"
                    r"|((?<!\^)-?\.?\d(?:[\d,]*\d)?(?:\.\d+)?(?:/\d+)?\s?%?)", re.S)
MAX_RESPONSE = 20_000  # characters, from the end: an answer is not looked for before them


def extract_answer(text):
    r"""Return the final answer that a response states, or None where it marks none.

    The strongest marker present decides, its last use wins: "Final Answer:", \boxed{}, "####", "the answer
    is", "Answer:", "A:" as the last line, bold text at the end. Boxes joined by "and" are one list.

    >>> extract_answer("First 7. **Final Answer**: $\\boxed{\\frac{1}{2}}$. I checked it.")
    '\\frac{1}{2}'
    >>> extract_answer("So the answer is 12 apples.")
    '12 apples'
    >>> extract_answer("I do not know.")
    """
    text = text[-MAX_RESPONSE:]
    finals = list(_FINAL.finditer(text))
    if finals:
        rest = text[finals[-1].end():]
        if found := _boxed(rest) or _sentence(rest):
            return extract_answer(found) or found  # "Final Answer: the answer is 5"
    if found := _boxed(text):
        return found
    for marker in _WEAKER:
        uses = list(marker.finditer(text))
        if uses and (found := _sentence(text[uses[-1].end():])):
            return found
    bold = _BOLD.search(text, max(0, len(text) - 500))
    return bold and bold[1].strip()


def _boxed(text):
    """The content of the last box, after that of boxes joined to it by a comma, "and" or "or"; or None."""
    found, start = [], len(text)
    for box in reversed(list(_BOX.finditer(text))):
        end = _closing(text, box.end())
        if end is None or end > start:
            break
        if found and (start - end > 40 or not _JOINT.fullmatch(text, end, start)):
            break
        found.insert(0, text[box.end() + 1:end - 1].strip())
        start = box.start()
    return ", ".join(found) or None


def _closing(text, start):
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.end()
    return None


def _sentence(rest):
    """The rest of the sentence after a marker, which may open with display mathematics over several lines."""
    rest = rest.lstrip(" \t\r\n:*")
    for opening, closing in (("$$", "$$"), (r"\[", r"\]")):
        if rest.startswith(opening) and (end := rest.find(closing, 2)) > 0:
            return rest[2:end].strip()
    line = _SENTENCE_END.split(rest.split("\n", 1)[0], maxsplit=1)[0].strip(" \t\r*\"'`").rstrip(". ")
    whole = re.fullmatch(r"\$([^$]+)\$|\\\(((?:(?!\\\)).)+)\\\)", line)
    return whole[1] or whole[2] if whole else line


def grade(response, answer):
    """Whether a response's final answer, or without one the response itself, is equivalent to `answer`.

    Where that is prose ("The largest is $34$ of them"), the last formula or number in it counts.
    """
    prediction = extract_answer(response)
    if prediction is None:
        prediction = response[-MAX_RESPONSE:]
    if is_equiv(prediction, answer):
        return True
    if len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", prediction)) < 3 or _parse(_clean(prediction), True):
        return False
    values = list(_VALUE.finditer(_translate(prediction[-1000:])))
    return bool(values) and is_equiv(next(filter(None, values[-1].groups())), answer)


# ----------------------------------------------------------------------------------------------------------
# Equivalence: equal as text or as option, else parsed and compared, exactly where that is possible

# Beyond these limits two answers are equal only as text
MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_BITS, MAX_UNORDERED = 2000, 400, 40, 2048, 12

_WRAPPER = r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname)\s*\{"
_WRAPPED, _WHOLE = re.compile(_WRAPPER + r"([^{}]*)\}"), re.compile(_WRAPPER + r"[^{}]*\}")
_OPTION = re.compile(r"(?:(?:option|choice|answer)\s+)?\(?([A-J])\)?\s*(?:[.):]\s*(?:\S.*)?)?", re.I | re.S)
_NUMBERED = re.compile(r"(?:option|choice)\s+\(?(\d)\)?|\(?(\d)[.)]\s+[A-Za-z].*", re.I | re.S)
_LETTERED, _LABEL = re.compile(r"([A-J])\) (.+)", re.S), re.compile(r"\(?([A-J])\)?", re.I)
_DELIMITER = re.compile(r"\\?\$|\\[()\[\]]")
_BASE = re.compile(r"(\d[0-9A-Za-z]*)\s*_\s*\{?\s*(\d+)\s*\}?")


def is_equiv(prediction, answer):
    r"""Whether two answers mean the same: numbers, expressions, lists, tuples, intervals, equations, options.

    A unit, currency sign, delimiter, final full stop, thousands separator or "x =" does not change an answer.
    Tuples are ordered, brackets of intervals matter, lists of all values and sets are unordered. Always
    returns, never raises, runs no part of its input; the work is bounded by the MAX_ constants.

    >>> is_equiv(r"x = \frac{3}{4}", "0.75"), is_equiv("(a+b)^2", "a^2+2ab+b^2"), is_equiv("[0,1)", "[0,1]")
    (True, True, False)
    """
    prediction, answer = _clean(prediction), _clean(answer)
    chosen = _OPTION.fullmatch(_WRAPPED.sub(r"\1", prediction[:MAX_CHARS]))
    lettered = _LETTERED.fullmatch(answer)
    label = lettered or _LABEL.fullmatch(answer)
    if chosen and label:  # a letter was chosen and a letter is right: nothing else counts
        return chosen[1].upper() == label[1].upper()
    answer = lettered[2] if lettered else answer
    if not prediction or not answer:
        return False
    numbered = _NUMBERED.fullmatch(prediction)
    if _plain(prediction) == _plain(answer) or numbered and answer.strip("()") in numbered.groups():
        return True
    for thousands in (True, False) if "," in prediction + answer else (True,):  # "1,200": one number, or two?
        left, right = _parse(prediction, thousands), _parse(answer, thousands)
        try:
            if left and right and _same_items(left, right):
                return True
        except ArithmeticError:  # beyond floating point
            continue
    return False


def _clean(text):
    text = str(text)
    if "boxed" in text:
        text = _boxed(text[-MAX_RESPONSE:]) or text
    text = _translate(text).strip(" \t\r\n*`\"'\0").rstrip(" .;,:*`\"'\n$")
    if _WHOLE.fullmatch(text.strip("$ ")):
        return _WRAPPED.fullmatch(text.strip("$ "))[1].strip()
    return text


_UNICODE = {ord(k): v for k, v in {
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
    "°": r"^\circ ", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "=", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "±": r"\pm ", "θ": r"\theta ", "²": "^2", "³": "^3", "⁄": "/", "’": "'", "\0": "",
    "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅛": " 1/8"}.items()}


def _translate(text):
    """Plain ASCII for the signs, fractions and digits that have one."""
    if text.isascii() or len(text) > MAX_CHARS:
        return text
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE))
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)


def _plain(text):
    """Text to compare as text: single spaces, no wrappers, delimiters, case, article or final full stop."""
    if len(text) > MAX_RESPONSE:
        return text
    text = _DELIMITER.sub(" ", _WRAPPED.sub(r" \1 ", text)).casefold()
    text = " ".join(text.split()).rstrip(" .")
    base = _BASE.fullmatch(text)
    return f"{base[1]}_{base[2]}" if base else re.sub(r"\A(?:the|an|a) (?=\w)", "", text)


# Reading: text becomes tokens (kind, value, space before?), tokens become trees ("+", ("num", 1), ...)

_TOKEN = r"""(?P<skip>\s+ | ~ | \\?\$ | [€£¥] | \\[\ ,;:!()\[\]]
                | \\(?:q?quad|left|right|[bB]igg?[lrm]?|displaystyle|limits)(?![A-Za-z]))
    | (?P<row>\\\\) | (?P<text>{wrapper}[^{{}}]*\}})
    | \\(?P<env>begin|end)\s*\{{\s*[a-zA-Z]*\*?\s*\}}(?:\s*\{{[clr|\s]*\}})?
    | (?P<num>(?:\d{{1,3}}(?:(?:{comma},\\!\s?|\{{,\}}|\\,|\s)\d{{3}})+(?!\d)(?:\.\d+)?|\d+\.?\d*|\.\d+)
              (?:[eE][+-]?\d{{1,3}}(?![A-Za-z\d]))?)
    | \\(?P<cmd>[A-Za-z]+|[{{}}%]) | (?P<word>[A-Za-z]+)
    | (?P<sym>\*\*|<=|>=|!=|[-+*/^_=<>!|:;,(){{}}\[\]&%'])"""
_TOKENS = {thousands: re.compile(_TOKEN.format(wrapper=_WRAPPER, comma=",|" if thousands else ""), re.X)
           for thousands in (True, False)}
_INDEX = re.compile(r"\s*(?:\{[\w ,+-]*\}|\w)?")
_SYNONYMS = dict(pair.split(" ") for pair in (
    r"dfrac frac,tfrac frac,cfrac frac,dbinom binom,tbinom binom,cdot *,times *,ast *,** ^,div /,: /,le ≤,"
    r"leq ≤,leqslant ≤,<= ≤,lt <,gt >,ge ≥,geq ≥,geqslant ≥,>= ≥,ne ≠,neq ≠,!= ≠,approx =,in ∈,cup ∪,cap ∩,"
    r"setminus ∩,pm ±,mp ∓,circ °,degree °,varnothing emptyset,lvert |,rvert |,vert |,lfloor ⌊,rfloor ⌋,"
    r"lceil ⌈,rceil ⌉,langle (,rangle ),lbrace \{,rbrace \},{ \{,} \},frac frac,binom binom,sqrt sqrt,"
    r"emptyset emptyset,% %").split(",")) | {";": ","}
_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan sec csc cot ln log exp".split()
_CONSTANTS = {"π": math.pi, "∞": math.inf, "e": math.e, "i": 1j}
_SPELLED = {"pi": "π", "infty": "∞", "infinity": "∞", "inf": "∞"}
_UNITS = {name: names.split()[0] for names in (
    "mm millimeter", "cm centimeter", "meter", "km kilometer", "inch in inche", "ft foot feet", "yd yard",
    "mi mile", "gram", "kg kilogram", "mg milligram", "lb pound", "oz ounce", "ml milliliter", "liter", "mph",
    "sec second", "min minute", "hr hour", "day", "week", "month", "year", "cent", "dollar", "am", "pm")
    for name in names.split()}
_PLUS_MINUS = ("name", "±")


class _Unreadable(ValueError):
    """Not mathematics that the reader knows, or more of it than the limits allow."""


def _tokens(text, thousands):
    tokens, position, spaced = [], 0, False
    while position < len(text):
        match = _TOKENS[thousands].match(text, position)
        if not match or len(tokens) > MAX_TOKENS:
            raise _Unreadable
        kind, value, position = match.lastgroup, match[match.lastgroup], match.end()
        if kind == "num":
            tokens.append(("num", re.sub(r"[^\d.eE+-]", "", value), spaced))
        elif kind == "text":
            word = _WRAPPED.fullmatch(value)[1].strip()
            plain = word in ("and", "or") or len(word) == 1 and word.isalpha()
            tokens += _letters(word, spaced) if plain else [("unit", word, spaced)]
        elif kind == "word" or kind == "cmd" and value in _FUNCTIONS:
            tokens += _letters(value, spaced)
        elif kind == "cmd" and value not in _SYNONYMS:
            tokens.append(("name", _SPELLED.get(value, value), spaced))
        elif value == "_" and tokens and tokens[-1][0] == "name":
            index = _INDEX.match(text, position)
            position = index.end()
            tokens[-1] = ("name", f"{tokens[-1][1]}_{index[0].strip(' {}')}", tokens[-1][2])
        elif kind != "skip":
            as_is = kind == "row" or kind == "sym" and value in "{}"  # only the escaped braces enclose a set
            tokens.append((value if as_is else _SYNONYMS.get(value, value), value, spaced))
        spaced = kind == "skip"
    return tokens + [("end of text", "", False)]


def _letters(run, spaced):
    """A run of letters: a separator, function, constant, unit or other word, or a product of variables."""
    low = run.casefold()
    for name in _FUNCTIONS:
        if run.startswith(name) and run[len(name):] in ("", "x", "y", "z", "t"):
            return [("fn", name, spaced)] + [("name", letter, False) for letter in run[len(name):]]
    if low in ("and", "or", "sqrt"):
        return [("sqrt" if low == "sqrt" else ",", run, spaced)]
    if low in _SPELLED:
        return [("name", _SPELLED[low], spaced)]
    if len(run) > 3 or spaced and len(run) == 3 or _unit(run):
        return [("unit", run, spaced)]
    return [("name", letter, spaced) for letter in run]


def _unit(words):
    """The common name of the last known unit among the words, or None."""
    known = (_UNITS.get(word) or _UNITS.get(word.rstrip("s")) for word in reversed(words.casefold().split()))
    return next(filter(None, known), None)


def _signed(negative, node):
    """The node or its negative, with a percent or degree sign kept outermost."""
    if negative and node[0] in ("%", "°"):
        return (node[0], ("neg", node[1]))
    return ("neg", node) if negative else node


def _one_or(kind, nodes):
    return nodes[0] if len(nodes) == 1 else (kind, *nodes)


class _Reader:
    """Recursive descent: one method a level of binding, loosest first. Every recursion counts in `nested`."""

    def __init__(self, text, thousands):
        self.tokens, self.at, self.depth, self.bars = _tokens(text, thousands), 0, 0, 0

    def take(self, *kinds):
        """Step over the next token and return it if it is one of these kinds; else None."""
        token = self.tokens[self.at]
        if token[0] in kinds:
            self.at += 1
            return token

    def next_kinds(self, count):
        return [token[0] for token in self.tokens[self.at:self.at + count]]

    def nested(self, read, *args):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unreadable
        node = read(*args)
        self.depth -= 1
        return node

    def items(self, *closers):
        """What is listed up to one of the closing symbols, and that symbol."""
        found = []
        while not (closer := self.take(*closers)):
            if not self.take(","):
                found.append(self.item())
                if self.tokens[self.at][0] not in (",", *closers):
                    raise _Unreadable
        return found, closer[0]

    def item(self):
        node, words = self.relation(), []
        while word := self.take("unit", *(["^", "/", "name"] if words else [])):  # cm^2, km/h
            words.append(word[1])
            if word[0] == "^":
                self.nested(self.atom)
        return ("unit", node, " ".join(words)) if words else node

    def chain(self, read, *signs):
        """Nodes with signs between them, and those signs."""
        nodes, found = [read()], ""
        while sign := self.take(*signs):
            found += sign[0]
            nodes.append(read())
        return nodes, found

    def relation(self):
        terms, signs = self.chain(self.union, "=", "≠", "<", "≤", ">", "≥", "∈")
        return ("rel", signs, *terms) if signs else terms[0]

    def union(self):
        return _one_or("set", self.chain(self.sum, "∪")[0])

    def sum(self):
        terms = []
        while not terms or self.tokens[self.at][0] in "+-±∓":
            signs = ""
            while sign := self.take("+", "-", "±", "∓"):
                signs += sign[0]
            node = self.term()
            node = ("*", _PLUS_MINUS, node) if "±" in signs or "∓" in signs else node
            terms.append(_signed((signs.count("-") + signs.count("∓")) % 2, node))
        return _one_or("+", terms)

    def term(self):
        factors = [self.factor()]
        while (sign := self.take("*", "/")) or self.factor_starts():
            factors.append(("inv", self.factor()) if sign and sign[0] == "/" else self.factor())
        return _one_or("*", factors)

    def factor_starts(self):
        kind = self.tokens[self.at][0]
        if kind == "num":
            return self.tokens[self.at - 1][0] != "num"
        return kind == "|" and not self.bars or kind in (
            "name", "fn", "frac", "binom", "sqrt", "(", "[", "{", "\\{", "⌊", "⌈", "begin")

    def factor(self):
        sign, node = self.take("+", "-"), self.mixed(self.nested(self.atom))
        for _ in range(8):  # more signs after one factor are not mathematics
            if self.take("^"):
                braced = self.next_kinds(3) == ["{", "°", "}"]
                if braced or self.next_kinds(1) == ["°"]:
                    self.at += 3 if braced else 1
                    node = ("°", node)
                else:
                    node = ("^", node, self.nested(self.exponent))
            elif mark := self.take("!", "%", "°", "'"):
                node = (mark[0], node)
            else:
                break
        return _signed(sign and sign[0] == "-", node)

    def exponent(self):
        sign, node = self.take("+", "-"), self.nested(self.atom)
        if self.take("^"):
            node = ("^", node, self.nested(self.exponent))
        return _signed(sign and sign[0] == "-", node)

    def mixed(self, node):
        """`node`, or a mixed number where a proper fraction follows a whole number: 1 1/2 is 3/2, not 1/2."""
        start, kinds = self.at, self.next_kinds(3)
        if self.tokens[start - 1][0] != "num" or node[0] != "num" or node[1].denominator != 1:
            return node
        if kinds[0] == "frac" or kinds == ["num", "/", "num"] and self.tokens[start][2]:
            part = self.nested(self.atom)
            if kinds[0] == "num" and self.take("/"):
                part = ("*", part, ("inv", self.nested(self.atom)))
            if part[1][0] == part[2][1][0] == "num" and 0 < part[1][1] < part[2][1][1]:
                return ("+", node, part)
            self.at = start
        return node

    def atom(self):
        kind, value, _ = self.tokens[self.at]
        self.at += 1
        if kind == "num":
            return ("num", Fraction(value.rstrip(".")))
        if kind == "name":
            return ("name", value)
        if kind == "fn":
            return self.function(value)
        if kind in ("frac", "binom"):
            over, under = self.argument(), self.argument()
            return ("*", over, ("inv", under)) if kind == "frac" else (kind, over, under)
        if kind == "sqrt":
            degree = self.items("]")[0][0] if self.take("[") else ("num", Fraction(2))
            return ("^", self.nested(self.atom), ("inv", degree))
        if kind in ("(", "["):
            found, closer = self.items(")", "]")
            grouping = len(found) == 1 and kind + closer in ("()", "[]")
            return found[0] if grouping else ("tuple", kind, closer, *found)
        if kind == "{":
            return _one_or("set", self.items("}")[0])
        if kind == "\\{":
            return ("set", *self.items("\\}")[0])
        if kind in ("|", "⌊", "⌈"):
            self.bars += kind == "|"
            node = self.sum()
            self.bars -= kind == "|"
            if self.take({"|": "|", "⌊": "⌋", "⌈": "⌉"}[kind]):
                return (kind, node)
        if kind == "begin":
            return self.matrix()
        if kind == "emptyset":
            return ("set",)
        raise _Unreadable

    def argument(self):
        """One argument of a fraction: without braces it is a single digit, as in TeX."""
        kind, value, spaced = self.tokens[self.at]
        if kind == "num" and value.isdigit() and len(value) > 1:
            self.tokens[self.at:self.at + 1] = [(kind, value[0], spaced), (kind, value[1:], False)]
        return self.nested(self.atom)

    def function(self, name):
        power, base = None, [("num", Fraction(10))] if name == "log" else []
        while mark := self.take("^", "_"):
            if mark[0] == "^":
                power = self.nested(self.exponent)
            else:
                base = [self.argument()]
        if self.tokens[self.at][0] in ("(", "[", "{"):
            argument = self.nested(self.atom)
        else:
            factors = [self.factor()]
            while self.factor_starts() and self.tokens[self.at][0] not in ("fn", "(", "["):
                factors.append(self.factor())
            argument = _one_or("*", factors)
        if power == ("neg", ("num", 1)):
            return ("arc" + name, argument)
        node = (name, argument, *base)
        return ("^", node, power) if power else node

    def matrix(self):
        rows = [[]]
        while not self.take("end"):
            if self.take("\\\\"):
                rows.append([])
            elif not self.take("&", ","):
                rows[-1].append(self.item())
        rows = [row[0] if len(row) == 1 else ("tuple", "row", "", *row) for row in rows if row]
        return rows[0] if len(rows) == 1 else ("tuple", "(", ")", *rows)  # a column is a vector


@functools.lru_cache(maxsize=4096)
def _parse(text, thousands):
    """The values that a text lists, as a tuple of trees (never empty), or None if it is not mathematics."""
    if len(text) > MAX_CHARS or not re.search(r"[^A-Za-z\s,.'-]", text) and any(
            _letters(word, True)[0][0] in ("unit", "name") and word.casefold() not in _SPELLED
            for word in re.findall(r"[A-Za-z]{2,}", text)):  # words alone are text
        return None
    try:
        return tuple(_flatten(_Reader(text, thousands).items("end of text")[0])) or (("set",),)
    except (ValueError, TypeError, IndexError):
        return None


def _flatten(nodes):
    """Sets and unions as their members, z in S as S, and 1 ± 2 as 3 and -1."""
    for node in nodes:
        if node[0] == "rel" and node[1] == "∈":
            node = node[3]
        if node[0] == "set":
            yield from _flatten(node[1:])
        elif _PLUS_MINUS in _leaves(node):
            yield from (_replace(node, _PLUS_MINUS, ("num", Fraction(sign))) for sign in (1, -1))
        else:
            yield node


def _leaves(node):
    if node[0] in ("num", "name"):
        return {node}
    return set().union(*(_leaves(child) for child in node[1:] if isinstance(child, tuple)))


def _replace(node, old, new):
    if node == old:
        return new
    return tuple(_replace(child, old, new) for child in node) if isinstance(node, tuple) else node


# Comparing: containers by their parts, relations and expressions by their values at pseudo-random points


def _same_items(left, right):
    if len(left) == len(right) == 1:
        return _same(left[0], right[0])
    for one, many in ((left, right), (right, left)):  # (1, 2) against x = 1, y = 2
        if len(one) == 1 and one[0][0] == "tuple" and len(one[0]) == len(many) + 3 and all(map(_named, many)):
            return all(_same(x, _named(y)[1]) for x, y in zip(one[0][3:], many))
    return _unordered(left, right)


def _unordered(left, right):
    left, right = list(left), list(right)
    for node in list(left):  # the identical ones go first, so that hostile lists stay cheap
        if node in right:
            left.remove(node)
            right.remove(node)
    if len(left) != len(right) or len(left) > MAX_UNORDERED:
        return False
    for node in left:
        twin = next((i for i, other in enumerate(right) if _same(node, other)), None)
        if twin is None:
            return False
        del right[twin]
    return True


def _same(a, b):
    kinds = {a[0], b[0]}
    if a == b:
        return True
    if "unit" in kinds:
        units = {_unit(node[2]) for node in (a, b) if node[0] == "unit"} - {None}
        return len(units) < 2 and _same(_without("unit", a), _without("unit", b))
    if "%" in kinds:  # 25% is 25 with a sign, or else 1/4
        return _same(_without("%", a), _without("%", b)) or _same_value(a, b)
    if "°" in kinds:
        return _same(_without("°", a), _without("°", b))
    if "rel" in kinds:
        return _same_relation(a, b)
    if kinds == {"tuple"}:
        return a[1:3] == b[1:3] and len(a) == len(b) and all(map(_same, a[3:], b[3:]))
    return _unordered(a[1:], b[1:]) if kinds == {"set"} else _same_value(a, b)


def _without(kind, node):
    return node[1] if node[0] == kind else node


def _same_relation(a, b):
    names = _named(a), _named(b)
    if all(names) and names[0][0] == names[1][0]:
        return _same(names[0][1], names[1][1])
    if a[0] != b[0]:  # "x = 5" against "5", "0 < x < 1" against "(0, 1)"
        relation, other, name = (a, b, names[0]) if a[0] == "rel" else (b, a, names[1])
        value = name[1] if name else _interval(relation)
        return value is not None and _same(value, other)
    a, b = _facing_left(a), _facing_left(b)
    if a[1] != b[1] or len(a[1]) > 1:
        return a[1] == b[1] and all(map(_same, a[2:], b[2:]))
    ratios = []  # of left side minus right side: 2x < 4 and x < 2 have the constant ratio 2
    for x, y in _values(*(("+", node[2], ("neg", node[3])) for node in (a, b))):
        ratios.append(_bounded(x / y))
    return len(ratios) > 1 and all(ratio and _close(ratio, ratios[0]) for ratio in ratios) and (
        a[1] in "=≠" or complex(ratios[0]).real > 0)


def _facing_left(relation):
    """The relation with < and ≤ in place of > and ≥; a chain of equations as its two ends."""
    kind, signs, *terms = relation
    if set(signs) <= set(">≥"):
        return (kind, signs[::-1].replace(">", "<").replace("≥", "≤"), *reversed(terms))
    return (kind, "=", terms[0], terms[-1]) if set(signs) == {"="} else relation


def _named(node):
    """(name, value) of an equation such as x = 5, f(x) = 5, (x, y) = (1, 2) or 5 = x; else None."""
    if node[0] != "rel" or set(node[1]) != {"="}:
        return None
    left, right = node[2], node[-1]
    if _is_name(left):
        return left, right
    return (right, left) if _is_name(right) else None


def _is_name(node):
    if node[0] == "name":
        return node[1] not in _CONSTANTS
    parts = (child for child in node if isinstance(child, tuple))
    return node[0] in ("*", "inv", "tuple", "'") and all(map(_is_name, parts))


def _interval(relation):
    """The interval that 1 < x <= 2 or x >= 1 describes, or None."""
    _, signs, *terms = _facing_left(relation)
    if len(terms) == 2:
        low, high = ("neg", ("name", "∞")), ("name", "∞")
        signs, terms = (f"<{signs}", [low, *terms]) if _is_name(terms[0]) else (f"{signs}<", [*terms, high])
    if len(terms) != 3 or not set(signs) <= set("<≤"):
        return None
    return ("tuple", "(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]", terms[0], terms[2])


def _same_value(a, b):
    agreed = 0
    for x, y in _values(a, b):
        if not _close(x, y):
            return False
        agreed += 1
    return agreed >= (2 if _variables(a, b) else 1)


def _variables(a, b):
    return sorted({leaf[1] for leaf in _leaves(a) | _leaves(b) if leaf[0] == "name"} - _CONSTANTS.keys())


def _values(a, b):
    """Pairs of values at up to eight points, without those where either is undefined (with variables and
    without i: undefined over the reals)."""
    names = _variables(a, b)
    imaginary = not names or ("name", "i") in _leaves(a) | _leaves(b)
    for number in range(8 if names else 1):
        point = {name: _coordinate(name, number) for name in names} | ({"i": 1j} if imaginary else {})
        try:
            yield _value(a, point), _value(b, point)
        except (ArithmeticError, ValueError, TypeError, KeyError):
            continue


@functools.lru_cache(maxsize=4096)
def _coordinate(name, number):
    """Positive at first, small to large, because roots and logarithms need that; then of either sign."""
    draw = random.Random(f"{name} {number}")
    low, high = [(1, 900), (900, 3000), (3000, 12000), (100, 3000)][number % 4]
    return Fraction(draw.randint(low, high), 997) * (1 if number < 3 else draw.choice((-1, 1)))


def _close(x, y):
    if x == y:
        return True
    if isinstance(x, Fraction) and isinstance(y, Fraction) and not (pow(10, 20, x.denominator)
                                                                    or pow(10, 20, y.denominator)):
        return False  # two decimals are equal or not; only for 1/3 can 0.333333333333 be meant
    return abs(x - y) <= 1e-9 * float(max(abs(x), abs(y))) + 1e-13 and math.isfinite(abs(x - y))


def _value(node, point):
    if node[0] == "num":
        return node[1]
    if node[0] == "name":
        return point[node[1]] if node[1] in point else _CONSTANTS[node[1]]
    value = _bounded(_OPERATIONS[node[0]](*[_value(child, point) for child in node[1:]]))
    if isinstance(value, complex) and "i" not in point:
        raise ValueError("undefined over the reals")
    return value


def _bounded(value):
    """`value`, real where its imaginary part is rounding; OverflowError where it is large for its kind."""
    if isinstance(value, Fraction):
        if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
            raise OverflowError
    elif not cmath.isfinite(value):
        raise OverflowError
    elif isinstance(value, complex) and abs(value.imag) <= 1e-12 * abs(value):
        return value.real
    return value


def _power(base, exponent):
    """Exact where base and result are rational and small; an odd root of a negative number is real."""
    rational = not isinstance(base, complex) and isinstance(exponent, Fraction)
    if not rational or base < 0 and exponent.denominator % 2 == 0:
        return complex(base) ** complex(exponent)
    root, n, size = abs(base), exponent.denominator, abs(exponent.numerator)
    if n > 1:
        nearest = Fraction(*(round(part ** (1 / n)) for part in root.as_integer_ratio()))
        root = nearest if n < 64 and nearest ** n == root else float(root) ** (1 / n)
    if isinstance(root, Fraction) and size * max(map(int.bit_length, root.as_integer_ratio())) > MAX_BITS:
        root = float(root)
    return (-root if base < 0 else root) ** exponent.numerator


def _fold(operate):
    return lambda *values: functools.reduce(lambda x, y: _bounded(operate(x, y)), values)


def _counting(count):
    def operate(*numbers):
        if not all(0 <= number <= 200 and number % 1 == 0 for number in numbers):
            raise OverflowError
        return Fraction(count(*map(int, numbers)))
    return operate


_OPERATIONS = {
    "+": _fold(operator.add), "*": _fold(operator.mul), "^": _power, "neg": operator.neg,
    "inv": lambda x: 1 / x, "%": lambda x: x / 100, "°": lambda x: x * math.pi / 180, "|": abs,
    "!": _counting(math.factorial), "binom": _counting(math.comb),
    "⌊": lambda x: Fraction(math.floor(x)), "⌈": lambda x: Fraction(math.ceil(x)),
    "ln": cmath.log, "log": lambda x, base: cmath.log(x) / cmath.log(base), "exp": cmath.exp,
    "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x), "cot": lambda x: 1 / cmath.tan(x),
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan,
    **{name: getattr(cmath, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")}}


# ----------------------------------------------------------------------------------------------------------
# Evaluation


def reward(response, answer):
    """The outcome of a solution: +1 if its final answer is right, else -1."""
    return 1 if grade(response, answer) else -1


def respond(model, tokenizer, problems, trials=3, temperature=0.7, max_new_tokens=1024, seed=0, progress=None):
    """`trials` zero-shot responses to each problem, without top-k or top-p: per problem a list of {"response", "correct",
    "answered", "tokens"}, which is empty if the problem does not fit the model's context."""
    prompts = [build_prompt(tokenizer, p["question"]) for p in problems]
    drawn = sample(model, tokenizer, prompts, n=trials, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed,
                   progress=progress)
    return [[{"response": s.text, "correct": grade(s.text, p["answer"]), "answered": extract_answer(s.text) is not None,
              "tokens": len(s.tokens)} for s in samples] for p, samples in zip(problems, drawn)]


def summarise(responses, trials):
    """Accuracy of `respond`'s result: the mean over trials in [0, 1], its standard error over the trials (sem), each
    trial's own, and the share of responses without an answer. A problem without responses counts as wrong.

    >>> right, wrong = {"correct": True, "answered": True}, {"correct": False, "answered": False}
    >>> summarise([[right, right], [right, wrong]], trials=2)
    {'accuracy': 0.75, 'sem': 0.25, 'n': 2, 'trials': [1.0, 0.5], 'unanswered': 0.25}
    """
    n = len(responses)
    per_trial = [sum(r[k]["correct"] for r in responses if r) / n for k in range(trials)]
    mean = sum(per_trial) / trials
    deviation = math.sqrt(sum((a - mean) ** 2 for a in per_trial) / max(1, trials - 1))
    answered = sum(x["answered"] for r in responses for x in r)
    return {"accuracy": mean, "sem": deviation / math.sqrt(trials), "n": n, "trials": per_trial,
            "unanswered": 1 - answered / (n * trials)}


def evaluate(model, tokenizer, problems, trials=3, temperature=0.7, max_new_tokens=1024, seed=0, progress=None):
    """Zero-shot evaluation as in the paper's Sec. 5: the summary of three responses to each problem at temperature 0.7,
    and the `responses` themselves."""
    responses = respond(model, tokenizer, problems, trials, temperature, max_new_tokens, seed, progress)
    return summarise(responses, trials) | {"responses": responses}


def main():
    parser = argparse.ArgumentParser(description="Zero-shot accuracy of a model on a task (paper, Sec. 5).")
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--data", required=True, help=f"JSON Lines file, or a task: {', '.join(TASKS)}")
    parser.add_argument("--data-dir", help="folder that holds the task's file already")
    parser.add_argument("--split", default="test", help="of the task (default: test)")
    parser.add_argument("--limit", type=int, help="take the first N problems")
    parser.add_argument("--trials", type=int, default=3, help="responses to each problem; paper: 3")
    parser.add_argument("--temperature", type=float, default=0.7, help="paper: 0.7")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="tokens a response may have (default: 1024)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--out", help="file for every response with its verdict, one problem a line")
    args = parser.parse_args()
    problems = load_problems(args.data, split=args.split, limit=args.limit, data_dir=args.data_dir)
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    start = time.time()
    with tqdm(total=len(problems), unit="question") as bar:
        result = evaluate(model, tokenizer, problems, args.trials, args.temperature, args.max_new_tokens, args.seed,
                          bar.update)
    tokens = sum(r["tokens"] for responses in result["responses"] for r in responses)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as out:
            for problem, responses in zip(problems, result["responses"]):
                out.write(json.dumps(problem | {"responses": responses}, ensure_ascii=False) + "\n")
    print(f"{args.data}: {len(problems)} questions, trials {', '.join(f'{100 * a:.1f}' for a in result['trials'])} %\n"
          f"accuracy {100 * result['accuracy']:.1f} ± {100 * result['sem']:.1f} % (mean and standard error of the trials), "
          f"{100 * result['unanswered']:.1f} % of the responses without an answer, "
          f"{tokens / (time.time() - start):.0f} tokens/s")


if __name__ == "__main__":
    run_command(main)
