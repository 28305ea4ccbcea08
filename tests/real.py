# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""A real model through the whole pipeline: bootstrapping, search, every objective on the same trees, evaluation.

    python tests/real.py --model MODEL --train gsm8k_train.jsonl --test gsm8k_test.jsonl --out REAL
    python tests/real.py ... --only bootstrap search      # some stages; each goes on where it was stopped
    python tests/real.py ... --report assets/real.json    # what is there so far, with its intervals

Every stage but `fit` is one of the project's own commands, printed as it is called. The questions are disjoint
slices of the two files: to bootstrap on, to search and train on, to search only (held-out trees, on which the
learned credit is compared with its target), to search in DVO's second round, and to test on. Sizes are set once,
below, before anything runs; no number of a test question chooses anything.
"""
import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import dvo
import eval as tasks
import mcts

BOOTSTRAP = ["--bootstrap-questions", "120", "--bootstrap-samples", "6", "--bootstrap-lr", "5e-6"]
SEARCH = ["--iterations", "8", "--max-step-tokens", "160", "--depth", "12"]
TRAIN = ["--questions-per-step", "3", "--epochs", "2", "--lr", "5e-6", "--save-minutes", "3"]
TRIALS, MAX_NEW_TOKENS = "2", "320"
SEARCHED = {"trees": slice(200, 300), "held-out": slice(340, 360), "second": slice(360, 460)}  # training
TESTED = 200  # test questions, the first
METHODS = {
    "dvo": [],
    "rft": ["--objective", "rft"],
    "dvo-response": ["--level", "response"],
    "grpo": ["--objective", "grpo"],
    "dpo": ["--objective", "dpo"],
    "kto": ["--objective", "kto"],
}
BETA = 0.1


# ---------------------------------------------------------------- the stages


def stages(args):
    """Name and work of every stage, in the order of importance."""
    out = args.out
    boot = out / "bootstrap/round0/model"

    def evaluate(name, model):
        return command("eval.py", "--model", model, "--data", args.test, "--limit", TESTED, "--trials", TRIALS,
                       "--max-new-tokens", MAX_NEW_TOKENS, "--out", out / f"eval-{name}.jsonl")

    def search(name, model):
        questions = out / f"{name}.questions.jsonl"
        trees = out / f"{name}.jsonl"
        searched = command("mcts.py", "--model", model, "--data", questions, *SEARCH, "--out", trees)

        def work():
            write_questions(args, SEARCHED[name], questions)
            searched()
        return work

    def train(name, model, trees):
        flags = METHODS.get(name, [])
        return command("dvo.py", "--model", model, "--trees", trees, *flags, *TRAIN, "--out", out / name)

    def command(script, *arguments):
        line = [sys.executable, str(ROOT / script), *map(str, arguments), "--dtype", args.dtype]
        if args.device:
            line += ["--device", args.device]
        return lambda: run(line)

    yield "bootstrap", command("dvo.py", "--model", args.model, "--data", args.train, "--rounds", "0", *BOOTSTRAP,
                               "--trials", "3", "--max-new-tokens", MAX_NEW_TOKENS, "--save-minutes", "3",
                               "--out", out / "bootstrap")
    yield "search", search("trees", boot)
    yield "eval-base", evaluate("base", args.model)
    yield "eval-bootstrapped", evaluate("bootstrapped", boot)
    yield "held-out", search("held-out", boot)
    for name in METHODS:
        trained = out / name / "round1/model"
        yield name, train(name, boot, out / "trees.jsonl")
        yield f"eval-{name}", evaluate(name, trained)
        yield f"fit-{name}", lambda name=name, trained=trained: fit(args, name, boot, trained)
    first = out / "dvo/round1/model"
    yield "second", search("second", first)
    yield "dvo-second", train("dvo-second", first, out / "second.jsonl")
    yield "eval-dvo-second", evaluate("dvo-second", out / "dvo-second/round1/model")


def run(line):
    """Run a command of the project; stop where it fails."""
    print("+", shlex.join(line), flush=True)
    subprocess.run(line, check=True)


def write_questions(args, part, path):
    """A slice of the training file, to be searched."""
    problems = tasks.load_problems(args.train, split="train")[part]
    lines = [json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems]
    path.write_text("".join(lines), encoding="utf-8")


@torch.no_grad()
def fit(args, name, boot, trained):
    """How the learned credit of a trained policy, beta * log_ratio, fits its target on trees it never saw."""
    trees = list(mcts.read_trees(args.out / "held-out.jsonl"))
    examples = [e for e in map(dvo.make_example, trees) if e]
    steps = {}
    for label, folder in ("reference", boot), ("policy", trained):
        model, _ = mcts.load_model(str(folder), args.device, "float32")
        steps[label] = [dvo.step_logprobs(model, e.pack) for e in examples]
    target, learned = [], []
    for e, policy, reference in zip(examples, steps["policy"], steps["reference"]):
        on_paths = e.path.sum(0) > 0
        target += e.credit[on_paths].tolist()
        learned += (BETA * (policy - reference))[on_paths].tolist()
    record = {"trees": len(examples), "steps": len(target), "correlation": correlation(target, learned),
              "mean_squared_error": float(np.mean(np.subtract(target, learned)**2)),
              "mean_squared_credit": float(np.mean(np.square(target)))}
    (args.out / f"fit-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(name, record)


def correlation(x, y):
    return float(np.corrcoef(x, y)[0, 1])


# ---------------------------------------------------------------- the report


def report(args):
    """Everything that is there, as one JSON file and one table."""
    found = {"settings": {"bootstrap": BOOTSTRAP, "search": SEARCH, "train": TRAIN}, "methods": {}}
    found["hours"] = hours(args.out)
    found["bootstrap"] = read_json(args.out / "bootstrap/round0/bootstrap.json")
    for name in SEARCHED:
        path = args.out / f"{name}.jsonl"
        if path.exists():
            found[name] = mcts.describe(mcts.read_trees(path))
    right = {}
    for path in sorted(args.out.glob("eval-*.jsonl")):
        name = path.stem.removeprefix("eval-")
        records = {record["question"]: record for record in tasks.read_lines(path)}
        right[name] = {question: accuracy(record) for question, record in records.items()}
        found["methods"][name] = describe_responses(records.values())
    for name, of_question in right.items():
        for other in sorted(right.keys() - {name}):
            found["methods"][name][f"minus {other}"] = difference(of_question, right[other])
        for key, path in ("fit", f"fit-{name}.json"), ("trained", f"{name}/round1/trained.json"):
            if (args.out / path).exists():
                found["methods"][name][key] = read_json(args.out / path)
    args.report.write_text(json.dumps(found, indent=1) + "\n")
    print_table(found["methods"])


def accuracy(record):
    """By the present judge, whenever the responses were drawn."""
    return np.mean([tasks.grade(r["response"], record["answer"]) for r in record["responses"]])


def describe_responses(records):
    """Accuracy with its 95 % interval over questions, and what the responses look like."""
    responses = [response for record in records for response in record["responses"]]
    most = int(MAX_NEW_TOKENS)
    return {
        "questions": len(records),
        "accuracy": interval([accuracy(record) for record in records]),
        "unanswered": float(np.mean([not response["answered"] for response in responses])),
        "cut": float(np.mean([response["tokens"] >= most for response in responses])),     # in older files too
        "tokens": float(np.mean([response["tokens"] for response in responses])),
    }


def difference(one, other):
    """Paired over the questions that both have answered."""
    both = sorted(one.keys() & other.keys())
    return interval([one[question] - other[question] for question in both])


def interval(values, draws=10_000):
    """Mean and 95 % bootstrap interval over questions: [mean, low, high]."""
    values = np.array(values)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(values), size=(draws, len(values)))
    means = values[drawn].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(values.mean()), float(low), float(high)]


def hours(out):
    """Hours of work on each stage, whatever stopped it in between."""
    total = {}
    for record in tasks.read_lines(out / "hours.jsonl"):
        total[record["stage"]] = total.get(record["stage"], 0) + record["seconds"] / 3600
    return total


def read_json(path):
    return json.loads(path.read_text()) if path.exists() else None


def print_table(methods):
    """Accuracy and the differences in percent, as Markdown."""
    print("| model | accuracy | minus bootstrapped | minus base | cut | unanswered | tokens | fit |")
    print("|---|---|---|---|---|---|---|---|")
    for name, m in methods.items():
        cells = [name, percent(m["accuracy"])]
        for other in "bootstrapped", "base":
            cells.append(percent(m.get(f"minus {other}")))
        cells += [f"{m['cut']:.0%}", f"{m['unanswered']:.0%}", f"{m['tokens']:.0f}"]
        cells.append(f"{m['fit']['correlation']:.2f}" if "fit" in m else "-")
        print(f"| {' | '.join(cells)} |")


def percent(numbers):
    if numbers is None:
        return "-"
    mean, low, high = (100 * number for number in numbers)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


# ---------------------------------------------------------------- the command


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="an instruction-tuned model")
    parser.add_argument("--train", help="file of training questions, such as GSM8K's")
    parser.add_argument("--test", help="file of test questions")
    parser.add_argument("--out", type=Path, required=True, help="folder; the same command continues it")
    parser.add_argument("--only", nargs="+", default=[],
                        help="these stages: bootstrap, search, held-out, eval-base, eval-bootstrapped, of each "
                             "method NAME, eval-NAME, fit-NAME; second, dvo-second, eval-dvo-second")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--report", type=Path, help="write what is there to this file")
    args = parser.parse_args()
    if not args.report and not (args.model and args.train and args.test):
        parser.error("give --model, --train and --test, or --report")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.report:
        return report(args)
    for name, work in stages(args):
        done = args.out / f"{name}.done"
        if done.exists() or args.only and name not in args.only:
            continue
        start = time.time()
        try:
            work()
            done.touch()
        finally:
            with tasks.open_lines(args.out / "hours.jsonl") as file:
                tasks.write_line(file, {"stage": name, "seconds": time.time() - start})


if __name__ == "__main__":
    main()
