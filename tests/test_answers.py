"""The judge of answers. Run with: python -m pytest tests/test_answers.py"""
import doctest
import random
import sys
from fractions import Fraction
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval as answers
from eval import extract_answer, grade, is_equiv

# What counts as the same answer, and what does not: (prediction, gold, expected)
CASES = [
    # numbers
    ("42", "42", True), ("42.0", "42", True), ("+42", "42", True), ("042", "42", True), ("-42", "42", False),
    ("1,250", "1250", True), (r"1{,}250", "1250", True), (r"1,\!250", "1250", True), ("1.250", "1250", False),
    (".5", "5", False), (".5", "1/2", True), ("3e4", "30000", True), (r"3 \times 10^{4}", "30000", True),
    ("2^{2005}", "2^2005", True), ("2^{2005}", "2^2004", False), ("25 percent", "0.25", True),
    ("25% per day", "25%", True),
    ("10^{15}", "1000000000000001", False), ("0.33", "1/3", False), ("0.333333333333", "1/3", True),
    ("１２", "12", True), ("−7", "-7", True), ("½", "0.5", True), ("٣", "3", True),
    # fractions, mixed numbers, roots
    (r"\frac{6}{4}", r"\dfrac32", True), ("(-3)/(4)", r"-\frac{3}{4}", True),
    (r"\frac{3}{4}", r"\frac{4}{3}", False),
    (r"2\frac{1}{3}", "7/3", True), ("2 1/3", "7/3", True), (r"2\frac{1}{3}", "2/3", False),
    (r"2\frac53", "10/3", True), (r"3\frac12 / 7", "1/2", True), (r"\frac1{10}", "0.1", True),
    (r"\sqrt{12}", r"2\sqrt3", True), (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}", True),
    (r"\sqrt[3]{-8}", "-2", True),
    # expressions
    ("(a+b)(a-b)", "a^2-b^2", True), ("(a+b)^2", "a^2+b^2", False), ("3*x**2", "3x^2", True),
    ("5x", "5", False),
    (r"\sin^2 t + \cos^2 t", "1", True), (r"\sin 30^\circ", "1/2", True), (r"\ln(x^2)", r"2\ln x", True),
    (r"\sqrt{x^2}", "x", False), (r"\sqrt{x^2}", "|x|", True), ("e^{i\\pi}", "-1", True),
    ("(1+i)^2", "2i", True),
    (r"\frac{x^2-1}{x-1}", "x+1", True), (r"\binom{6}{2}", "5!/8", True), (r"\log_2 32", "5", True),
    # tuples, intervals, sets, lists
    ("(1, 2)", "(1,2)", True), ("(2, 1)", "(1, 2)", False), ("(1,2]", "[1,2)", False),
    (r"(3,+\infty)", r"(3,\infty)", True),
    (r"(4,6)\cup(0,1)", r"(0,1)\cup(4,6)", True), (r"(0,1)\cap(4,6)", r"(0,1)\cup(4,6)", False),
    ("3, 1, 2", "1,2,3", True), ("1, 2", "1,2,3", False), (r"2 \text{ and } 1", r"\{1,2\}", True),
    (r"\{\}", r"\emptyset", True),
    (r"1 \pm \sqrt2", r"1-\sqrt2, 1+\sqrt2", True), ("100,200", "100, 200", True),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\\\end{bmatrix}", True),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)", True),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", False),
    # equations and inequalities
    ("x = 5", "5", True), ("5 = x", "x=5", True), ("x = 5", "y = 5", False),
    ("2x + 4y = 6", "y = 1.5 - x/2", True),
    ("x + y = 3", "3", False), ("x=1, y=2", "(1,2)", True), ("x > 2", r"(2,\infty)", True),
    ("2 < x", "x > 2", True),
    (r"x \ge 2", "x > 2", False), ("-x > -1", "x < 1", True), ("0 < x \\le 1", "(0,1]", True),
    ("f(x) = x+1", "1+x", True),
    # units, money, percentages, degrees, bases
    ("12 apples", "12", True), (r"12\text{ cm}^2", "12", True), ("12 cm", "12 km", False),
    ("12 inches", "12 in", True),
    ("$3.50", r"\$3.5", True), ("25%", r"25\%", True), ("25%", "1/4", True), ("26%", "25", False),
    ("-5%", "-5", True),
    (r"90^\circ", "90", True), (r"90^{\circ}", "90 degrees", True), ("1011_2", "1011_{2}", True),
    ("1011_2", "1011_3", False),
    # text
    ("The harbour.", "harbour", True), (r"\text{Tuesday}", "tuesday", True), ("not odd", "odd", False),
    ("odds", "odd", False),
    # options: a letter decides, text is compared where no letter is given
    ("B", "B) a ferry", True), ("(b)", "B) a ferry", True), ("B. a ferry", "B) a ferry", True),
    ("a ferry", "B) a ferry", True),
    ("Option B", "B", True), ("B) the wrong words", "B) a ferry", True), ("A) a ferry", "B) a ferry", False),
    ("a tram", "B) a ferry", False), ("C", "B) 12", False), ("12.0", "B) 12", True), ("2. a lake", "2", True),
    # nothing
    ("", "5", False), ("  ", "5", False), ("I do not know.", "5", False), ("5", "", False),
]

# Equal in truth, not seen: kept here so that a change of mind about one of them shows
FALSE_NEGATIVES = [
    (r"1 \le |z| \le 2", r"[-2,-1]\cup[1,2]"), ("42_7", "30_{10}"), ("seven", "7"),
    (r"60^\circ", r"\frac{\pi}{3}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}+\begin{pmatrix}1&0\end{pmatrix}", r"\begin{pmatrix}2&2\end{pmatrix}"),
    (r"\sum_{k=1}^{3} k", "6"), (r"0.\overline{3}", "1/3"), ("a or b, whichever", "a, b"),
]

RESPONSES = [
    ("Half of 8 is 4.\n\nFinal Answer: 4", "4"),
    ("Final Answer: 3\nNo, again.\nFinal Answer: 4", "4"),
    ("**Final Answer**: The answer is $\\frac{1}{2}$. I hope this helps.", r"\frac{1}{2}"),
    (r"We get \boxed{3}, wrong; so \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
    (r"Either \boxed{3} or \boxed{5} will do.", "3, 5"),
    ("She keeps 7 - 2 = 5 of them.\n#### 5", "5"),
    ("#### Step 1\nWe add.\nSo the answer is 12 apples. Done.", "12 apples"),
    ("At first C looks right, but the answer is (B).", "(B)"),
    ("Answer: $$\n\\frac{2}{3}\n$$\nBye.", r"\frac{2}{3}"),
    ("It was the work of Dr. Watt, so the answer is Dr. Watt. Right?", "Dr. Watt"),
    ("Adding both gives **15**.", "15"),
    ("Adding both.\nA: 15", "15"),
    ("I do not know.", None), ("", None), ("A cut-off \\boxed{3", None),
]


@pytest.mark.parametrize("prediction, gold, expected", CASES)
def test_case(prediction, gold, expected):
    assert is_equiv(prediction, gold) is expected


@pytest.mark.parametrize("prediction, gold", FALSE_NEGATIVES)
def test_known_false_negative(prediction, gold):
    assert not is_equiv(prediction, gold), "seen as equal now: move it to CASES"


@pytest.mark.parametrize("response, expected", RESPONSES)
def test_extraction(response, expected):
    assert extract_answer(response) == expected


def test_grade_reads_the_marked_answer_only():
    assert grade("First 7. The answer is 8.", "8")
    assert not grade("First 7. The answer is 8.", "7")
    assert not grade("It is 7 or 8. Final Answer: (7, 8)", "8")


def test_grade_without_a_marker_takes_a_bare_answer_or_the_last_value_of_prose():
    assert grade(" 8 \n", "8") and grade("In the end there are 8 of them.", "8")
    assert grade("Hence the slope of that line is $-\\frac{1}{2}$ here.", "-0.5")
    assert not grade("There were 8, later 9 of them.", "8")
    assert not grade("8x", "8") and not grade("I do not know.", "8")


N = 100_000
HOSTILE = [
    "7" * N, "7" * 1500, "9**9**9**9", "9^9^9^9", "9^{9^{9^{9}}}", "10^{999999999}", "(2^{2000})^{2000}",
    "1e400", "1e999999999",
    "9!!!!!!", "9" + "!" * N, r"\binom{1000000}{500000}", r"\sqrt[1000000007]{5}", "e^{e^{e^{e^{e}}}}", "1/0",
    "0^{-1}", "x/(y-y)",
    "x = 10^{400}", "10^{400}x < 10^{-400}", "\\pi^{-600}x = 10^{400}",
    "a" * 50_000, "ab " * 20_000, "(" * N + "1" + ")" * N, "(" * 190 + "1" + ")" * 190, "{" * N, "}" * N,
    "\\{" * N, "|" * 300,
    "\\boxed{" * N, "\\boxed{" * 2000 + "5" + "}" * 2000, "\\boxed{1} and " * 5000, "\\frac" * 300,
    "\\sqrt" * 300, "sin " * 300,
    "1\\frac{" * 60 + "1" + "}{2}" * 60, "1\\frac{" * 18 + "1" + "}{1}" * 18, "\\pm(" * 30 + "x" + ")" * 30,
    "^".join("2" * 190), "-" * N + "1", "<".join("x" * 190), "1" + ",000" * 20_000, "1,000" * 300, "a_" * 190,
    "\\pm" * 300 + "1",
    ",".join(f"x+{k}" for k in range(90)), ",".join(f"{k}+x" for k in range(90)),
    "+".join(f"(x-{k})^{{399}}/{k}" for k in range(1, 30)), "1\\frac{1}{0}", "10^{400}^\\circ",
    "+".join(f"1/{k}" for k in range(1001, 1190)),
    "Final Answer: " * 8000, "final answer" * 8000, "the answer is " * 8000, "####" * N, "####1" * 20_000,
    "$" * N, "\\(" * N,
    "**" * N, "\\text{" * N, "\\text{a}" * N, "\\begin{pmatrix}" * N, "A) " * N, " " * N, "\n" * N, "\0" * N,
    "5\0", "\ud800",
    "NaN", "nan", "inf", "-inf", "１" * N, "²" * N, "\ufdfa" * N, "e\u0301" * N,
    "__import__('os').system('touch pwned')",
    "open('/etc/passwd').read()", "\\input{/etc/passwd}", "'; DROP TABLE answers; --",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_input_ends_in_a_verdict_on_either_side(text):
    for other in ("x+1", "B) a ferry", text + "1"):
        for judge in (is_equiv, grade):
            assert judge(text, other) in (True, False)
            assert judge(other, text) in (True, False)
    assert is_equiv(text, text) is bool(text.strip(" \n\0*`\"'$.,;:"))


def test_not_a_number_and_infinity_equal_no_number():
    for text in ("NaN", "inf", "1e400", "9^9^9^9", "1/0"):
        assert not is_equiv(text, "5") and not is_equiv(text, "x")
    assert not is_equiv(r"1e308\pi\cdot 10", r"1e308\pi\cdot 20"), "two overflows are not equal"
    assert not is_equiv(r"1e308\pi x = 1", "x = y")


def test_work_is_bounded(monkeypatch):
    """A reader or an evaluation that ran past its limits would take more steps than these."""
    steps, take, at = [], answers._Reader.take, answers._at
    monkeypatch.setattr(answers._Reader, "take", lambda *args: steps.append(1) or take(*args))
    monkeypatch.setattr(answers, "_at", lambda *args, **kwargs: steps.append(1) or at(*args, **kwargs))
    answers._parse.cache_clear()
    for text in HOSTILE:
        steps.clear()
        is_equiv(text, "x+1")
        assert len(steps) < 100_000
        group = answers._parse(text)
        assert group is None or depth(group) <= 4 * answers.MAX_DEPTH
        for number in numbers(group):
            assert max(map(int.bit_length, number.as_integer_ratio())) <= answers.MAX_BITS + 54


def depth(node):
    return 1 + max(map(depth, node), default=0) if isinstance(node, tuple) else 0


def numbers(node):
    """All real numbers in a group, of whatever expression."""
    if isinstance(node, (float, Fraction)):
        yield node
    elif isinstance(node, tuple):
        for part in node:
            yield from numbers(part)


def expression(rng, size):
    """A random expression as (text, the same written differently, a different one)."""
    if size == 0:
        number, letter = rng.randint(2, 9), rng.choice("xyz")
        return rng.choice([(f"{number}", rf"\frac{{{3 * number}}}{{3}}", f"{number + 1}"),
                           (letter, f"1{letter}", f"2{letter}")])
    a, a_same, a_other = expression(rng, size - 1)
    b, b_same, _ = expression(rng, rng.randrange(size))
    return rng.choice([
        (f"({a})+({b})", f"{{{b_same}}} + {{{a_same}}}", f"({a_other})+({b})"),
        (f"({a})-({b})", f"-(({b_same})-({a_same}))", f"({a_other})-({b})"),
        (f"({a})({b}+1)", rf"({a_same}) \cdot \left({b_same}\right) + ({a_same})", f"({a_other})({b}+1)"),
        (f"({a})/(7+({b})^2)", rf"\frac{{{a_same}}}{{({b_same})({b_same})+7}}", f"({a_other})/(7+({b})^2)"),
        (f"({a})^3", f"({a_same})^2*({a_same})", f"({a_other})^3"),
    ])


@pytest.mark.parametrize("seed", range(40))
def test_random_expressions(seed):
    text, same, other = expression(random.Random(seed), 3)
    assert is_equiv(text, text) and is_equiv(text, same) and is_equiv(same, text), (text, same)
    assert not is_equiv(text, other) and not is_equiv(other, text), (text, other)


def test_random_text_never_raises():
    rng = random.Random(0)
    pieces = list(r"0123456789+-*/^_=<>!|:;,.(){}[]&%' abxyi$~") + [
        "\\frac", "\\sqrt", "\\{", "\\}", "\\\\", "\\pm", "\\cup", "\\in", "\\text{cm}", "\\left(",
        "\\begin{pmatrix}",
        "\\end{pmatrix}", "\\sin", "\\log_", "^\\circ", "\\infty", " and ", "\\boxed{", "Final Answer:", "½",
        "²", "\0"]
    for _ in range(2000):
        left, right = ("".join(rng.choices(pieces, k=rng.randint(1, 25))) for _ in range(2))
        assert is_equiv(left, right) in (True, False) and grade(left, right) in (True, False)
        left, right = f"1+{left}", f"1+{right}"  # no options now, so the two sides are alike
        assert is_equiv(left, right) == is_equiv(right, left)


def test_docstring_examples():
    assert doctest.testmod(answers).failed == 0
