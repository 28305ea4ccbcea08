"""Problems, answers and their judge: tasks, extraction of the final answer, equivalence, evaluation.

    python eval.py --model M --data gsm8k              # a task, or a JSON Lines file with question and answer

The same `grade` is the reward of the search, the label of training data and the verdict of the evaluation.
Model output is parsed, never run. Four parts, each usable alone: `load_problems`, `extract_answer`,
`is_equiv`, `evaluate`.
"""
import argparse
import cmath
import collections
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
    if isinstance(answer, str) and re.search(r"\n#### [^\n]+\s*\Z", answer):       # a file of GSM8K's form
        return _gsm8k(row, seed)
    return row["question"], str(answer) if type(answer) in (int, float) else answer


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


def _files(address, **splits):
    return {split: (file, address + path, sha256) for split, (file, path, sha256) in splits.items()}


_GITHUB = "https://raw.githubusercontent.com/"
_MIRROR = _GITHUB + "pangr2/dataset_collection/52d6686c0aef1a55241f3fc8f42345b1af9ce544/"  # of AI2's zips
_CSQA_DEV = ("csqa_dev_rand_split.jsonl", "dev_rand_split.jsonl", "3210497fdaae614ac085d9eb873dd7f4")

# task: (row converter, {split: (file name, address, first 32 hexadecimal digits of its sha256 where known)})
TASKS = {
    "gsm8k": (_gsm8k, _files(
        _GITHUB + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/",
        train=("gsm8k_train.jsonl", "train.jsonl", "17f347dc51477c50d4efb83959dbb7c5"),
        test=("gsm8k_test.jsonl", "test.jsonl", "3730d312f6e3440559ace48831e51066"))),
    "math": (_math, _files(  # 12,000 and 500 problems
        "https://media.githubusercontent.com/media/openai/prm800k/00811d6de065642a6967b9017d4cee59550c0ef4/"
        "prm800k/math_splits/",
        train=("math_train.jsonl", "train.jsonl", "90d96daeac3fe343ebb1e22ce93dd996"),
        test=("math_test.jsonl", "test.jsonl", "35dc41080a3680858b27fa7e0533d2d5"))),
    "agieval-math": (_pair, _files(
        _GITHUB + "ruixiangcui/AGIEval/5c77d073fda993f1652eaae3cf5d04cc5fd21d40/data/v1/",
        test=("agieval_math.jsonl", "math.jsonl", "43e783af2025318125a96a970a0df379"))),
    "metamath": (_metamath, _files("https://huggingface.co/datasets/meta-math/MetaMathQA/resolve/main/",
        train=("MetaMathQA-395K.json", "MetaMathQA-395K.json", "fb39a5d8c05c042ece92eae37dfd5ea4"))),
    "obqa": (_choice, _files(_MIRROR + "OpenBookQA-V1-Sep2018/Data/Main/",
        train=("openbookqa_main_train.jsonl", "OpenBookQA_train.jsonl", "388ce25926fa33b573ba6556d7245a61"),
        dev=("openbookqa_main_dev.jsonl", "dev.jsonl", "a08f720be757a0f0b6aaf8e1e1162c2b"),
        test=("openbookqa_main_test.jsonl", "test.jsonl", "feb2bd9bfa6161dca4c44ce90e51e8cd"))),
    "csqa": (_choice, _files("https://s3.amazonaws.com/commensenseqa/",  # its test answers are not public
        train=("csqa_train_rand_split.jsonl", "train_rand_split.jsonl", "58ffa3c8472410e24b8c43f423d89c8a"),
        dev=_CSQA_DEV, test=_CSQA_DEV)),
    "arc": (_choice, _files(_MIRROR + "ARC-V1-Feb2018/ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-",
        train=("arc_challenge_train.jsonl", "Train.jsonl", "e02837c53ee86f6d73c259f91c77725c"),
        dev=("arc_challenge_dev.jsonl", "Dev.jsonl", "55224364abd2477f66a9a57c5cbef109"),
        test=("arc_challenge_test.jsonl", "Test.jsonl", "9fa8ffb3e3a1f88cb302d53dd95aae81"))),
    "sciq": (_sciq, _files(_MIRROR + "SciQ/",
        train=("sciq_train.json", "train.json", ""),
        dev=("sciq_valid.json", "valid.json", "b201bc1c002b31cabc8581d05f8a5ce9"),
        test=("sciq_test.json", "test.json", "7340983c427dc2ffd3dccf1adb758b6c"))),
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
    convert, files = TASKS.get(name_or_path, (_pair, None))
    if files is None:
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"{path} is neither a file nor a task; the tasks are {', '.join(TASKS)}.")
    elif split not in files:
        raise InputError(f"{name_or_path} has no split {split!r}: choose one of {', '.join(files)}.")
    elif name_or_path == "arithmetic":
        return arithmetic(min(files[split], sys.maxsize if limit is None else limit), seed=split)
    else:
        path = _locate(*files[split], data_dir)
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


def _locate(file, url, sha256, data_dir):
    cache = Path(os.environ.get("DVO_CACHE") or Path.home() / ".cache" / "dvo")
    for path in (Path(data_dir or cache, file), cache / file):
        if path.is_file():
            return path
    _download(url, path, sha256)
    return path


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


# ----------------------------------------------------------------------------------------------------------
# The arithmetic task: generated, nothing to download

OPERATIONS = {"Add": ("+", lambda a, b: a + b), "Subtract": ("-", lambda a, b: a - b),
              "Multiply by": ("*", lambda a, b: a * b)}
LARGEST = 29                                    # every intermediate value lies in 0 ... LARGEST


def arithmetic(n, seed=0, low=3, high=6):
    """n different chains of `low` to `high` operations as {"question", "answer"}; the same for the same seed.

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
    """A worked solution. With probability `skip` a step runs on over the next operation and states only the
    result of both: what a model learns from such examples is to take steps that it cannot do reliably.

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

MAX_RESPONSE = 20_000  # characters, from the end: an answer is not looked for before them
_FINAL = re.compile(r"final\s+answer[\s*]*(?:is\b|:)", re.I)
_WEAKER = [re.compile(pattern, re.I) for pattern in (
    r"(?<!#)####(?!#)(?=[ \t]*[^\s\d]{0,9}\d\S{0,40}[ \t]*(?:\n|\Z)|[^\n]{0,60}\s*\Z)",  # not a heading
    r"\b(?:answer|(?:correct|right|best)\s+(?:option|choice))\b[^.:\n]{0,40}?\bis\b",  # the answer is
    r"\banswer\**\s*(?:[:=]|(?=\$|\\[(\[]))", r"(?:\A|\n)A:(?=[^\n]{0,60}\s*\Z)",  # Answer:, A: as last line
    r"\*\*(?=[^*\n]+\*\*[.\s]*\Z)")]  # bold text at the end
_SENTENCE_END = re.compile(r"(?<!\b[DMS][rst])[.!?][)\"'*]*\s+(?=[A-Z<\[(])|<\|")  # not after Dr, Mr, Ms
_BOX, _BRACE = re.compile(r"\\f?boxed\s*(?=\{)"), re.compile(r"\\.|[{}]", re.S)
_JOINT = re.compile(r"[^.]*(?:,|;|\band\b|\bor\b)(?:[^A-Za-z\\]|\\[A-Za-z]*|[A-Za-z](?![A-Za-z]))*")
_VALUE = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]"
                    r"|((?<!\^)-?\.?\d(?:[\d,]*\d)?(?:\.\d+)?(?:/\d+)?\s?%?)", re.S)


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
    rest = _after_last(_FINAL, text)
    if found := _boxed(rest) or _sentence(rest):
        return extract_answer(found) or found  # "Final Answer: the answer is 5"
    found = _boxed(text)
    for marker in _WEAKER:
        if not found and (rest := _after_last(marker, text)):
            found = _sentence(rest)
    return found or None


def _after_last(marker, text):
    ends = [use.end() for use in marker.finditer(text)]
    return text[ends[-1]:] if ends else ""


def _boxed(text):
    """The content of the last box, after that of boxes joined to it by a comma, "and" or "or"; or None."""
    found, start = [], len(text)
    for box in reversed(list(_BOX.finditer(text))):
        depth, end = 0, None
        for brace in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                end = brace.end()
                break
        if end is None or found and (start - end > 40 or not _JOINT.fullmatch(text, end, start)):
            break
        found.insert(0, text[box.end() + 1:end - 1].strip())
        start = box.start()
    return ", ".join(found) or None


def _sentence(rest):
    """The rest of the sentence after a marker, which may open with display mathematics over several lines."""
    rest = rest.lstrip(" \t\r\n:*")
    for opening, closing in (("$$", "$$"), (r"\[", r"\]")):
        if rest.startswith(opening) and (end := rest.find(closing, 2)) > 0:
            return rest[2:end].strip()
    line = _SENTENCE_END.split(rest.split("\n", 1)[0], maxsplit=1)[0].strip(" \t\r*\"'`").rstrip("*. ")
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
    if len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", prediction)) < 3 or _parse(_clean(prediction)):
        return False
    values = list(_VALUE.finditer(_translate(prediction[-1000:])))
    return bool(values) and is_equiv(next(filter(None, values[-1].groups())), answer)


# ----------------------------------------------------------------------------------------------------------
# Equivalence: equal as option or as text, else read as mathematics and compared by value

# Beyond these limits two answers are equal only as text
MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_BITS, MAX_LIST = 2000, 400, 40, 4096, 30

_WRAPPED = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname)\s*\{([^{}]*)\}")
_CHOSEN = re.compile(r"(?:(?:option|choice|answer)\s+)?\(?([A-J\d])\)?\s*(?:[.):](?!\d).*)?", re.I | re.S)
_RIGHT = re.compile(r"\(?([A-J\d])(?:\)?|\) (.+))", re.I | re.S)  # B, (B), or B) with the text of the option
_UNICODE = {ord(k): v for k, v in {
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
    "≤": "<=", "≥": ">=", "≠": "!=", "≈": "=", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "±": r"\pm ", "θ": r"\theta ", "²": "^2", "³": "^3", "⁄": "/", "’": "'", "\0": "",
    "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅛": " 1/8"}.items()}


def is_equiv(prediction, answer):
    r"""Whether two answers mean the same: numbers, expressions, lists, tuples, intervals, equations, options.

    A unit, currency sign, delimiter, final full stop, thousands separator or "x =" does not change an answer.
    Tuples are ordered, brackets of intervals matter, lists of all values and sets are unordered. Always
    returns, never raises, runs no part of its input; the work is bounded by the MAX_ constants.

    >>> is_equiv(r"x = \frac{3}{4}", "0.75"), is_equiv("(a+b)^2", "a^2+2ab+b^2"), is_equiv("[0,1)", "[0,1]")
    (True, True, False)
    """
    prediction, answer = _clean(prediction), _clean(answer)
    chosen, right = _CHOSEN.fullmatch(_WRAPPED.sub(r"\1", prediction[:MAX_CHARS])), _RIGHT.fullmatch(answer)
    if chosen and right and chosen[1].isdigit() == right[1].isdigit():
        return chosen[1].upper() == right[1].upper()  # of two labels nothing else counts
    answer = right and right[2] or answer
    if not prediction or not answer:
        return False
    if _plain(prediction) == _plain(answer):
        return True
    separators = (",", ", ") if "," in prediction + answer else (",",)  # "1,200": one number, or two?
    return any(_same_answers(*(_parse(text.replace(",", separator)) for text in (prediction, answer)))
               for separator in separators)


def _clean(text):
    text = str(text)
    if "boxed" in text:
        text = _boxed(text[-MAX_RESPONSE:]) or text
    text = _translate(text).strip(" \t\r\n*`\"'\0").rstrip(" .;,:*`\"'\n$")
    wrapped = _WRAPPED.fullmatch(text.strip("$ "))
    return wrapped[1].strip() if wrapped else text


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
    text = re.sub(r"\\?\$|\\[()\[\]]", " ", _WRAPPED.sub(r" \1 ", text)).casefold()
    text = re.sub(r" ?_ ?\{ ?(\w+) ?\}", r"_\1", " ".join(text.split()))  # 101_{2} is 101_2
    return re.sub(r"\A(?:the|an|a) (?=\w)", "", text.rstrip(" ."))


# Reading: text becomes tokens (kind, value), tokens become expressions, groups and relations.

# An expression is its values at a few points, None where undefined, and its unit; a number has a single value
_Expr = collections.namedtuple("_Expr", "values unit", defaults=[None])
_Group = collections.namedtuple("_Group", "brackets items")  # of a tuple or interval, "row", "{}": unordered
# The gaps are left side minus right side; "x = 5" and "x > 5" give the name x the value 5 or (5, infinity)
_Relation = collections.namedtuple("_Relation", "signs gaps name value")

_FUNCTIONS = {
    "ln": cmath.log, "log": lambda x, base=10: cmath.log(x) / cmath.log(base), "exp": cmath.exp,
    "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x), "cot": lambda x: 1 / cmath.tan(x),
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan,
    **{name: getattr(cmath, name) for name in ("sinh", "cosh", "tanh", "sin", "cos", "tan")}}
_CONSTANTS = {"e": math.e, "i": 1j, r"\pi": math.pi, "pi": math.pi}
_UNITS = {name: names.split()[0] for names in (
    "mm millimeter", "cm centimeter", "meter", "km kilometer", "in inch inche", "ft foot feet", "yd yard",
    "mi mile", "gram", "kg kilogram", "mg milligram", "lb pound", "oz ounce", "ml milliliter", "liter", "mph",
    "sec second", "min minute", "hr hour", "day", "week", "month", "year", "cent", "dollar", "am", "pm",
    "% percent", "° degree") for name in names.split()}
_KINDS = {text: kind for kind, texts in {  # what has another spelling or is no sign, name or word
    "*": r"\cdot \times \ast", "/": r"\div :", "^": "**", ",": r"; & and or \cup", "sqrt": r"\sqrt sqrt",
    "frac": r"\frac \dfrac \tfrac \cfrac", "binom": r"\binom \dbinom \tbinom", "%": r"\%", "∈": r"\in",
    "=": r"\approx", "≠": r"\ne \neq !=", "<": r"\lt", "≤": r"\le \leq \leqslant <=", ">": r"\gt",
    "≥": r"\ge \geq \geqslant >=", "±": r"\pm", "∓": r"\mp", "∩": r"\cap \setminus", "°": r"\circ \degree",
    "∅": r"\emptyset \varnothing", "∞": r"\infty infty infinity inf", "|": r"\lvert \rvert \vert",
    "⌊": r"\lfloor", "⌋": r"\rfloor", "⌈": r"\lceil", "⌉": r"\rceil", "(": r"\langle", ")": r"\rangle",
    r"\{": r"\lbrace", r"\}": r"\rbrace", "constant": " ".join(_CONSTANTS)}.items() for text in texts.split()}
_STARTS = {"name", "constant", "∞", "fn", "frac", "binom", "sqrt", "(", "[", "{", r"\{", "⌊", "⌈", "begin"}
_KNOWN = _KINDS.keys() | _FUNCTIONS.keys()
_SHORT = "|".join(word for word in [*_UNITS, *_KINDS] if word.isalpha() and 1 < len(word) < 4)
_IGNORED = re.compile(r"""\s+ | ~ | \\?\$ | [€£¥] | (?<!\\)\\[\ ,;:()\[\]]
    | \\(?:q?quad|left|right|[bB]igg?[lrm]?|displaystyle|limits)(?![A-Za-z])""", re.X)
_TOKEN = re.compile(rf"""\s?(?:
      (?P<whole>(?<![\d.^_])\d+(?=\s\d+\s?/\s?\d|\s?\\[dtc]?frac\s?\{{?\d))  # of a mixed number
    | (?P<num>(?:\d{{1,3}}(?:[,\s]\d{{3}})+(?!\d)(?:\.\d+)?|\d+\.?\d*|\.\d+)
              (?:[eE][+-]?\d{{1,3}}(?![A-Za-z\d]))?)
    | \\?(?P<fn>{"|".join(_FUNCTIONS)})(?=[xyzt]?(?![A-Za-z]))
    | (?P<word>{_WRAPPED.pattern} | (?<=\s)[A-Za-z]{{3,}}
               | (?<![A-Za-z\\])(?:[A-Za-z]{{4,}}|(?:{_SHORT})s?(?![A-Za-z])))
    | (?P<begin>\\begin\s?\{{[A-Za-z\s]*\*?\}}(?:\s?\{{[clr|\s]*\}})?) | (?P<end>\\end\s?\{{[A-Za-z\s]*\*?\}})
    | (?P<name>(?:[A-Za-z]|\\[A-Za-z]+)'*(?:\s?_\s?(?:\{{[\w\s,+-]*\}}|\w))?)
    | (?P<sign>\*\*|[<>!]=|\\[\\{{}}%]|[-+*/^_=<>!|:;,(){{}}\[\]&%°]) | (?P<unknown>.))""", re.X)


@functools.lru_cache(maxsize=4096)
def _parse(text):
    """What a text lists, as an unordered group, or None if it is not mathematics."""
    if len(text) > MAX_CHARS or not re.search(r"[^A-Za-z\s,.'-]", text) and any(
            word not in _KNOWN for word in re.findall(r"[a-z]{2,}", text.casefold())):  # words alone are text
        return None
    try:
        tokens = _tokens(text)
        found = _Reader(tokens, minus=False).items("end of text")[0]
        if any(kind in ("±", "∓") for kind, _ in tokens):  # read ± as + and as -
            found = dict.fromkeys(found + _Reader(tokens, minus=True).items("end of text")[0])
        return _set(found)
    except (ValueError, LookupError):
        return None


def _tokens(text):
    text = re.sub(r"\{,\}(?=\d{3})|,?\\!\s*", "", text)  # surely a separator of thousands
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b|°)", "°", text)
    text = re.sub(r"(frac|binom|log_)\s*(\d)(?=\s*\d)", r"\1{\2}", text)  # \frac12 is 1/2
    tokens = []
    for match in _TOKEN.finditer(" ".join(_IGNORED.sub(" ", text).split())):
        kind = match.lastgroup
        value = match[kind]
        if kind == "unknown" or len(tokens) == MAX_TOKENS:
            raise ValueError("no sign of mathematics, or too long")
        if kind == "word":
            value = _WRAPPED.sub(r"\1", value).strip()
            kind = _KINDS.get(value.casefold(), kind if len(value) > 1 else "name")
        elif kind == "name":
            value = re.sub(r"[\s{}]", "", value)
            kind = _KINDS.get(value, kind)
        elif kind == "sign":
            kind = _KINDS.get(value, value)
        tokens.append((kind, value))
    return [*tokens, ("end of text", "")]


class _Reader:
    """Recursive descent: one method a level of binding, loosest first. `minus`: how to read ±."""

    def __init__(self, tokens, minus):
        self.tokens, self.minus, self.at, self.depth, self.bars = tokens, minus, 0, 0, 0

    def next(self):
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
            if not self.take(","):
                found.append(self.relation())
                if self.next() not in (",", *closers):
                    raise ValueError(f"{self.next()} in a list")
        return found, closer[0]

    def relation(self):
        signs, terms, names, sign = "", [], [], True
        while sign:
            start = self.at
            terms.append(self.sum())
            span = self.tokens[start:self.at]  # a name is x, f(x), (x, y), dy/dx
            is_name = {kind for kind, _ in span} <= {"name", "(", ")", ",", "/", "frac", "{", "}"}
            names.append("".join(value for _, value in span) if is_name else None)
            if sign := self.take(*"=≠<≤>≥∈"):
                signs += sign[0]
        return _relation(signs, terms, names) if signs else terms[0]

    def sum(self):
        node, words = self.term(), []
        while self.next() in ("+", "-", "±", "∓"):  # the next factor takes it
            node = _apply(operator.add, node, self.term())
        while word := self.take("word", *("^/" if words else "")):  # cm^2, km/h
            words += word[1].casefold().split()
            if word[0] != "word" and self.next() != "word":
                self.factor("")
        known = [unit for unit in (_UNITS.get(word, _UNITS.get(word.rstrip("s"))) for word in words) if unit]
        return node._replace(unit=node.unit or known[-1]) if known and isinstance(node, _Expr) else node

    def term(self):
        node = self.factor()
        while (sign := self.take("*", "/")) or self.factor_starts():
            node = _apply(operator.truediv if sign and sign[0] == "/" else operator.mul, node, self.factor())
        return node

    def factor_starts(self):
        kind = self.next()
        if kind in ("num", "whole"):
            return self.tokens[self.at - 1][0] != "num"
        return kind in _STARTS or kind == "|" and not self.bars

    def factor(self, marks="^!%°"):
        """An operand with its signs and the `marks` after it. Every recursion passes here."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("too deep")
        negative = False
        while sign := self.take(*"+-±∓"):
            negative ^= {"+": False, "-": True, "±": self.minus, "∓": not self.minus}[sign[0]]
        node = self.atom(*self.take(self.next()))
        while mark := self.take(*marks[:2]):
            node = _apply(_FACTORIAL, node) if mark[0] == "!" else _apply(_power, node, self.factor("^"))
        node = _apply(operator.neg, node) if negative else node
        while mark := self.take(*marks[2:]):
            node = _Expr(_operand(node), mark[0])
        self.depth -= 1
        return node

    def atom(self, kind, value):
        """The operand that begins with the token (kind, value), which was taken. ValueError if none does."""
        if kind == "num":
            return _number(re.sub(r"[,\s]|\.(?!\d)", "", value))
        if kind == "whole":  # 1 1/2 and 1\frac12 are 3/2, but 1\frac32 is a product
            is_slashed, part = self.next() != "frac", self.factor("")
            if is_slashed and self.take("/"):
                part = _apply(operator.truediv, part, self.factor(""))
            is_proper = all(isinstance(x, Fraction) and 0 < x < 1 for x in _operand(part))
            return _apply(operator.add if is_proper else operator.mul, _number(value), part)
        if kind in ("name", "∞"):  # infinity is one more letter
            return _letter(value if kind == "name" else kind)
        if kind == "constant":
            return _Expr((_CONSTANTS[value.casefold()],))
        if kind == "fn":
            return self.function(value)
        if kind in ("frac", "binom"):
            return _apply(operator.truediv if kind == "frac" else _BINOMIAL, self.factor(""), self.factor(""))
        if kind == "sqrt":
            degree = self.items("]")[0][0] if self.take("[") else _number(2)
            return _apply(lambda n, x: _power(x, 1 / n), degree, self.factor(""))
        if kind in ("(", "["):
            found, closer = self.items(")", "]")
            is_grouping = len(found) == 1 and kind + closer in ("()", "[]")
            return found[0] if is_grouping else _Group(kind + closer, tuple(found))
        if kind in ("{", r"\{", "∅"):
            found = [] if kind == "∅" else self.items(kind.replace("{", "}"))[0]
            return found[0] if kind == "{" and len(found) == 1 else _set(found)
        if kind == "begin":
            rows, closer = [], ""
            while closer != "end":
                row, closer = self.items(r"\\", "end")
                rows += [row[0] if len(row) == 1 else _Group("row", tuple(row))] if row else []
            return rows[0] if len(rows) == 1 else _Group("()", tuple(rows))  # a column is a vector
        if kind in _BARS:
            closer, operate = _BARS[kind]
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            if self.take(closer):
                return _apply(operate, node)
        raise ValueError(f"{value} is no operand")

    def function(self, name):
        """A named function with its power, base and argument: `\\sin^2 x`, `\\log_2 8`, `\\sin^{-1} x`."""
        power, base = None, []
        while mark := self.take("^", "_"):
            if mark[0] == "^":
                power = self.factor("^")
            else:
                base = [self.factor("")]
        is_enclosed = self.next() in ("(", "[", "{")
        argument = self.factor("") if is_enclosed else self.factor()
        while not is_enclosed and self.factor_starts() and self.next() not in ("fn", "(", "["):
            argument = _apply(operator.mul, argument, self.factor())
        if power == _number(-1):
            return _apply(_FUNCTIONS["arc" + name], argument)
        node = _apply(_FUNCTIONS[name], argument, *base)
        return _apply(_power, node, power) if power else node


def _relation(signs, terms, names):
    """A relation with < and ≤ for > and ≥; z in S is S, and a chain of equations counts by its ends."""
    if signs[-1] == "∈":
        return terms[-1]
    if set(signs) <= set(">≥"):
        signs, terms, names = signs[::-1].replace(">", "<").replace("≥", "≤"), terms[::-1], names[::-1]
    name, value, gaps = None, None, []
    if set(signs) == {"="}:
        signs, terms = "=", [terms[0], terms[-1]]
        name, value = (names[0], terms[1]) if names[0] else (names[-1], terms[0])
    elif set(signs) <= set("<≤") and len(terms) < 4:  # x < 5 lies between -infinity and 5
        i = 0 if names[0] and len(terms) == 2 else 1
        ends = [_apply(operator.neg, _letter("∞")), *terms, _letter("∞")]
        is_closed = [sign == "≤" for sign in f"<{signs}<"]
        name, value = names[i], _Group("(["[is_closed[i]] + ")]"[is_closed[i + 1]], (ends[i], ends[i + 2]))
    if all(isinstance(term, _Expr) for term in terms):
        gaps = [_apply(operator.sub, left, right) for left, right in zip(terms, terms[1:])]
    return _Relation(signs, tuple(gaps), name, value if name else None)


def _set(nodes):
    """An unordered group; sets among the nodes, as in a union, lend it their members."""
    members = []
    for node in nodes:
        members += node.items if isinstance(node, _Group) and node.brackets == "{}" else [node]
    return _Group("{}", tuple(members))


# Comparing: containers by their parts, expressions by their values


def _same_answers(left, right):
    if left is None or right is None:
        return False
    for one, many in ((left, right), (right, left)):  # (1, 2) against x = 1, y = 2
        values = tuple(getattr(item, "value", None) for item in many.items)
        if len(values) > 1 and None not in values and _same(one, _set([_Group("()", values)])):
            return True
    return _same(left, right)


def _same(a, b):
    if isinstance(a, _Relation) and isinstance(b, _Relation):
        return a.name == b.name and None not in (a.value, b.value) and _same(a.value, b.value) or (
            a.signs == b.signs and len(a.gaps) == len(b.gaps) > 0
            and all(map(_proportional, a.gaps, b.gaps, a.signs)))
    if isinstance(a, _Relation) or isinstance(b, _Relation):  # x = 5 and 5, 0 < x < 1 and (0, 1)
        relation, other = (a, b) if isinstance(a, _Relation) else (b, a)
        return relation.value is not None and _same(relation.value, other)
    if isinstance(a, _Expr) and isinstance(b, _Expr):
        if a.unit and b.unit and a.unit != b.unit:
            return False
        return _agree(a.values, b.values) or "%" in (a.unit, b.unit) and _agree(_operand(a), _operand(b))
    if type(a) is not type(b) or a.brackets != b.brackets or len(a.items) != len(b.items):
        return False
    if a.brackets != "{}":
        return all(map(_same, a.items, b.items))
    rest = list(b.items) if len(b.items) <= MAX_LIST else []
    for item in a.items:
        twin = next((i for i, other in enumerate(rest) if _same(item, other)), None)
        if twin is None:
            return False
        del rest[twin]
    return True


def _proportional(a, b, sign):
    """Whether a / b is the same number at all points, as for 2x < 4 and x < 2; positive for an inequality."""
    ratios = _apply(operator.truediv, a, b).values
    return _agree(ratios, ratios[:1]) and (ratios[0].real > 0 or sign in "=≠" and ratios[0] != 0)


def _agree(*columns):
    points = _by_point(*columns)
    defined = [point for point in points if None not in point]
    return len(defined) >= min(len(points), 2) and all(_close(x, y) for x, y in defined)


def _close(x, y):
    """Equal exactly for two decimals, but nearly for others: 0.333333333333 can be meant for 1/3."""
    if x == y:
        return True
    if all(isinstance(number, Fraction) and pow(10, 20, number.denominator) == 0 for number in (x, y)):
        return False
    try:
        return abs(x - y) <= 1e-9 * max(abs(x), abs(y)) + 1e-13
    except OverflowError:  # beyond floating point
        return False


# Arithmetic on expressions: at all points at once, exact as long as the numbers are rational and small


def _number(value):
    return _Expr((_at(Fraction, [value], real=True),))


@functools.lru_cache(maxsize=4096)
def _letter(name):
    """Positive at first, small to large, because roots and logarithms need that; then of either sign."""
    draw = random.Random(name)
    sizes = [draw.randint(*ends) for ends in [(1, 900), (900, 3000), (3000, 12000), (100, 3000)] * 2]
    signs = [1, 1, 1, -1, *draw.choices((1, -1), k=4)]
    return _Expr(tuple(Fraction(sign * size, 997) for sign, size in zip(signs, sizes)))


def _apply(operate, *operands):
    points = _by_point(*map(_operand, operands))
    return _Expr(tuple(_at(operate, point, real=len(points) > 1) for point in points))


def _operand(node):
    """The values of an operand: 25% is 0.25 and 180° is pi, here and nowhere else."""
    if not isinstance(node, _Expr):
        raise ValueError("arithmetic on a group")
    scale = {"%": Fraction(1, 100), "°": Fraction(math.pi) / 180}.get(node.unit)
    return node.values if scale is None else tuple(x if x is None else x * scale for x in node.values)


def _by_point(*columns):
    """The values of several expressions point by point; a number is the same at all points."""
    points = max(map(len, columns))
    return list(zip(*(column if len(column) == points else column * points for column in columns)))


def _at(operate, numbers, real):
    """The result, or None where it is undefined, too large, or (if `real`) complex though no number is."""
    try:
        value = operate(*numbers)
        bits = max(map(int.bit_length, value.as_integer_ratio())) if isinstance(value, Fraction) else 0
        if bits > MAX_BITS or not abs(value) < math.inf:
            return None
    except (ArithmeticError, ValueError, TypeError):  # TypeError: one of the numbers is None
        return None
    if isinstance(value, complex) and abs(value.imag) <= 1e-12 * abs(value):
        return value.real
    is_new = isinstance(value, complex) and not any(isinstance(number, complex) for number in numbers)
    return None if real and is_new else value


def _power(base, exponent):
    """Exact for a whole exponent and a small result; an odd root of a negative number is real."""
    rational = isinstance(exponent, Fraction) and not isinstance(base, complex)
    if rational and exponent.denominator == 1 and isinstance(base, Fraction):
        if math.log2(max(map(abs, base.as_integer_ratio()))) * abs(exponent) < MAX_BITS:
            return base ** exponent
    if rational and exponent.denominator % 2 and base < 0:
        return (-1) ** exponent.numerator * float(-base) ** float(exponent)
    return complex(base) ** complex(exponent)


def _counting(count):
    def operate(*numbers):
        if not all(0 <= number <= 200 and number % 1 == 0 for number in numbers):
            raise OverflowError
        return Fraction(count(*map(int, numbers)))
    return operate


_FACTORIAL, _BINOMIAL = _counting(math.factorial), _counting(math.comb)
_BARS = {"|": ("|", abs), "⌊": ("⌋", math.floor), "⌈": ("⌉", math.ceil)}


# ----------------------------------------------------------------------------------------------------------
# Evaluation


def reward(response, answer):
    """The outcome of a solution: +1 if its final answer is right, else -1."""
    return 1 if grade(response, answer) else -1


def respond(model, tokenizer, problems, trials=3, temperature=0.7, max_new_tokens=1024, seed=0,
            progress=None):
    """`trials` zero-shot responses to each problem, without top-k or top-p: for each a list of {"response",
    "correct", "answered", "tokens"}, which is empty if the problem does not fit the model's context."""
    prompts = [build_prompt(tokenizer, p["question"]) for p in problems]
    drawn = sample(model, tokenizer, prompts, n=trials, temperature=temperature,
                   max_new_tokens=max_new_tokens, seed=seed, progress=progress)
    return [[{"response": s.text, "correct": grade(s.text, p["answer"]), "tokens": len(s.tokens),
              "answered": extract_answer(s.text) is not None} for s in samples]
            for p, samples in zip(problems, drawn)]


def summarise(responses, trials):
    """Accuracy of `respond`'s result: the mean over trials in [0, 1], its standard error over the trials
    (sem), each trial's own, and the share of responses without an answer. A problem without responses counts
    as wrong.

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


def evaluate(model, tokenizer, problems, trials=3, temperature=0.7, max_new_tokens=1024, seed=0,
             progress=None):
    """Zero-shot evaluation as in the paper's Sec. 5: the summary of three responses to each problem at
    temperature 0.7, and the `responses` themselves."""
    responses = respond(model, tokenizer, problems, trials, temperature, max_new_tokens, seed, progress)
    return summarise(responses, trials) | {"responses": responses}


def main():
    """The command: sample answers, print accuracy and its spread over the trials."""
    parser = argparse.ArgumentParser(description="Zero-shot accuracy of a model on a task (paper, Sec. 5).")
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--data", required=True, help=f"JSON Lines file, or a task: {', '.join(TASKS)}")
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
    parser.add_argument("--out", help="file for every response with its verdict, one problem a line")
    args = parser.parse_args()
    problems = load_problems(args.data, split=args.split, limit=args.limit, data_dir=args.data_dir)
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    start = time.time()
    with tqdm(total=len(problems), unit="question") as bar:
        result = evaluate(model, tokenizer, problems, args.trials, args.temperature, args.max_new_tokens,
                          args.seed, bar.update)
    tokens = sum(r["tokens"] for responses in result["responses"] for r in responses)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as out:
            for problem, responses in zip(problems, result["responses"]):
                out.write(json.dumps(problem | {"responses": responses}, ensure_ascii=False) + "\n")
    trials = ", ".join(f"{100 * accuracy:.1f}" for accuracy in result["trials"])
    print(f"{args.data}: {len(problems)} questions, trials {trials} %\n"
          f"accuracy {100 * result['accuracy']:.1f} ± {100 * result['sem']:.1f} % "
          f"(mean, standard error of the trials), "
          f"{100 * result['unanswered']:.1f} % of the responses without an answer, "
          f"{tokens / (time.time() - start):.0f} tokens/s")


if __name__ == "__main__":
    run_command(main)
