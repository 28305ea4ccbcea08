# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""The paper's tables and figures in miniature: every objective on the same trees, on chains of arithmetic.

    python tests/reproduce.py --out CELLS                       # all; can be stopped and continued
    python tests/reproduce.py --out CELLS --only table1 fig7    # some
    python tests/reproduce.py --out CELLS --quick               # 2 seeds, table 1 and fig. 6 only
    python tests/reproduce.py --out CELLS --report assets/results.json      # summarise what is done

A *cell* is one training (or one measurement) with all its settings; it becomes a JSON file in CELLS when done
and is skipped when present. For each seed there is one base model, trained like the demo's on chains of 3 to
9 operations, whose demonstrations skip steps; and for each seed and chain length one set of trees, on which
every objective trains. Learning rates come from one grid for all, chosen on long chains by the mean accuracy
of two seeds on development questions, and kept for other chains and settings; what is reported is accuracy on
other questions, which chose nothing.
"""
import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dvo                                                          # noqa: E402
import eval as tasks                                                # noqa: E402
import mcts                                                         # noqa: E402

CHAINS = {"short": (3, 6, 8), "long": (5, 7, 8), "longest": (7, 9, 10)}     # operations from, to; tree depth
METHODS = ["dvo", "dvo-response", "rft", "dpo", "step-dpo", "kto", "oreo"]
RATES = [3e-6, 9e-6, 3e-5, 1e-4, 3e-4, 1e-3]    # the common grid, widened where the best lies at its edge
TUNING_SEEDS = 2
CHOSEN = {"dvo": 1e-4, "dvo-response": 1e-4, "rft": 1e-4, "dpo": 9e-6, "step-dpo": 9e-6, "kto": 3e-4,
          "oreo": 1e-4}                                             # by the full comparison
DEFAULTS = dict(chain="long", method="dvo", lr=1e-4, beta=0.1, paths=4, iterations=40, breadth=5, rounds=1,
                targets="search", value_lr=1e-3, questions=200, examples_of=None)


# ---------------------------------------------------------------- bases and trees, shared by the cells


@contextlib.contextmanager
def only_one(path):
    """Let one process at a time make `path`."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def base(out, seed):
    folder = out / f"base{seed}"
    with only_one(folder):
        if not folder.exists():
            dvo.make_base(folder, seed, torch.device("cpu"), low=3, high=9)
    return folder


def load(folder):
    return dvo.load_policy(str(folder), torch.device("cpu"), "float32")


def questions(chain, part, n, seed):
    low, high, _ = CHAINS[chain]
    return tasks.arithmetic(n, f"{part} {seed}", low, high)


def search(policy, tokenizer, problems, chain, seed, iterations, breadth):
    trees = mcts.search(policy, tokenizer, problems, tasks.reward, iterations=iterations, breadth=breadth,
                        depth=CHAINS[chain][2], max_step_tokens=32, slots=64, seed=seed)
    return sorted(trees, key=lambda tree: tree.question)


def trees(out, seed, chain, iterations, breadth, questions_=200):
    """The trees of a base: searched once, then read from a file."""
    path = out / f"trees-{seed}-{chain}-{iterations}-{breadth}-{questions_}.jsonl"
    with only_one(path):
        if not path.exists():
            policy, tokenizer = load(base(out, seed))
            problems = questions(chain, "train", questions_, seed)
            found = search(policy, tokenizer, problems, chain, seed, iterations, breadth)
            new = path.with_suffix(".new")
            new.write_text("".join(tree.to_json() + "\n" for tree in found))
            new.rename(path)
    return list(mcts.read_trees(path))


# ---------------------------------------------------------------- what is true in this task


def follow(question, texts):
    """For each step of a solution whether it is right, and how many operations it does: a step is right if it
    starts from the true value, does the next operations of the question and states their true result.

    >>> follow("Start with 9. Add 2. Multiply by 1. Add 3.", ["9 + 2 = 11.", "11 * 1 + 3 = 15."])
    [(True, 1), (False, 2)]
    """
    start, *chain = question.removesuffix(".").split(". ")
    value, at, fine, judged = int(start.split()[-1]), 0, True, []
    for text in texts:
        found = re.fullmatch(r"(\d+)((?: [-+*] \d+)+) = (\d+)\.", text.strip())
        operations = re.findall(r" ([-+*]) (\d+)", found[2]) if found else []
        fine = fine and (found is None or int(found[1]) == value)
        for sign, operand in operations:
            word, due = chain[at].rsplit(" ", 1) if at < len(chain) else ("", None)
            fine = fine and due == operand and tasks.OPERATIONS[word][0] == sign
            value = tasks.OPERATIONS[word][1](value, int(operand)) if fine else value
            at += 1
        if found:
            fine = fine and int(found[3]) == value
        else:                                                       # the final answer, or nonsense
            fine = fine and at == len(chain) and text.strip() == f"{mcts.MARKER} {value}"
        judged.append((fine, len(operations)))
    return judged


def kind(tree, path):
    """Of a correct path: "clean" (one right operation a step), "skipping" (right, but several at once), or
    "lucky" (a wrong step, yet the right answer)."""
    judged = follow(tree.question, [tree.nodes[i].text for i in path])
    if not all(fine for fine, _ in judged):
        return "lucky"
    return "skipping" if any(n > 1 for _, n in judged) else "clean"


def auc(bad, good):
    """Probability that a random bad one scores lower than a random good one, ties counting half."""
    bad, good = np.sort(bad), np.asarray(good)
    below, up_to = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
    return float(((below + up_to) / 2).mean() / len(bad))


# ---------------------------------------------------------------- cells


def accuracy(policy, tokenizer, chain, part, n, trials):
    def sample(asked, n):
        prompts = [mcts.build_prompt(tokenizer, p["question"]) for p in asked]
        return mcts.stream(policy, tokenizer, prompts, n=n, temperature=0.7, max_new_tokens=128)

    problems = questions(chain, part, n, seed=0)                    # the same for all seeds
    return tasks.evaluate(sample, problems, trials=trials)["accuracy"]


def evaluated(policy, tokenizer, chain):
    return {"dev": accuracy(policy, tokenizer, chain, "dev", 200, 1),
            "test": accuracy(policy, tokenizer, chain, "test", 300, 2)}


def base_cell(out, seed, chain):
    return evaluated(*load(base(out, seed)), chain)


def train_cell(out, seed, **settings):
    """Train one method from the base of `seed`; accuracy, and what happened to the implicit rewards."""
    s = argparse.Namespace(**DEFAULTS | settings)
    objective, _, level = s.method.partition("-r")                  # dvo-response
    level = "response" if level else "step"
    choose = dvo.OBJECTIVES[objective]
    policy, tokenizer = load(base(out, seed))
    for r in range(s.rounds):
        if s.rounds == 1:
            grown = trees(out, seed, s.chain, s.iterations, s.breadth, s.questions)
        else:                                                       # small rounds share the questions
            part = questions(s.chain, "train", s.questions, seed)[r::s.rounds]
            grown = search(policy, tokenizer, part, s.chain, seed + r, s.iterations, s.breadth)
        source = grown                                              # more iterations continue the same tree:
        if s.examples_of:                                           # paths of few, with the values of all
            source = trees(out, seed, s.chain, s.examples_of, s.breadth, s.questions)
        made = [dvo.make_example(t, s.paths, seed, choose=choose) for t in source]
        kept, examples = zip(*[(t, e) for t, e in zip(grown, made) if e])
        if s.examples_of:
            for t, e in zip(kept, examples):
                e.take_values(torch.tensor([node.value for node in t.nodes[:len(e.value)]]))
        entries = train(policy, grown, examples, objective, level, seed, s)
    result = evaluated(policy, tokenizer, s.chain) | {
        "questions": len(examples), "paths": sum(len(e.path) for e in examples),
        "curve": [[e["rewards/chosen"], e["rewards/rejected"]] for e in entries[::5] + entries[-1:]]}
    if choose is dvo.draw_paths or objective == "dpo":
        result |= rewards(policy, kept, examples, s.beta)
    return result


def train(policy, grown, examples, objective, level, seed, s):
    """Train `policy` with the settings `s`; the log."""
    steps = dvo.schedule(len(examples), 3, 4, seed)
    dvo.add_reference(policy, examples, 4096)
    learners, pairs, entries = [dvo.Learner(policy, s.lr)], [], []
    if objective == "kto":
        pairs = dvo.mismatched(examples, steps, mcts.context_length(policy), seed)
        dvo.add_reference(policy, sum(pairs, []), 4096)
    if objective == "oreo":
        learners.append(dvo.Learner(dvo.make_critic(policy), s.value_lr))
    if s.targets == "value-model":
        critic = dvo.make_critic(policy)
        valued = [e for t in grown if (e := dvo.make_example(t, s.paths, seed, True, dvo.any_paths))]
        dvo.train([dvo.Learner(critic, s.value_lr)], valued, dvo.critic_loss,
                  dvo.schedule(len(valued), 3, 4, seed), micro_tokens=4096)
        values = dvo.forward_all(critic, examples, "values", 4096)
        for e, value in zip(examples, values):
            e.take_values(value)

    def of_step(step):
        return {"z0": dvo.reference_point(policy, pairs[step], 4096)} if pairs else {}

    def loss_fn(e, logprobs, value=None, z0=0.0):
        return dvo.objective_loss(objective, e, logprobs, beta=s.beta, level=level, z0=z0, value=value)

    dvo.train(learners, examples, loss_fn, steps, micro_tokens=4096, beta=s.beta, of_step=of_step,
              log=lambda **e: entries.append(e))
    return entries


def rewards(policy, kept, examples, beta):
    """Means over training paths: implicit reward at the end, target, and the most that is attainable, which
    is -beta log pi_ref; of the correct ones also by kind."""
    outs, groups = dvo.forward_all(policy, examples, "rewards", 4096), {}
    for tree, e, logprobs in zip(kept, examples, outs):
        for row, correct in zip(e.path, e.correct):
            nodes = [int(i) for i in row.nonzero()]
            entry = (float(beta * row @ (logprobs - e.reference)), float(row @ e.credit),
                     float(-beta * row @ e.reference))
            for name in ["correct", kind(tree, nodes)] if correct else ["incorrect"]:
                groups.setdefault(name, []).append(entry)
    keys = "reward", "target", "attainable"
    return {"rewards": {name: dict(zip(keys, np.mean(rows, 0).tolist()), n=len(rows),
                                   reachable=float(np.mean([t <= a for _, t, a in rows])))
                        for name, rows in groups.items()}}


def credit_cell(out, seed, chain, iterations=40, breadth=5):
    """Fig. 6: how well credit, value and the reference's own mean log-prob tell the first wrong step of an
    incorrect path from the right steps before it."""
    scores = {name: ([], []) for name in ("credit", "value", "logprob")}       # of the wrong, of the right
    for tree in trees(out, seed, chain, iterations, breadth):
        for path in dvo.draw_paths(tree, 4, seed)[1]:
            judged = follow(tree.question, [tree.nodes[i].text for i in path])
            for i, (fine, _) in zip(path, judged):
                node = tree.nodes[i]
                for name, score in (("credit", tree.credit(i)), ("value", node.value),
                                    ("logprob", math.log(node.prior))):
                    scores[name][fine].append(score)
                if not fine:
                    break
    return {name: auc(*pair) for name, pair in scores.items()} | {"wrong": len(scores["credit"][0]),
                                                                 "right": len(scores["credit"][1])}


def run_cell(out, name, kind_, settings):
    path = out / "cells" / f"{name}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null), contextlib.redirect_stdout(null):
        result = {"base": base_cell, "train": train_cell, "credit": credit_cell}[kind_](out, **settings)
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps({"kind": kind_, "settings": settings} | result))
    new.rename(path)


class Cells:
    """Runs cells in `jobs` processes, and reads their results."""

    def __init__(self, out, jobs, run=True, tune=True):
        self.out, self.jobs, self.can_run, self.tune = out, jobs, run, tune
        (out / "cells").mkdir(parents=True, exist_ok=True)

    @staticmethod
    def name(kind_, settings):
        return "_".join([kind_] + [f"{key}={settings[key]:g}" if isinstance(settings[key], float)
                                   else f"{key}={settings[key]}" for key in sorted(settings)])

    def run(self, kind_, many):
        """The results of many settings, None where there is none yet and this is a report."""
        names = [self.name(kind_, settings) for settings in many]
        todo = [(n, s) for n, s in dict(zip(names, many)).items()
                if not (self.out / "cells" / f"{n}.json").exists()] if self.can_run else []
        if todo:
            with concurrent.futures.ProcessPoolExecutor(self.jobs) as pool:
                futures = [pool.submit(run_cell, self.out, n, kind_, s) for n, s in todo]
                for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                    future.result()
                    print(f"\r{kind_}: {done} of {len(todo)} cells", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
        paths = [self.out / "cells" / f"{n}.json" for n in names]
        return [json.loads(path.read_text()) if path.exists() else None for path in paths]

    def tuned(self, seeds, grid=RATES, over="lr", **settings):
        """(rate, results of all seeds): the rate of the best mean development accuracy of the tuning seeds. A
        best at the edge of the grid widens it. Without tuning, the rate that the full comparison chose."""
        grid, ratio = list(grid), math.sqrt(10)
        while self.tune:
            cells = [[settings | {over: rate, "seed": s} for s in seeds[:TUNING_SEEDS]] for rate in grid]
            self.run("train", list(itertools.chain(*cells)))
            scores = [np.mean([r["dev"] if r else -1 for r in self.run("train", row)]) for row in cells]
            best = int(np.argmax(scores))
            if best == 0 and min(grid) > 1e-6:
                grid.insert(0, float(f"{grid[0] / ratio:.0e}"))
            elif best == len(grid) - 1 and max(grid) < 1e-2:
                grid.append(float(f"{grid[-1] * ratio:.0e}"))
            else:
                break
        rate = grid[best] if self.tune else CHOSEN[settings["method"]]
        return rate, self.run("train", [settings | {over: rate, "seed": s} for s in seeds])


# ---------------------------------------------------------------- the paper's tables and figures


def spread(values):
    """Mean and standard error over seeds; None while one is missing."""
    if None in values:
        return None
    return {"mean": float(np.mean(values)), "se": float(np.std(values, ddof=1) / math.sqrt(len(values))),
            "each": [round(v, 4) for v in values]}


def paired(a, b):
    """Mean of a - b over seeds with its 95 % interval (Student t), and every difference."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    d = np.array(a) - np.array(b)
    half = t[len(d)] * d.std(ddof=1) / math.sqrt(len(d))
    return {"mean": float(d.mean()), "low": float(d.mean() - half), "high": float(d.mean() + half),
            "each": [round(float(x), 4) for x in d]}


tests = lambda results: [r["test"] if r else None for r in results]


def table1(cells, seeds, chains=("long", "short")):
    table = {}
    for chain in chains:
        bases = cells.run("base", [dict(seed=s, chain=chain) for s in seeds])
        rows = {"base": {"test": spread(tests(bases))}}
        for method in METHODS:
            rate, results = cells.tuned(seeds, chain="long", method=method)
            if chain != "long":
                settings = dict(chain=chain, method=method, lr=rate)
                results = cells.run("train", [settings | {"seed": s} for s in seeds])
            rows[method] = {"lr": rate, "test": spread(tests(results))}
        if all(row["test"] for row in rows.values()):
            others = [m for m in METHODS if not m.startswith("dvo")]
            best = max(others, key=lambda m: rows[m]["test"]["mean"])
            rows["dvo minus best other"] = {"other": best} | paired(rows["dvo"]["test"]["each"],
                                                                    rows[best]["test"]["each"])
        table[chain] = rows
    return table


def fig3(cells, seeds):
    """MCTS against value-model targets, the value model's rate tuned like all others."""
    lr, searched = cells.tuned(seeds, chain="long", method="dvo")
    value_lr, modelled = cells.tuned(seeds, [3e-4, 1e-3, 3e-3], "value_lr", chain="long", method="dvo", lr=lr,
                                     targets="value-model")
    return {"lr": lr, "value_lr": value_lr, "search": spread(tests(searched)),
            "value model": spread(tests(modelled)), "search minus value model": paired(tests(searched),
                                                                                     tests(modelled))}


def fig4a(cells, seeds):
    found = {}
    for beta in (0.01, 0.03, 0.1, 0.3, 1.0):
        rate, results = cells.tuned(seeds, RATES if beta == 0.1 else RATES[2:5], chain="long", method="dvo",
                                    **({} if beta == 0.1 else {"beta": beta}))
        found[str(beta)] = {"lr": rate, "test": spread(tests(results)), "rewards": results[0]["rewards"]}
    return found


def fig4b(cells, seeds):
    """Values of more and more iterations on the very same paths, those that few iterations found: 5 on short
    chains; 10 on long ones, where 5 find no solution."""
    lr, _ = cells.tuned(seeds, chain="long", method="dvo")
    return {f"{chain}, {n} iterations": spread(tests(cells.run("train", [dict(
        seed=s, chain=chain, method="dvo", lr=lr, iterations=n, examples_of=few) for s in seeds])))
        for chain, few in (("short", 5), ("long", 10)) for n in (5, 10, 20, 40, 80) if n >= few}


def fig5(cells, seeds):
    """Implicit rewards of DVO and DPO, mean over seeds."""
    found = {}
    for method in "dvo", "dpo":
        rate, results = cells.tuned(seeds, chain="long", method=method)
        groups = {g: {key: float(np.mean([r["rewards"][g][key] for r in results if g in r["rewards"]]))
                      for key in ("reward", "target", "attainable", "reachable", "n")}
                  for g in ("correct", "incorrect", "clean", "skipping", "lucky")
                  if any(g in r["rewards"] for r in results)}
        length = min(len(r["curve"]) for r in results)
        curves = np.mean([r["curve"][:length] for r in results], axis=0)
        found[method] = {"lr": rate, "groups": groups, "curve": curves.round(4).tolist()}
    return found


def fig6(cells, seeds):
    found = {}
    for chain in CHAINS:
        results = cells.run("credit", [dict(seed=s, chain=chain) for s in seeds])
        found[chain] = {name: spread([r[name] for r in results]) for name in ("credit", "value", "logprob")}
    return found


def fig7(cells, seeds):
    """Step against response level over chain length and paths a question; both at their own rates."""
    rates, found = {m: cells.tuned(seeds, chain="long", method=m)[0] for m in ("dvo", "dvo-response")}, {}
    for chain in reversed(CHAINS):
        for paths in (4, 1, 2):
            both = {m: tests(cells.run("train", [dict(seed=s, chain=chain, method=m, lr=rates[m])
                                                 | ({} if paths == 4 else {"paths": paths}) for s in seeds]))
                    for m in rates}
            found[f"{chain} {paths}+{paths}"] = {m: spread(v) for m, v in both.items()} | {
                "step minus response": paired(both["dvo"], both["dvo-response"])}
    return found


def beyond(cells, seeds):
    """Breadth 16 against 5; five small rounds against one large at equal search."""
    lr, one = cells.tuned(seeds, chain="long", method="dvo")
    run = lambda **more: tests(cells.run("train", [dict(seed=s, chain="long", method="dvo", lr=lr) | more
                                                   for s in seeds]))
    wide, same_samples = run(breadth=16), run(breadth=16, iterations=12)
    rate, small = cells.tuned(seeds, [3e-5, 1e-4, 3e-4], chain="long", method="dvo", rounds=5)
    return {"breadth 5": spread(tests(one)), "breadth 16, 40 iterations": spread(wide),
            "breadth 16, 12 iterations": spread(same_samples),
            "16 minus 5 at 40 iterations": paired(wide, tests(one)),
            "16 minus 5 at equal samples": paired(same_samples, tests(one)),
            "5 rounds of 40": {"lr": rate} | spread(tests(small)),
            "5 rounds minus 1 round": paired(tests(small), tests(one))}


PARTS = {f.__name__: f for f in (table1, fig5, fig6, fig7, fig3, fig4a, fig4b, beyond)}


def percent(row):
    """One cell of a table: mean and standard error, or mean difference and its interval, in points."""
    if row is None:
        return "not run"
    if "se" in row:
        return f"{100 * row['mean']:.1f} ± {100 * row['se']:.1f}"
    each = ", ".join(f"{100 * x:+.1f}" for x in row["each"])
    return f"{100 * row['mean']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}] ({each})"


def markdown(found):
    """The README's tables: accuracies and differences in %, mean ± standard error over seeds, or mean
    difference with its 95 % interval and every seed's."""
    for name, part in found.items():
        yield f"\n{name}\n\n| | |\n|---|---|"
        for setting, row in part.items():
            if name == "fig5":
                for group, r in row["groups"].items():
                    yield (f"| {setting} {group} | reward {r['reward']:+.2f}, target {r['target']:+.2f}, "
                           f"at most {r['attainable']:+.2f}, within reach {100 * r['reachable']:.0f} %, "
                           f"n {r['n']:.0f} |")
            elif not isinstance(row, dict) or {"se", "low"} & row.keys():
                yield f"| {setting} | {row if isinstance(row, (int, float)) else percent(row)} |"
            else:
                for key, value in row.items():
                    rate = f" (rate {row['lr']:g})" if "lr" in row and key == "test" else ""
                    inner = value["test"] if isinstance(value, dict) and "test" in value else value
                    rate = f" (rate {value['lr']:g})" if isinstance(value, dict) and "lr" in value else rate
                    if isinstance(inner, dict) and {"se", "low"} & inner.keys():
                        yield f"| {setting} {key}{rate} | {percent(inner)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder of the cells")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--quick", action="store_true",
                        help="two seeds, rates not tuned, table 1 on long chains, and figure 6")
    parser.add_argument("--report", type=Path, help="run nothing; write the numbers of what is done to this")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    cells = Cells(args.out, args.jobs, run=not args.report, tune=not args.quick)
    seeds = list(range(2 if args.quick else args.seeds))
    parts = {"table1": functools.partial(table1, chains=("long",)), "fig6": fig6} if args.quick else {
        name: PARTS[name] for name in args.only}
    found = {}
    for name, part in parts.items():
        try:
            found[name] = part(cells, seeds)
        except (TypeError, KeyError, AttributeError):
            if not args.report:
                raise
            print(f"{name}: cells are missing", file=sys.stderr)
            continue
        print(*markdown({name: found[name]}), sep="\n", flush=True)
    if args.report:
        args.report.parent.mkdir(exist_ok=True)
        args.report.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
