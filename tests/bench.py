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
import functools
import itertools
import json
import operator
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dvo
import eval as tasks
import mcts
import tiny


class Peak:
    """Time and peak memory of a `with` block, in GiB above what was there: of the GPU, else of the process
    (on Linux). Of one thread of a CPU its own time, which others on the machine take less from."""

    def __init__(self, device):
        self.device = device
        self.is_gpu = device.type == "cuda"
        is_alone = not self.is_gpu and torch.get_num_threads() == 1
        self.clock = time.process_time if is_alone else time.perf_counter

    def read(self):
        if self.is_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
        raise OSError("this system does not tell the peak memory of a process")

    def __enter__(self):
        if self.is_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")           # the peak becomes the present size
        self.before = self.read()
        self.start = self.clock()
        return self

    def __exit__(self, *_):
        if self.is_gpu:
            torch.cuda.synchronize()
        self.seconds = self.clock() - self.start
        self.gib = (self.read() - self.before) / 2**30


def path_tokens(tree, i):
    """Token ids of the prompt and of the steps down to node i."""
    steps = [tree.nodes[j].tokens for j in tree.path(i)]
    return sum(steps, tree.prompt)


# ---------------------------------------------------------------- search


class StepEnds:
    """A stopping criterion of `generate`: each row ends with its step."""

    def __init__(self, ending, rows):
        self.ending = ending
        self.done = [False] * rows
        self.rows = [mcts.Draft(mcts.Job([]), 0, 0, 0, None, 0) for _ in range(rows)]

    def __call__(self, ids, scores, **_):
        for i, newest in enumerate(ids[:, -1].tolist()):
            row = self.rows[i]
            row.newest = newest
            row.tokens.append(newest)
            if self.ending.step_ends(row):
                self.done[i] = True
        return torch.tensor(self.done, device=ids.device)


SAMPLED = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)         # from the full distribution


def by_generate(model, tokenizer, ending, paths, breadth, max_tokens):
    """Sample `breadth` next steps after each of `paths` (token ids) in one call of generate."""
    width = max(map(len, paths))
    pad = tokenizer.pad_token_id or 0
    rows, masks = [], []
    for path in paths:
        empty = width - len(path)
        rows.append([pad] * empty + path)
        masks.append([0] * empty + [1] * len(path))
    ids = torch.tensor(rows, device=model.device)
    mask = torch.tensor(masks, device=model.device)
    model.generate(ids, attention_mask=mask, num_return_sequences=breadth, max_new_tokens=max_tokens,
                   pad_token_id=pad, stopping_criteria=[StepEnds(ending, len(paths) * breadth)], **SAMPLED)


class FullPrefix:
    """Attention of one token a row to a full prefix of its own: the least that any engine must do that shares
    nothing."""

    def __init__(self, model, rows, length):
        def random_columns(heads, width):
            shape = rows, heads, length, width
            return torch.randn(shape, device=model.device, dtype=model.served.dtype)

        self.kv = [(random_columns(*k), random_columns(*v)) for k, v in model.served.layers]

    def __call__(self, layer, window, q, k, v, scaling):
        K, V = self.kv[layer]
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))         # (1, H, N, D) -> (N, H, D)
        K[:, :, -1] = k
        V[:, :, -1] = v
        heads = k.shape[1]
        q = q.unflatten(1, (heads, -1))                 # (N, H, groups, D): no copy of K a query head
        out = torch.nn.functional.scaled_dot_product_attention(q, K, V, scale=scaling)
        return out.flatten(1, 2)[None]


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
    no_ends = dict(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    config = transformers.LlamaConfig(**SHAPES[name], **no_ends)
    device = mcts.pick_device(device)
    default = "bfloat16" if device.type == "cuda" else "float32"
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype or default), attn_implementation="sdpa")
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model.eval(), tiny.tokenizer()


def load(args):
    if args.shape:
        return shaped(args.shape, args.device, args.dtype)
    return mcts.load_model(args.model, args.device, args.dtype)


class Forced(mcts.Ending):
    """A step ends by its token alone, with chance 1 / 40: random weights write no blank lines. Lengths are
    then geometric, a little more uneven than those of real steps."""

    def __init__(self, ending, size):
        self.__dict__.update(ending.__dict__)
        generator = torch.Generator().manual_seed(0)
        chance = torch.rand(size, generator=generator)
        self.ends = (chance < 1 / 40).tolist()
        self.eos = set()

    def decode(self, tokens):
        return " ".join(map(str, tokens))

    def step_ends(self, row):
        return self.ends[row.newest]


class Enough(Exception):
    """Ends a search early."""


def start(model, tokenizer, problems, args, before_step=None):
    """A search with the settings of `args`, and its engine, which calls before_step() at every step."""
    budget = args.kv_budget and args.kv_budget * 2**30
    engine = mcts.Engine(model, tokenizer, slots=args.slots, siblings=args.breadth,
                         max_tokens=args.max_step_tokens, kv_budget=budget)
    if args.shape:
        engine.ending = Forced(engine.ending, len(engine.token_hash))
    if before_step:
        advance = engine.advance

        def watched():
            before_step()
            return advance()

        engine.advance = watched
    searching = mcts.search(model, tokenizer, problems, tasks.reward, iterations=args.iterations,
                            breadth=args.breadth, seed=args.seed, engine=engine)
    return searching, engine


def profile(model, tokenizer, problems, args, first=30, last=40):
    """Print what steps `first` to `last` of a search spend their time on, by operation."""
    is_gpu = model.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, activity.CUDA] if is_gpu else [activity.CPU]
    profiler = torch.profiler.profile(activities=kinds)
    steps = itertools.count()

    def before_step():
        n = next(steps)
        if n == first:
            profiler.__enter__()
        elif n == last:
            profiler.__exit__(None, None, None)
            raise Enough

    begun = time.perf_counter()
    searching, _ = start(model, tokenizer, problems, args, before_step)
    try:
        list(searching)
        return                                                      # too short a search to profile
    except Enough:
        pass
    where = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    time_of = operator.attrgetter(where)
    events = sorted(profiler.key_averages(), key=time_of, reverse=True)
    total = sum(map(time_of, events))
    seconds = time.perf_counter() - begun
    print(f"\n{last - first} steady steps, {total / 1e6:.3f} s of {'GPU' if is_gpu else 'CPU'} time "
          f"({seconds:.1f} s with the first {first}, and profiling):")
    for event in events[:8]:
        print(f"  {time_of(event) / total:6.1%}  {event.count:6} x {event.key[:80]}")


def best_rate(device, amount, work, tries=6):
    """`amount` a second of work(), at its fastest."""
    rates = []
    for _ in range(tries):
        with Peak(device) as peak:
            work()
        rates.append(amount / peak.seconds)
    return max(rates)


def roofline(device, dtype, size=None):
    """Measured bytes/s of copying `size` bytes, by default more than a cache holds, and FLOP/s of multiplying
    matrices."""
    is_gpu = device.type == "cuda"
    size = size or 2**(31 if is_gpu else 28)
    n = 8192 if is_gpu else 512
    x = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
    y = torch.empty_like(x)
    matrix = torch.randn(n, n, device=device).to(dtype)
    copy = best_rate(device, 2 * size, lambda: y.copy_(x))
    matmul = best_rate(device, 2 * n**3, lambda: matrix @ matrix)
    return copy, matmul


def by_continuous_batching(model, paths, breadth, n):
    """transformers' own engine with paged attention, n new tokens a sample without any stop."""
    config = transformers.GenerationConfig(max_new_tokens=n, eos_token_id=-1, pad_token_id=0, **SAMPLED)
    prompts = [path for path in paths for _ in range(breadth)]
    model.generate_batch(prompts, generation_config=config)


def expanded_paths(tree):
    """The token ids of the paths that a search expanded, in time."""
    def first_child(i):
        return tree.nodes[i].children[0]

    inner = [i for i, node in enumerate(tree.nodes) if node.children]
    return [path_tokens(tree, i) for i in sorted(inner, key=first_child)]


@dataclass
class Speed:
    """A row of the table of `search`."""
    tokens: float               # useful ones a second
    expansions: float           # a second
    prefilled: int = 0          # tokens
    reused: int = 0             # tokens
    gib: float = 0.0            # at the peak


class Searched:
    """The search (c), measured: its trees, and what its forwards held."""

    def __init__(self, model, tokenizer, problems, args):
        self.columns = 0        # of KV that decode steps read
        self.samples = 0        # summed over the forwards
        self.before = 0         # tokens before each of those
        searching, self.engine = start(model, tokenizer, problems, args, self.count)
        with Peak(model.device) as self.peak:
            trees = list(searching)
        self.stats = self.engine.stats
        self.trees = [expanded_paths(tree) for tree in trees]
        steps = [len(node.tokens) for tree in trees for node in tree.nodes[1:]]
        lengths = [len(path) for paths in self.trees for path in paths]
        self.useful = sum(steps)
        self.step_length = self.useful / len(steps)
        self.expansions = len(lengths)
        self.prefix = sum(lengths) / self.expansions
        self.context = self.before // self.samples

    def count(self):
        drafts = self.engine.schedule.drafts
        self.columns += sum(self.engine.schedule.used().values())
        self.samples += len(drafts)
        self.before += sum(draft.start + len(draft.tokens) for draft in drafts)

    def speed(self):
        seconds = self.peak.seconds
        return Speed(self.useful / seconds, self.expansions / seconds, self.stats["prefilled"],
                     self.stats["reused"], self.peak.gib)

    def describe(self):
        sampled = self.stats["sampled"]
        return (f"{len(self.trees)} trees, {self.expansions} expansions at {self.prefix:.0f} tokens, steps "
                f"of {self.step_length:.1f}, {self.useful / sampled:.1%} of the sampled tokens, in "
                f"{self.peak.seconds:.0f} s; a forward has {sampled / self.stats['forwards']:.1f} samples, "
                f"each after {self.context} tokens")

    def share_of_the_machine(self, model):
        """What (c) reads and multiplies at least, against what the machine can."""
        weights = 0
        for name, weight in model.named_parameters():
            if "embed" not in name or "lm_head" in name:
                weights += weight.numel()
        if model.config.tie_word_embeddings:
            weights += model.get_output_embeddings().weight.numel()
        column = sum(heads * width for layer in model.served.layers for heads, width in layer)      # numbers
        moved = (weights * self.stats["forwards"] + column * self.columns) * model.dtype.itemsize
        flops = 2 * weights * (self.stats["sampled"] + self.stats["prefilled"])
        copy, matmul = roofline(model.device, model.dtype)
        bandwidth = moved / self.peak.seconds
        speed = flops / self.peak.seconds
        return (f"(c) reads at least {bandwidth / 1e9:.1f} GB/s, {bandwidth / copy:.1%} of this machine's "
                f"copy rate of {copy / 1e9:.1f}; its linear layers do {speed / 1e9:.1f} GFLOP/s, "
                f"{speed / matmul:.1%} of its matmul rate of {matmul / 1e9:.1f}")


def measure_peer(expand, together, batches, ours, draw, device):
    """The Speed of expand(paths) on `batches` batches of an expansion of each of `together` trees, spread
    over the iterations: the middle of each batch's share of them."""
    prefilled = done = 0
    with Peak(device) as peak:
        for n in range(batches):
            share = (n + 0.5) / batches
            chosen = draw.sample(ours.trees, min(together, len(ours.trees)))
            paths = [tree[int(share * len(tree))] for tree in chosen]
            expand(paths)
            prefilled += sum(map(len, paths))
            done += len(paths)
    rate = done / peak.seconds
    return Speed(rate * ours.useful / ours.expansions, rate, prefilled, gib=peak.gib)


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
    model, tokenizer = load(args)
    problems = tasks.load_problems(args.data, split="train", limit=args.limit or 2 * args.slots)
    ours = Searched(model, tokenizer, problems, args)
    print(ours.describe(), flush=True)
    rows = {"(c) ours": ours.speed()}
    draw = random.Random(args.seed)

    def generate(paths):
        by_generate(model, tokenizer, ours.engine.ending, paths, args.breadth, args.max_step_tokens)

    def continuous(paths):
        by_continuous_batching(model, paths, args.breadth, round(ours.step_length))

    live = args.slots * args.breadth
    at_once = ceiling(model, live, ours.context)
    if args.batches:
        peer = functools.partial(measure_peer, ours=ours, draw=draw, device=model.device)
        rows["(a) generate, one tree"] = peer(generate, together=1, batches=3 * args.batches)
        rows["(b) generate, 16 trees"] = peer(generate, together=16, batches=args.batches)
        on_gpu = model.device.type == "cuda" and hasattr(model, "generate_batch")
        if args.continuous or on_gpu:
            rows["(e) continuous batching"] = peer(continuous, together=2 * args.slots, batches=1)
    rate, gib = max(at_once, ceiling(model, live, ours.context))    # machines have slow minutes
    per_expansion = args.breadth * ours.step_length
    rows[f"(d) ceiling, {live} rows"] = Speed(rate, rate / per_expansion, gib=gib)
    print(f"\n{ours.share_of_the_machine(model)}")
    profile(model, tokenizer, problems, args)
    print_table(rows)


def print_table(rows):
    heads = "tokens/s", "iter/s", "prefilled", "reused", "peak GiB", "(c) / this"
    print("\n{:26}{:>10}{:>9}{:>11}{:>9}{:>10}{:>12}".format("", *heads))
    for name, row in sorted(rows.items()):
        ratio = rows["(c) ours"].tokens / row.tokens
        print(f"{name:26}{row.tokens:10.1f}{row.expansions:9.2f}{row.prefilled:11}{row.reused:9}"
              f"{row.gib:10.2f}{ratio:12.2f}")


# ---------------------------------------------------------------- search: what grows and what does not


def toy_reward(text, answer):
    return 1 if mcts.MARKER in text and answer in text else -1


def toy_questions():
    for n in itertools.count():
        yield {"question": f"Add {n} to 4.", "answer": "7"}


def scale(args):
    """Seconds an iteration as questions, breadth and trees grow; memory over 10,000 finished trees; and a
    search with a tenth of the memory it would like. A tiny random model, so that the search itself shows."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    questions = toy_questions()

    def run(title, n, model=model, iterations=10, breadth=5):
        """Search n new questions and print what an iteration takes."""
        engine = mcts.Engine(model, tokenizer, slots=16, siblings=breadth, max_tokens=16)
        some = itertools.islice(questions, n)
        searching = mcts.search(model, tokenizer, some, toy_reward, iterations=iterations, breadth=breadth,
                                engine=engine)
        with Peak(model.device) as peak:
            children = [len(node.children) for tree in searching for node in tree.nodes]
        expansions = sum(map(bool, children))
        per_expansion = 1e3 * peak.seconds / expansions
        per_token = 1e6 * peak.seconds / engine.stats["sampled"]
        print(f"{title:32}{per_expansion:10.2f}{per_token:12.0f}{expansions:12}{sum(children):10}",
              flush=True)

    print(f"{'':32}{'ms/iter':>10}{'us/token':>12}{'iterations':>12}{'nodes':>10}")
    run("warm up", 10)
    for n in 10, 100, 1000:
        run(f"{n} questions", n)
    for breadth in 5, 16, 32:
        run(f"breadth {breadth}, 64 questions", 64, breadth=breadth)
    seldom = {tiny.END: 0.1, tiny.TURN: 0.1, "Final Answer:": 0.3}
    deep = tiny.model(chances=tiny.CHANCES | seldom)
    for iterations in 20, 80, 320:
        run(f"{iterations} iterations, 32 questions", 32, model=deep, iterations=iterations)
    print("\nmemory of the process over finished trees (2 iterations, breadth 2), MiB:")
    memory_over_trees(model, tokenizer, questions, total=10_000)
    print("\na search with the KV memory it would fill, and with a tenth of that:")
    if args.model:
        model, tokenizer = mcts.load_model(args.model, args.device, args.dtype)
        problems = tasks.load_problems(args.data, split="train", limit=args.limit)
        tenth_of_memory(model, tokenizer, problems, tasks.reward, max_tokens=64)
    else:
        problems = [*itertools.islice(questions, 100)]
        tenth_of_memory(tiny.model(dtype=torch.float64), tokenizer, problems, toy_reward, max_tokens=16)


def memory_over_trees(model, tokenizer, questions, total):
    """Print the resident memory as trees are finished and thrown away."""
    some = itertools.islice(questions, total)
    trees = mcts.search(model, tokenizer, some, toy_reward, iterations=2, breadth=2, max_step_tokens=8)
    page = os.sysconf("SC_PAGE_SIZE")
    for n, _ in enumerate(trees, 1):
        if n in (100, 1000, 2000, 5000, total):
            _, pages, *_ = Path("/proc/self/statm").read_text().split()
            print(f"{n:8} trees {int(pages) * page / 2**20:8.1f}", flush=True)


def most_kv(engine):
    """Watch an engine: returns a function that tells the most bytes of KV it has held, live and stored."""
    advance = engine.advance
    most = 0

    def watched():
        nonlocal most
        done = advance()
        column = engine.cache.nbytes // engine.cache.columns
        live = column * sum(engine.schedule.used().values())
        most = max(most, engine.store.stored + live)
        return done

    engine.advance = watched
    return lambda: most


def tenth_of_memory(model, tokenizer, problems, reward, max_tokens):
    """Compare a search with a tenth of the KV memory that it would fill with one that has it all. A question
    that does not fit into that is skipped, with a line on stderr."""
    runs = []
    budget = None
    for name in "all", "a tenth":
        engine = mcts.Engine(model, tokenizer, slots=16, siblings=5, max_tokens=max_tokens, kv_budget=budget)
        held = most_kv(engine)
        grown = {}
        with Peak(model.device) as peak:
            for tree in mcts.search(model, tokenizer, problems, reward, iterations=10, engine=engine):
                grown[tree.question] = [(n.parent, n.tokens, n.visits, n.value) for n in tree.nodes]
        runs.append(grown)
        print(f"{name:8} {held() / 2**20:9.2f} MiB of KV, {engine.stats['prefilled']:8} tokens prefilled, "
              f"{engine.stats['sampled']:8} sampled, {peak.seconds:7.1f} s", flush=True)
        budget = held() // 10
    whole, tenth = runs
    same = sum(tree == tenth.get(question) for question, tree in whole.items())
    print(f"{same} of {len(problems)} trees are the same")


# ---------------------------------------------------------------- training


def padded_step(model, tree, paths, loss_of):
    """One row a path, right-padded, full logits in float32: how TRL and the authors train."""
    rows = [torch.tensor(path_tokens(tree, path[-1])) for path in paths]
    ones = [torch.ones_like(row) for row in rows]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    mask = nn.utils.rnn.pad_sequence(ones, batch_first=True).to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # not log_softmax, which in float32 on a CPU is off by 1e-5 a token of a 49,152-entry vocabulary
    of_target = logits.gather(2, ids[:, 1:, None])[..., 0]
    token = of_target - logits.logsumexp(-1)                        # (P, T - 1)
    after_prompt = token[:, len(tree.prompt) - 1:]
    steps = []
    for row, path in zip(after_prompt, paths):
        sizes = [len(tree.nodes[i].tokens) for i in path]
        parts = row[:sum(sizes)].split(sizes)
        steps.append(torch.stack([part.sum() for part in parts]))
    return loss_of(steps)


def longest_paths(tree, n):
    def depth(i):
        return tree.nodes[i].depth

    ends = [i for i, node in enumerate(tree.nodes) if node.terminal]
    return [tree.path(i) for i in sorted(ends, key=depth, reverse=True)[:n]]


class Compared:
    """The DVO gradient of a tree's paths, packed against padded; sums over trees."""

    def __init__(self, model):
        self.model = model
        self.policy = dvo.Policy(model)
        self.total = collections.Counter()
        self.distance = 0.0                             # the largest of two gradients, relative

    def add(self, tree, paths):
        nodes = range(len(tree.nodes))
        credit = torch.tensor([0.5 + tree.credit(i) if i else 0.0 for i in nodes])      # 0 if all paths fail
        credit = credit.to(self.model.device)
        pack = dvo.pack(tree, paths)

        def loss_of(steps):                             # of the first update, whose reference is the policy
            losses = []
            for logprobs, path in zip(steps, paths):
                errors = 0.1 * (logprobs - logprobs.detach()) - credit[path]
                losses.append((errors ** 2).mean())
            return torch.stack(losses).mean()

        def packed():
            [logprobs] = self.policy(packs=[pack])
            return loss_of([logprobs[path] for path in paths])

        def padded():
            return padded_step(self.model, tree, paths, loss_of)

        rows = self.gradient("padded", padded)
        ours = self.gradient("packed", packed)
        distance = (rows - ours).norm() / rows.norm()
        self.distance = max(self.distance, distance.item())
        lengths = [len(path_tokens(tree, path[-1])) for path in paths]
        self.total["path tokens"] += sum(lengths)
        self.total["padded tokens"] += len(lengths) * max(lengths)
        self.total["packed tokens"] += len(pack.tokens)

    def gradient(self, name, loss_of_step):
        """The gradient, whose seconds (of the processor on a CPU) and memory are counted under `name`."""
        self.model.zero_grad(set_to_none=False)
        with Peak(self.model.device) as peak:
            start = time.process_time()
            loss_of_step().backward()
            seconds = time.process_time() - start
        is_cpu = self.model.device.type == "cpu"
        self.total[f"{name} s"] += seconds if is_cpu else peak.seconds
        self.total[f"{name} GiB"] = max(self.total[f"{name} GiB"], peak.gib)
        return torch.cat([weight.grad.flatten() for weight in self.model.parameters()])


def train(args):
    """Seconds (of the processor on a CPU, which others may share) and peak memory of the DVO gradient of each
    question's paths, packed against padded."""
    model, _ = mcts.load_model(args.model, args.device, args.dtype or "float32")
    compared = Compared(model)
    trees = 0
    for tree in mcts.read_trees(args.trees):
        paths = longest_paths(tree, args.paths)
        if len(paths) == args.paths and trees < args.limit:
            compared.add(tree, paths)
            trees += 1
    print(f"{trees} questions of {args.paths} paths; largest relative distance of gradients "
          f"{compared.distance:.1e}")
    total = compared.total
    for name in "padded", "packed":
        total[f"{name} path tokens/s"] = total["path tokens"] / total[f"{name} s"]
    for name in "tokens", "s", "path tokens/s", "GiB":
        padded = total[f"padded {name}"]
        packed = total[f"packed {name}"]
        print(f"{name:14} padded {padded:10.2f}   packed {packed:10.2f}   "
              f"packed / padded {packed / padded:.2f}   padded / packed {padded / packed:.2f}")


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
    kinds = collections.defaultdict(collections.Counter)
    seconds = []
    for case in cases:
        gold, pred = case["gold"], case["pred"]
        start = time.perf_counter()
        verdict = bool(judge(pred, gold))
        seconds.append(time.perf_counter() - start)
        outcome = "false positive" if verdict else "false negative"
        if verdict == case["equal"]:
            outcome = "right"
        kinds[case.get("kind", "all")][outcome] += 1
        if show and outcome != "right":
            print(f"{outcome}  {case.get('id')}  {gold[-100:]!r}  {pred[-160:]!r}")
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
        sub = commands.add_parser(command.__name__, help=" ".join(command.__doc__.split()))
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
