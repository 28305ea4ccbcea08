"""Measure this project against its peers.

    python tests/bench.py match --cases answers.jsonl    # answers, against Math-Verify if installed

A case is one JSON object a line: gold, pred, equal, and optionally kind, id, debatable (not counted).
"""
import argparse
import collections
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def match(args):
    with open(args.cases, encoding="utf-8") as file:
        cases = [case for case in map(json.loads, file) if not case.get("debatable")]
    for name, judge in {"ours": our_judge(), "Math-Verify": math_verify_judge()}.items():
        if judge is None:
            print(f"{name}: not installed")
        else:
            report(name, judge, cases, args.show)


def our_judge():
    from eval import grade
    return grade


def math_verify_judge():
    try:
        from math_verify import parse, verify
    except ImportError:
        return None

    from eval import extract_answer

    def judge(response, answer):
        found = extract_answer(response) or response  # it reads bare answers only between dollars
        return found.strip() == answer.strip() or verify(parse(f"${answer}$"), parse(f"${found}$"))
    return judge


def report(name, judge, cases, show):
    kinds, seconds = collections.defaultdict(collections.Counter), []
    for case in cases:
        start = time.perf_counter()
        verdict = bool(judge(case["pred"], case["gold"]))
        seconds.append(time.perf_counter() - start)
        outcome = "right" if verdict == case["equal"] else "false positive" if verdict else "false negative"
        kinds[case.get("kind", "all")][outcome] += 1
        if show and outcome != "right":
            print(outcome, case.get("id"), repr(case["gold"][-100:]), repr(case["pred"][-160:]), sep="  ")
    total = sum(kinds.values(), collections.Counter())
    print(f"{name}: {len(cases)} pairs, accuracy {total['right'] / len(cases):.2%}, "
          f"{total['false positive']} false positives, {total['false negative']} false negatives, "
          f"{len(cases) / sum(seconds):,.0f} pairs/s")
    slowest = max(range(len(cases)), key=seconds.__getitem__)
    print(f"  slowest pair {1000 * seconds[slowest]:.1f} ms: {cases[slowest].get('id')}")
    for kind, counts in sorted(kinds.items()):
        print(f"  {kind:12} {sum(counts.values()):5} pairs {counts['false positive']:4} false positives "
              f"{counts['false negative']:4} false negatives")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("match", help="answer equivalence: accuracy and pairs per second")
    command.add_argument("--cases", required=True, help="JSON Lines file of labelled pairs")
    command.add_argument("--show", action="store_true", help="print every wrong verdict")
    command.set_defaults(run=match)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
