"""Measure this project against its peers, on the same input in the same process.

    python tests/bench.py search --model M --data questions.jsonl    # against transformers' generate
    python tests/bench.py train --model M --trees trees.jsonl        # against padded rows, as TRL trains
    python tests/bench.py plan --model M                             # dvo.py --plan against measured peaks
    python tests/bench.py match --cases answers.jsonl                # against Math-Verify, where installed

Every figure is also given as a ratio, since machines differ.
"""
import argparse
import collections
import itertools
import json
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dvo                                                          # noqa: E402
import eval as tasks                                                # noqa: E402
import mcts                                                         # noqa: E402


class Peak:
    """Time and peak memory of a `with` block, in GiB above what was there: of the GPU, else of the process
    (on Linux)."""

    def __init__(self, device):
        self.device = device

    def read(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")           # the peak becomes the present size
        self.before, self.start = self.read(), time.perf_counter()
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds, self.gib = time.perf_counter() - self.start, (self.read() - self.before) / 2**30


def path_tokens(tree, i):
    """Token ids of the prompt and of the steps down to node i."""
    return tree.prompt + [token for j in tree.path(i) for token in tree.nodes[j].tokens]


# ---------------------------------------------------------------- search


class StepEnds:
    """A stopping criterion of `generate`: each row ends with its step."""

    def __init__(self, splitter, rows, device):
        self.splitter = splitter
        self.started = self.newline = self.done = torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, ids, scores, **_):
        blank, self.started, self.newline = self.splitter(ids[:, -1], self.started, self.newline)
        self.done = self.done | blank
        return self.done


def by_generate(model, tokenizer, splitter, paths, breadth, max_tokens):
    """`breadth` next steps after each of `paths` (token ids) in one call of generate, as lists of Samples."""
    eos = model.generation_config.eos_token_id
    width = max(map(len, paths))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in paths], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in paths], device=model.device)
    out = model.generate(ids, attention_mask=mask, num_return_sequences=breadth, max_new_tokens=max_tokens,
                         do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=pad,
                         stopping_criteria=[StepEnds(splitter, len(paths) * breadth, model.device)])
    samples = []
    for row in out[:, width:].tolist():
        started = newline = torch.zeros(1, dtype=torch.bool, device=model.device)
        end, n = "cut", len(row)
        for i, token in enumerate(row):
            blank, started, newline = splitter(torch.tensor([token], device=model.device), started, newline)
            if token in ([eos] if isinstance(eos, int) else eos) or blank:
                end, n = "step" if blank else "eos", i + 1
                break
        text = tokenizer.decode(row[:n], skip_special_tokens=True)
        samples.append(mcts.Sample(row[:n], [-1.0] * n, text, end))
    return [samples[i:i + breadth] for i in range(0, len(samples), breadth)]


class FullPrefix:
    """Attention of one token a row to a full prefix of its own: the least that any engine must do that shares
    nothing."""

    def __init__(self, rows, like, length):
        L, _, H, _, D = like.shape
        self.kv = [torch.randn(2, rows, H, length, D, dtype=like.dtype, device=like.device) for _ in range(L)]

    def attend(self, layer, q, k, v, scaling):
        K, V = self.kv[layer]
        K[:, :, -1], V[:, :, -1] = k.transpose(0, 1), v.transpose(0, 1)     # (N, H, D)
        q = q.transpose(0, 1).unflatten(1, (len(k), -1))        # (N, H, groups, D): no copy of K a query head
        return torch.nn.functional.scaled_dot_product_attention(q, K, V, scale=scaling).flatten(1, 2)


def ceiling(engine, rows, prefix, steps=12):
    """Tokens/s and peak GiB of pure decode forwards: `rows` rows after `prefix` tokens each, no mask, no
    sampling, no bookkeeping."""
    like = engine._prefill([0, 0])
    cache, tokens = FullPrefix(rows, like, prefix), torch.zeros(rows, dtype=torch.long, device=engine.device)
    position = torch.full_like(tokens, prefix)
    engine._forward(tokens, position, cache)
    with Peak(engine.device) as peak:
        for _ in range(steps):
            engine._forward(tokens, position, cache)
    return rows * steps / peak.seconds, peak.gib


def search(args):
    """Useful tokens/s (those that end in tree nodes) of a whole search with its tails, (c); of generate on a
    random sample of the very same expansions, (a) one tree at a time and (b) 16 trees; and (d) the ceiling of
    decoding without sharing."""
    model, tokenizer = mcts.load_model(args.model, args.device, args.dtype)
    problems = tasks.load_problems(args.data, split="train", limit=args.limit)
    settings = dict(iterations=args.iterations, breadth=args.breadth, max_step_tokens=args.max_step_tokens,
                    slots=args.slots, seed=args.seed, kv_budget=args.kv_budget and args.kv_budget * 2**30)
    with Peak(model.device) as peak:
        searching = mcts.search(model, tokenizer, problems, tasks.reward, **settings)
        engine = searching.gi_frame.f_locals["engine"]
        trees = list(searching)
    steps = [len(n.tokens) for t in trees for n in t.nodes[1:]]
    expanded = [path_tokens(t, i) for t in trees for i, n in enumerate(t.nodes) if n.children]
    prefix = sum(map(len, expanded)) / len(expanded)
    stats = engine.stats
    rows = {"(c) ours": (sum(steps) / peak.seconds, len(expanded) / peak.seconds, stats["prefilled"],
                         stats["reused"], peak.gib)}
    print(f"{len(trees)} trees, {len(expanded)} expansions at {prefix:.0f} tokens, {len(steps)} steps of "
          f"{sum(steps) / len(steps):.1f} in {peak.seconds:.0f} s, "
          f"{stats['sampled'] / stats['forwards']:.1f} live samples a forward", flush=True)
    draw = random.Random(args.seed)
    for name, together, batches in (("(a) generate, one tree", 1, args.batches * 4),
                                    ("(b) generate, 16 trees", 16, args.batches)):
        tokens = prefilled = 0
        with Peak(model.device) as peak:
            for _ in range(batches):
                paths = draw.sample(expanded, together)
                drawn = by_generate(model, tokenizer, engine.splitter, paths, args.breadth,
                                    args.max_step_tokens)
                different = [s for samples in drawn for s in {s.text: s for s in samples}.values()]
                tokens += sum(len(s.tokens) for s in different)
                prefilled += sum(map(len, paths))
        if batches:
            rows[name] = tokens / peak.seconds, batches * together / peak.seconds, prefilled, 0, peak.gib
    live = args.slots * args.breadth
    rate, gib = ceiling(engine, live, round(prefix))
    rows[f"(d) ceiling, {live} rows"] = rate, rate / (args.breadth * sum(steps) / len(steps)), 0, 0, gib
    heads = "tokens/s", "iter/s", "prefilled", "reused", "peak GiB", "(c) / this"
    print("\n{:26}{:>10}{:>9}{:>11}{:>9}{:>10}{:>12}".format("", *heads))
    for name, row in sorted(rows.items()):
        ratio = rows["(c) ours"][0] / row[0]
        print("{:26}{:10.1f}{:9.2f}{:11}{:9}{:10.2f}{:12.2f}".format(name, *row, ratio))


# ---------------------------------------------------------------- training


def padded_step(model, tree, paths, loss_of):
    """One row a path, right-padded, full logits in float32: how TRL and the authors train."""
    rows = [path_tokens(tree, path[-1]) for path in paths]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    token = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]          # (P, T - 1)
    steps, start = [], len(tree.prompt) - 1
    for row, path in zip(token, paths):
        sizes = [len(tree.nodes[i].tokens) for i in path]
        steps.append([part.sum() for part in row[start:start + sum(sizes)].split(sizes)])
    return loss_of(steps, paths)


def train(args):
    """Seconds (of the processor on a CPU, which others may share) and peak memory of the DVO gradient of each
    question's paths, packed against padded."""
    model, _ = mcts.load_model(args.model, args.device, args.dtype or "float32")
    policy = dvo.Policy(model.train())
    many = (t for t in mcts.read_trees(args.trees) if sum(n.terminal for n in t.nodes) >= args.paths)
    trees = list(itertools.islice(many, args.limit))
    total, worst = collections.Counter(), 0.0                       # worst: distance of the two gradients
    for tree in trees:
        ends = [i for i, n in enumerate(tree.nodes) if n.terminal]
        paths = [tree.path(i) for i in sorted(ends, key=lambda i: -tree.nodes[i].depth)[:args.paths]]
        credit = [0.5 + tree.credit(i) if i else 0 for i in range(len(tree.nodes))]    # 0 if all paths fail

        def loss_of(steps, paths):                      # of the first update, whose reference is the policy
            errors = [sum((0.1 * (s - s.detach()) - credit[i]) ** 2 for s, i in zip(row, path)) / len(path)
                      for row, path in zip(steps, paths)]
            return sum(errors) / len(paths)

        def packed():
            logprobs = policy(packs=[dvo.pack(tree, paths)])[0]
            return loss_of([[logprobs[i] for i in path] for path in paths], paths)
        gradients = {}
        for name, step in ("padded", lambda: padded_step(model, tree, paths, loss_of)), ("packed", packed):
            model.zero_grad(set_to_none=False)
            with Peak(model.device) as peak:
                start = time.process_time()
                step().backward()
                seconds = time.process_time() - start
            gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
            total[name + " s"] += seconds if model.device.type == "cpu" else peak.seconds
            total[name + " GiB"] = max(total[name + " GiB"], peak.gib)
        lengths = [len(path_tokens(tree, path[-1])) for path in paths]
        total["path tokens"] += sum(lengths)
        total["padded tokens"] += len(lengths) * max(lengths)
        total["packed tokens"] += len(dvo.pack(tree, paths).tokens)
        distance = (gradients["padded"] - gradients["packed"]).norm() / gradients["padded"].norm()
        worst = max(worst, distance.item())
    print(f"{len(trees)} questions of {args.paths} paths; largest relative distance of gradients {worst:.1e}")
    for name in "padded", "packed":
        total[f"{name} path tokens/s"] = total["path tokens"] / total[f"{name} s"]
    for name in "tokens", "s", "path tokens/s", "GiB":
        a, b = total[f"padded {name}"], total[f"packed {name}"]
        print(f"{name:14} padded {a:10.2f}   packed {b:10.2f}   "
              f"packed / padded {b / a:.2f}   padded / packed {a / b:.2f}")


def plan(args):
    """Peak memory of two optimiser steps of two micro-batches: the plan of `dvo.py --plan` and as measured;
    under torchrun, rank 0's."""
    policy, _ = dvo.load_policy(args.model, dvo.start_ranks(args.device), args.dtype, False,
                                args.activation_checkpointing)

    def two_steps(tokens):
        size, tree = tokens // 8, mcts.Tree("", "", (tokens - 7 * (tokens // 8)) * [0])
        for i in range(7):
            tree.add(mcts.Node(0, size * [i], terminal=True, visits=1, reward=1))
        example = dvo.make_example(tree, n=7)
        example.reference = torch.zeros(8)
        n = 2 * dvo.world()
        dvo.train(policy, n * [example], lambda e, new: dvo.dvo_loss(new, e.reference, e.credit, e.path),
                  lr=0, epochs=2, questions_per_step=n, micro_tokens=tokens)
    two_steps(16)                                                   # what is loaded late is no activation
    with Peak(policy.device) as peak:
        two_steps(args.micro_tokens)
    args = argparse.Namespace(**vars(args), ranks=dvo.world(), offload=False, shard_search=False, slots=1,
                              candidates=1, max_step_tokens=1)
    parts = dvo.memory_plan(policy.config, args, policy.compute.itemsize)["train"]
    planned, measured = sum(parts.values()), parts["weights"] + peak.gib
    if dvo.rank() == 0:
        print(*(f"{size:8.3f} GiB  {what}" for what, size in parts.items()), sep="\n")
        print(f"planned {planned:.3f} GiB, measured {measured:.3f} GiB: {planned / measured - 1:+.1%}")


# ---------------------------------------------------------------- answers


def match(args):
    """Accuracy and speed on labelled pairs: one JSON object a line with gold, pred, equal, and optionally
    kind, id, debatable (not counted)."""
    with open(args.cases, encoding="utf-8") as file:
        cases = [case for case in map(json.loads, file) if not case.get("debatable")]
    for name, judge in {"ours": tasks.grade, "Math-Verify": math_verify_judge()}.items():
        if judge is None:
            print(f"{name}: not installed")
        else:
            report(name, judge, cases, args.show)


def math_verify_judge():
    try:
        from math_verify import parse, verify
    except ImportError:
        return None

    def judge(response, answer):
        found = tasks.extract_answer(response) or response      # it reads bare answers only between dollars
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
        print(f"  {kind:12} {sum(counts.values()):5} pairs, {counts['false positive']:3} false positives, "
              f"{counts['false negative']:3} false negatives")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in search, train, plan, match:
        sub = commands.add_parser(command.__name__, help=command.__doc__.splitlines()[0])
        sub.set_defaults(run=command)
        if command is match:
            sub.add_argument("--cases", required=True, help="file of labelled pairs")
            sub.add_argument("--show", action="store_true", help="print every wrong verdict")
            continue
        sub.add_argument("--model", required=True)
        sub.add_argument("--device")
        sub.add_argument("--dtype", choices=("float32", "bfloat16", "float64"))
        sub.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
        if command is train:
            sub.add_argument("--trees", required=True, help="trees of that model")
            sub.add_argument("--limit", type=int, default=8, help="trees (default: 8)")
            sub.add_argument("--paths", type=int, default=8, help="a question (default: 8)")
        elif command is plan:
            sub.add_argument("--micro-tokens", type=int, default=2048)
            sub.add_argument("--activation-checkpointing", action="store_true")
        else:
            sub.add_argument("--data", required=True, help="task or JSON Lines file")
            sub.add_argument("--limit", type=int, default=32, help="questions (default: 32)")
            sub.add_argument("--iterations", type=int, default=10, help="a tree (default: 10)")
            sub.add_argument("--batches", type=int, default=3,
                             help="of 16 expansions by peer (b), of 4 by (a); 0: none (default: 3)")
            sub.add_argument("--breadth", type=int, default=5)
            sub.add_argument("--slots", type=int, default=16)
            sub.add_argument("--max-step-tokens", type=int, default=64)
            sub.add_argument("--kv-budget", type=float, help="GiB")
            sub.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if "threads" in args:
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    mcts.run_command(main)
