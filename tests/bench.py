# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Measure this project against its peers, on the same input in the same process.

    python tests/bench.py search --model M --data questions.jsonl    # against transformers' generate
    python tests/bench.py search --shape llama-3-8b --slots 128      # of that shape, random: for a GPU
    python tests/bench.py scale                                      # more questions, wider trees, less KV
    python tests/bench.py train --model M --trees trees.jsonl        # against padded rows, as TRL trains
    python tests/bench.py match --cases answers.jsonl                # against Math-Verify, where installed

Every figure is also given as a ratio, since machines differ.
"""
import argparse
import collections
import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dvo                                                          # noqa: E402
import eval as tasks                                                # noqa: E402
import mcts                                                         # noqa: E402
import tiny                                                         # noqa: E402


class Peak:
    """Time and peak memory of a `with` block, in GiB above what was there: of the GPU, else of the process
    (on Linux). Of one thread of a CPU its own time, which others on the machine take less from."""

    def __init__(self, device):
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.process_time if alone else time.perf_counter

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
        self.before, self.start = self.read(), self.clock()
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds, self.gib = self.clock() - self.start, (self.read() - self.before) / 2**30


def path_tokens(tree, i):
    """Token ids of the prompt and of the steps down to node i."""
    return tree.prompt + [token for j in tree.path(i) for token in tree.nodes[j].tokens]


# ---------------------------------------------------------------- search


class StepEnds:
    """A stopping criterion of `generate`: each row ends with its step."""

    def __init__(self, ending, rows):
        self.ending, self.done = ending, [False] * rows
        self.rows = [mcts.Draft(mcts.Job([]), 0, 0, 0, None, 0) for _ in range(rows)]

    def __call__(self, ids, scores, **_):
        for i, (row, row.newest) in enumerate(zip(self.rows, ids[:, -1].tolist())):
            self.done[i] = self.ending.step_ends(row) or self.done[i]
        return torch.tensor(self.done, device=ids.device)


def by_generate(model, tokenizer, ending, paths, breadth, max_tokens):
    """Sample `breadth` next steps after each of `paths` (token ids) in one call of generate."""
    width = max(map(len, paths))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in paths], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in paths], device=model.device)
    model.generate(ids, attention_mask=mask, num_return_sequences=breadth, max_new_tokens=max_tokens,
                   do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=pad,
                   stopping_criteria=[StepEnds(ending, len(paths) * breadth)])


class FullPrefix:
    """Attention of one token a row to a full prefix of its own: the least that any engine must do that shares
    nothing."""

    def __init__(self, model, rows, length):
        new = lambda heads, width: torch.randn(rows, heads, length, width, device=model.device,
                                               dtype=model.served.dtype)
        self.kv = [(new(*k), new(*v)) for k, v in model.served.layers]

    def __call__(self, layer, window, q, k, v, scaling):
        K, V = self.kv[layer]
        K[:, :, -1], V[:, :, -1] = k[0].transpose(0, 1), v[0].transpose(0, 1)   # (N, H, D)
        q = q[0].transpose(0, 1).unflatten(1, (k.shape[1], -1))     # (N, H, groups, D): no copy of K a query head
        return torch.nn.functional.scaled_dot_product_attention(q, K, V, scale=scaling).flatten(1, 2)[None]


@torch.no_grad()
def ceiling(model, rows, prefix, steps=21):
    """Tokens/s and GiB of pure decode forwards (the median one): `rows` rows after `prefix` tokens each, no
    mask, no sampling, no bookkeeping."""
    attend = FullPrefix(model, rows, prefix)
    tokens = torch.zeros(1, rows, dtype=torch.long, device=model.device)
    position = torch.full_like(tokens, prefix)
    times = []
    with Peak(model.device) as peak:
        for _ in range(steps):
            with Peak(model.device) as one:
                mcts.call_model(model, tokens, position, attend)
            times.append(one.seconds)
    return rows / statistics.median(times), peak.gib


# Random models of these shapes stand in for weights that are not at hand: speed does not depend on them.
SHAPES = {
    "llama-3-8b": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192),
    "smollm2-135m": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192),
    "tiny": dict(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192)}


def shaped(name, device, dtype):
    """A random model of SHAPES and the tokenizer of the tests; it never writes an EOS."""
    config = transformers.LlamaConfig(**SHAPES[name], eos_token_id=None, bos_token_id=None, pad_token_id=0)
    device = mcts.pick_device(device)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(
            torch, dtype or ("bfloat16" if device.type == "cuda" else "float32")), attn_implementation="sdpa")
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model.eval(), tiny.tokenizer()


class Forced(mcts.Ending):
    """A step ends by its token alone, with chance 1 / 40: random weights write no blank lines. Lengths are then
    geometric, a little more uneven than those of real steps."""

    def __init__(self, ending, size):
        self.__dict__.update(ending.__dict__)
        chance = torch.rand(size, generator=torch.Generator().manual_seed(0))
        self.ends, self.eos = (chance < 1 / 40).tolist(), set()
        self.decode = lambda tokens: " ".join(map(str, tokens))

    def step_ends(self, row):
        return self.ends[row.newest]


class Enough(Exception):
    """Ends a search early."""


def start(model, tokenizer, problems, args, before_step=None):
    """A search with the settings of `args`, and its engine, which calls before_step() at every step."""
    engine = mcts.Engine(model, tokenizer, slots=args.slots, siblings=args.breadth,
                         max_tokens=args.max_step_tokens, kv_budget=args.kv_budget and args.kv_budget * 2**30)
    if args.shape:
        engine.ending = Forced(engine.ending, len(engine.token_hash))
    advance = engine.advance
    if before_step:
        engine.advance = lambda: (before_step(), advance())[1]
    return mcts.search(model, tokenizer, problems, tasks.reward, iterations=args.iterations,
                       breadth=args.breadth, seed=args.seed, engine=engine), engine


def profile(model, tokenizer, problems, args, first=30, last=40):
    """Print what steps `first` to `last` of a search spend their time on, by operation."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if model.device.type == "cuda" else []
    profiler, steps = torch.profiler.profile(activities=kinds), iter(range(last + 1))

    def before_step():
        n = next(steps)
        if n == first:
            profiler.__enter__()
        elif n == last:
            profiler.__exit__(None, None, None)
            raise Enough

    begun = time.perf_counter()
    try:
        list(start(model, tokenizer, problems, args, before_step)[0])
        return                                                      # too short a search to profile
    except Enough:
        pass
    on = "self_device_time_total" if model.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, on))
    total = sum(getattr(e, on) for e in events)
    print(f"\n{last - first} steady steps, {total / 1e6:.3f} s of {'GPU' if 'device' in on else 'CPU'} time "
          f"({(time.perf_counter() - begun):.1f} s with the first {first}, and profiling):")
    for event in events[:8]:
        print(f"  {getattr(event, on) / total:6.1%}  {event.count:6} x {event.key[:80]}")


def roofline(device, dtype):
    """Measured bytes/s of copying and FLOP/s of multiplying matrices, the best of a few tries."""
    big, n = (2**31, 8192) if device.type == "cuda" else (2**28, 1024)
    x, best = torch.ones(big // dtype.itemsize, dtype=dtype, device=device), {}
    a, y = torch.randn(n, n, device=device).to(dtype), torch.empty_like(x)
    for name, work, amount in ("copy", lambda: y.copy_(x), 2 * big), ("matmul", lambda: a @ a, 2 * n**3):
        for _ in range(6):
            with Peak(device) as peak:
                work()
            best[name] = max(best.get(name, 0), amount / peak.seconds)
    return best["copy"], best["matmul"]


def by_continuous_batching(model, paths, breadth, n):
    """transformers' own engine with paged attention, n new tokens a sample without any stop."""
    config = transformers.GenerationConfig(max_new_tokens=n, do_sample=True, temperature=1.0, top_k=0,
                                           top_p=1.0, eos_token_id=-1, pad_token_id=0)
    model.generate_batch([path for path in paths for _ in range(breadth)], generation_config=config)


def expanded_paths(tree):
    """The token ids of the paths that a search expanded, in time."""
    inner = [i for i, node in enumerate(tree.nodes) if node.children]
    return [path_tokens(tree, i) for i in sorted(inner, key=lambda i: tree.nodes[i].children[0])]


def search(args):
    """Useful tokens/s (those that end in tree nodes, so a merged duplicate counts once) of (c) a whole search
    with its start and its tail; of generate on expansions of that search, (a) one tree at a time and (b) 16
    trees, in lockstep; and (d) the ceiling: decoding alone, as many rows, each after as many tokens as there
    were before one of (c) on average, nothing shared. On a GPU also (e), continuous batching, whose samples
    all have the mean length of a step. The peers run a few expansions, spread over the iterations; as their
    samples vary in length, an expansion of theirs counts as the mean one of (c).

    The paper searches 80 iterations a tree, 42 minutes on one CPU thread with AVX-512; the default takes 15.
    Prefixes are then shorter, which favours the peers, and the start and the tail of (c) weigh more.
    """
    if args.shape:
        model, tokenizer = shaped(args.shape, args.device, args.dtype)
    else:
        model, tokenizer = mcts.load_model(args.model, args.device, args.dtype)
    problems = tasks.load_problems(args.data, split="train", limit=args.limit or 2 * args.slots)
    columns = samples = before = 0  # of KV that decode steps read; samples, and the tokens before each

    def count():
        nonlocal columns, samples, before
        columns += sum(engine.schedule.used().values())
        samples += len(engine.schedule.drafts)
        before += sum(row.start + len(row.tokens) for row in engine.schedule.drafts)
    with Peak(model.device) as peak:
        searching, engine = start(model, tokenizer, problems, args, count)
        trees = list(searching)
    ours, stats = peak, engine.stats
    steps = [len(n.tokens) for t in trees for n in t.nodes[1:]]
    expanded = [expanded_paths(tree) for tree in trees]
    lengths = [len(path) for paths in expanded for path in paths]
    expansions, context = len(lengths), before // samples
    prefix, mean = sum(lengths) / expansions, sum(steps) / len(steps)
    rows = {"(c) ours": (sum(steps) / peak.seconds, expansions / peak.seconds, stats["prefilled"],
                         stats["reused"], peak.gib)}
    print(f"{len(trees)} trees, {expansions} expansions at {prefix:.0f} tokens, {len(steps)} steps of "
          f"{mean:.1f}, {sum(steps) / stats['sampled']:.1%} of the sampled tokens, in {peak.seconds:.0f} s; "
          f"a forward has {stats['sampled'] / stats['forwards']:.1f} samples, each after {context} tokens",
          flush=True)

    draw = random.Random(args.seed)

    def peer(name, together, batches, expand):
        prefilled = done = 0
        with Peak(model.device) as peak:
            for n in range(batches):                    # the middle of each batch's share of the iterations
                chosen = draw.sample(expanded, min(together, len(expanded)))
                paths = [tree[int((n + 0.5) / batches * len(tree))] for tree in chosen]
                expand(paths)
                prefilled, done = prefilled + sum(map(len, paths)), done + len(paths)
        if batches:
            rate = done / peak.seconds
            rows[name] = rate * sum(steps) / expansions, rate, prefilled, 0, peak.gib

    def generate(paths):
        by_generate(model, tokenizer, engine.ending, paths, args.breadth, args.max_step_tokens)

    live = args.slots * args.breadth
    at_once = ceiling(model, live, context)
    peer("(a) generate, one tree", 1, args.batches * 3, generate)
    peer("(b) generate, 16 trees", 16, args.batches, generate)
    rate, gib = max(at_once, ceiling(model, live, context))     # machines have slow minutes
    rows[f"(d) ceiling, {live} rows"] = rate, rate / (args.breadth * mean), 0, 0, gib
    weights = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n or "lm_head" in n)
    if model.config.tie_word_embeddings:
        weights += model.get_output_embeddings().weight.numel()
    kv = sum(heads * width for layer in model.served.layers for heads, width in layer)      # numbers a column
    moved = (weights * stats["forwards"] + kv * columns) * model.dtype.itemsize
    flops = 2 * weights * (stats["sampled"] + stats["prefilled"])
    copy, matmul = roofline(model.device, model.dtype)
    print(f"\n(c) reads at least {moved / ours.seconds / 1e9:.1f} GB/s, {moved / ours.seconds / copy:.1%} of "
          f"this machine's copy rate of {copy / 1e9:.1f}; its linear layers do "
          f"{flops / ours.seconds / 1e9:.1f} GFLOP/s, {flops / ours.seconds / matmul:.1%} of its matmul rate "
          f"of {matmul / 1e9:.1f}")
    profile(model, tokenizer, problems, args)
    if args.continuous or model.device.type == "cuda" and hasattr(model, "generate_batch"):
        peer("(e) continuous batching", 2 * args.slots, args.batches and 1,
             lambda paths: by_continuous_batching(model, paths, args.breadth, round(mean)))
    heads = "tokens/s", "iter/s", "prefilled", "reused", "peak GiB", "(c) / this"
    print("\n{:26}{:>10}{:>9}{:>11}{:>9}{:>10}{:>12}".format("", *heads))
    for name, row in sorted(rows.items()):
        ratio = rows["(c) ours"][0] / row[0]
        print("{:26}{:10.1f}{:9.2f}{:11}{:9}{:10.2f}{:12.2f}".format(name, *row, ratio))


# ---------------------------------------------------------------- search: what grows and what does not


def scale(args):
    """Seconds an iteration as questions, breadth and trees grow; memory over 10,000 finished trees; and a
    search with a tenth of the memory it would like. A tiny random model, so that the search itself shows."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    reward = lambda text, answer: 1 if mcts.MARKER in text and answer in text else -1
    questions = ({"question": f"Add {n} to 4.", "answer": "7"} for n in itertools.count())

    def run(title, n, model=model, **settings):
        """Search n new questions and print what an iteration takes."""
        settings = dict(iterations=10, breadth=5) | settings
        engine = mcts.Engine(model, tokenizer, slots=16, siblings=settings["breadth"], max_tokens=16)
        searching = mcts.search(model, tokenizer, itertools.islice(questions, n), reward, engine=engine, **settings)
        with Peak(model.device) as peak:
            children = [len(node.children) for tree in searching for node in tree.nodes]
        expansions, tokens = sum(map(bool, children)), engine.stats["sampled"]
        print(f"{title:32}{1000 * peak.seconds / expansions:10.2f}{1e6 * peak.seconds / tokens:12.0f}"
              f"{expansions:12}{sum(children):10}", flush=True)
    print(f"{'':32}{'ms/iter':>10}{'us/token':>12}{'iterations':>12}{'nodes':>10}")
    run("warm up", 10)
    for n in 10, 100, 1000:
        run(f"{n} questions", n)
    for breadth in 5, 16, 32:
        run(f"breadth {breadth}, 64 questions", 64, breadth=breadth)
    deep = tiny.model(chances=tiny.CHANCES | {tiny.END: 0.1, tiny.TURN: 0.1, "Final Answer:": 0.3})
    for iterations in 20, 80, 320:
        run(f"{iterations} iterations, 32 questions", 32, model=deep, iterations=iterations)
    print("\nmemory of the process over finished trees (2 iterations, breadth 2), MiB:")
    memory_over_trees(model, tokenizer, questions, reward, total=10_000)
    print("\na search with the KV memory it would fill, and with a tenth of that:")
    if args.model:
        model, tokenizer = mcts.load_model(args.model, args.device, args.dtype)
        problems, reward = tasks.load_problems(args.data, split="train", limit=args.limit), tasks.reward
    else:
        model, problems = tiny.model(dtype=torch.float64), [*itertools.islice(questions, 100)]
    tenth_of_memory(model, tokenizer, problems, reward)


def memory_over_trees(model, tokenizer, questions, reward, total):
    """Print the resident memory as trees are finished and thrown away."""
    trees = mcts.search(model, tokenizer, itertools.islice(questions, total), reward, iterations=2, breadth=2,
                        max_step_tokens=8)
    page = os.sysconf("SC_PAGE_SIZE")
    for n, _ in enumerate(trees, 1):
        if n in (100, 1000, 2000, 5000, total):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            print(f"{n:8} trees {resident / 2**20:8.1f}", flush=True)


def tenth_of_memory(model, tokenizer, problems, reward):
    """Compare a search with a tenth of the KV memory that it would fill with one that has it all."""
    runs, budget = {}, None
    for name in "all", "a tenth":
        engine = mcts.Engine(model, tokenizer, slots=16, siblings=5, max_tokens=64, kv_budget=budget)
        advance, most = engine.advance, 0

        def watched():
            nonlocal most
            done = advance()
            column = engine.cache.nbytes // engine.cache.columns
            most = max(most, engine.store.stored + column * sum(engine.schedule.used().values()))
            return done
        engine.advance = watched
        with Peak(model.device) as peak:
            runs[name] = {t.question: [(n.parent, n.tokens, n.visits, n.value) for n in t.nodes]
                          for t in mcts.search(model, tokenizer, problems, reward, iterations=10, engine=engine)}
        print(f"{name:8} {most / 2**20:9.2f} MiB of KV, {engine.stats['prefilled']:8} tokens prefilled, "
              f"{engine.stats['sampled']:8} sampled, {peak.seconds:7.1f} s", flush=True)
        budget = most // 10
    same = sum(tree == runs["a tenth"][question] for question, tree in runs["all"].items())
    print(f"{same} of {len(problems)} trees are the same")


# ---------------------------------------------------------------- training


def padded_step(model, tree, paths, loss_of):
    """One row a path, right-padded, full logits in float32: how TRL and the authors train."""
    rows = [path_tokens(tree, path[-1]) for path in paths]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # not log_softmax, which in float32 on a CPU is off by 1e-5 a token of a 49,152-entry vocabulary
    token = logits.gather(2, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)   # (P, T - 1)
    steps, start = [], len(tree.prompt) - 1
    for row, path in zip(token, paths):
        sizes = [len(tree.nodes[i].tokens) for i in path]
        steps.append([part.sum() for part in row[start:start + sum(sizes)].split(sizes)])
    return loss_of(steps, paths)


def train(args):
    """Seconds (of the processor on a CPU, which others may share) and peak memory of the DVO gradient of each
    question's paths, packed against padded."""
    model, _ = mcts.load_model(args.model, args.device, args.dtype or "float32")
    policy = dvo.Policy(model)
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
    for command in search, scale, train, match:
        sub = commands.add_parser(command.__name__, help=command.__doc__.splitlines()[0])
        sub.set_defaults(run=command)
        if command is match:
            sub.add_argument("--cases", required=True, help="file of labelled pairs")
            sub.add_argument("--show", action="store_true", help="print every wrong verdict")
            continue
        sub.add_argument("--model", required=command is train)
        sub.add_argument("--device")
        sub.add_argument("--dtype", choices=("float32", "bfloat16", "float64"))
        sub.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
        if command is train:
            sub.add_argument("--trees", required=True, help="trees of that model")
            sub.add_argument("--limit", type=int, default=8, help="trees (default: 8)")
            sub.add_argument("--paths", type=int, default=8, help="a question (default: 8)")
            continue
        sub.add_argument("--data", default="arithmetic", help="task or JSON Lines file (default: arithmetic)")
        if command is scale:
            sub.add_argument("--limit", type=int, default=8, help="questions to --model (default: 8)")
        if command is search:
            sub.add_argument("--limit", type=int, help="questions (default: twice the slots)")
            sub.add_argument("--shape", choices=SHAPES, help="of a random model instead of --model")
            sub.add_argument("--iterations", type=int, default=16, help="a tree (default: 16)")
            sub.add_argument("--batches", type=int, default=2,
                             help="of 16 expansions by peer (b), of 3 by (a); 0: none (default: 2)")
            sub.add_argument("--continuous", action="store_true", help="peer (e) on a CPU, too")
            sub.add_argument("--breadth", type=int, default=5)
            sub.add_argument("--slots", type=int, default=16)
            sub.add_argument("--max-step-tokens", type=int, default=64)
            sub.add_argument("--kv-budget", type=float, help="GiB")
            sub.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "search" and not (args.model or args.shape):
        parser.error("give --model or --shape")
    if "threads" in args:
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    tasks.run_command(main)
