# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Acceptance on one GPU: under ten minutes on an H100 or H200, nothing to download.

    python tests/gpu.py [--out results.json]
    python tests/gpu.py --device cpu --tiny     # the same code on any machine, in less than a minute

A line a check: PASS, FAIL or NOT CHECKED, and what was found. What is right comes first, then what is fast;
the first failure is the end, with exit status 1. Weights are random: speed and memory do not depend on them.
"""
import argparse
import contextlib
import copy
import functools
import gc
import itertools
import json
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import tiny                                                         # first: it puts the project on sys.path
import dvo
import eval as tasks
import mcts

import bench
import numpy as np
import torch
import torch.distributed as dist
import transformers
from launch import Command
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

QUESTIONS = [f"Add {i} to {i + 1}." + " So double it." * (i % 3) for i in range(8)]
PROBLEMS = [{"question": question, "answer": "7"} for question in QUESTIONS]


class NotChecked(Exception):
    """Why a check proves nothing here."""


def need(condition, sentence):
    if not condition:
        raise AssertionError(sentence)


class Card:
    """The device, the sizes of what runs on it, and the models that several checks share."""
    breadth = 5
    paths = 8

    def __init__(self, device, is_tiny):
        self.device = mcts.pick_device(device)
        self.is_gpu = self.device.type == "cuda"
        self.activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.is_gpu
        self.dtype = torch.bfloat16 if self.is_gpu else torch.float32
        self.shape = "tiny" if is_tiny else "llama-3-8b"
        self.slots = (2, 4) if is_tiny else (64, 128)
        self.kv_budget = 2**24 if is_tiny else 16 * 2**30
        self.iterations = 4 if is_tiny else 20                      # of trees that are compared
        self.steps = (2, 5, 7) if is_tiny else (40, 140, 160)       # to warm up, to be timed, to be profiled
        self.longest_step = 8 if is_tiny else 128
        self.step_tokens = 4 if is_tiny else 40                     # of a step in training
        self.prompt_tokens = 20 if is_tiny else 200
        self.response_tokens = 24 if is_tiny else 1024
        self.prompts = 4 if is_tiny else 107
        self.train_layers = 1 if is_tiny else 8

    def build(self, layers=None, dtype=None):
        """A random Llama of the shape, and a tokenizer without an EOS."""
        sizes = dict(bench.SHAPES[self.shape])
        sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
        config = transformers.LlamaConfig(**sizes, eos_token_id=None, bos_token_id=None, pad_token_id=0)
        with self.device:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or self.dtype)
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        tokenizer = tiny.tokenizer()
        tokenizer.eos_token = None
        return model.eval(), tokenizer

    @functools.cached_property
    def whole(self):
        """The model with all of its layers, and its tokenizer."""
        return self.build()

    @functools.cached_property
    def rates(self):
        """Bytes/s of copying and FLOP/s of multiplying matrices, as measured here."""
        size = 2**20 if self.shape == "tiny" else None              # where nobody asks how fast it is
        return bench.roofline(self.device, self.dtype, size)

    def only_gpu(self, what):
        if not self.is_gpu:
            raise NotChecked(f"{what}: needs a GPU")


# ---------------------------------------------------------------- what is right


def environment(card):
    """The settings that a GPU needs are in force: no attention by cuDNN, segments of memory that grow."""
    backends = torch.backends.cuda
    need(not backends.cudnn_sdp_enabled(), "attention by cuDNN is on")
    need(backends.mem_efficient_sdp_enabled(), "memory-efficient attention is off")
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "memory": settings}
    if card.is_gpu:
        properties = torch.cuda.get_device_properties(card.device)
        need(torch.cuda.is_bf16_supported(), "this card has no bfloat16")
        found |= {"card": properties.name, "GiB": properties.total_memory / 2**30, "CUDA": torch.version.cuda}
    return found


def search(card, model, slots):
    settings = dict(iterations=card.iterations, breadth=4, depth=4, max_step_tokens=16, slots=slots)
    trees = mcts.search(model, tiny.tokenizer(), PROBLEMS, tasks.reward, **settings)
    return sorted(trees, key=lambda tree: tree.question)


def nodes_by_path(trees):
    """Of every node its outcomes, by question and tokens from the root."""
    found = {}
    for tree in trees:
        for i, node in enumerate(tree.nodes):
            tokens = tuple(bench.path_tokens(tree, i))
            found[tree.question, tokens] = (node.visits, node.reward, node.terminal, node.valid)
    return found


def shared_nodes(card, dtype):
    """The share of the nodes of a search on the CPU that a search here has, too, in other batches."""
    expected = nodes_by_path(search(card, tiny.model(dtype=dtype), slots=16))
    found = nodes_by_path(search(card, tiny.model(dtype=dtype).to(card.device), slots=3))
    return sum(found.get(path) == node for path, node in expected.items()) / len(expected)


def search_in_float64(card):
    """The device finds the trees that the CPU finds, in other batches, node by node."""
    share = shared_nodes(card, torch.float64)
    need(share == 1, f"only {share:.2%} of the nodes are those of the CPU")
    return {"same nodes": share}


def search_in_float32(card):
    """Where sums are rounded otherwise, next to nothing changes."""
    share = shared_nodes(card, torch.float32)
    need(share >= 0.99, f"only {share:.2%} of the nodes are those of the CPU")
    return {"same nodes": share}


def search_in_bfloat16(card):
    """The log-probs that a search stores are those of plain forwards, without a drift to one side."""
    model = tiny.model(dtype=torch.bfloat16).to(card.device)
    errors = []
    for tree in search(card, model, slots=4):
        ends = [i for i, node in enumerate(tree.nodes) if not node.children]
        with torch.no_grad():
            plain = row_logprobs(model, tree, ends)
        for node, logprob in zip(tree.nodes[1:], plain[1:].tolist()):
            errors.append((node.logprob - logprob) / len(node.tokens))
    largest = max(map(abs, errors))
    mean = sum(errors) / len(errors)
    need(largest < 0.25 and abs(mean) < 0.025, f"log-probs are off by {largest} at most, {mean} on average")
    return {"largest error": largest, "mean error": mean, "flips a token": flip_rate(model)}


def flip_rate(model):
    """How often a token differs between batches, while all before it were the same."""
    drawn = [mcts.sample(model, tiny.tokenizer(), QUESTIONS, n=4, max_new_tokens=32, slots=slots)
             for slots in (1, 8)]
    flips = tokens = 0
    for few, many in zip(*map(itertools.chain.from_iterable, drawn)):
        pairs = list(zip(few.tokens, many.tokens))
        same = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])
        flips += same < len(pairs)
        tokens += min(same + 1, len(pairs))
    need(flips <= 0.05 * tokens, f"{flips} of {tokens} tokens depend on the batch")
    return flips / tokens


def token_logprobs(model, rows):
    """(B, T - 1) of plain rows (B, T), by the model's own forward, in float32 at least."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(2, rows[:, 1:, None])[..., 0] - logits.logsumexp(-1)


def row_logprobs(model, tree, ends):
    """(num_nodes,) step log-probs as dvo.Policy gives, from one plain row for each path to one of `ends`."""
    found = {}
    for i in ends:
        on_path = tree.path(i)
        row = torch.tensor([bench.path_tokens(tree, i)], device=model.device)
        sizes = [len(tree.nodes[j].tokens) for j in on_path]
        steps = token_logprobs(model, row)[0, -sum(sizes):].split(sizes)
        found |= {j: step.sum() for j, step in zip(on_path, steps)}
    zero = 0 * next(iter(found.values()))
    return torch.stack([found.get(i, zero) for i in range(len(tree.nodes))])


def learned(model, tree, objective, of_rows=False):
    """(loss, gradient) of the paths of one tree, on the CPU in float64."""
    example = dvo.make_example(tree, keep_unsolved=True, choose=dvo.OBJECTIVES[objective])
    if of_rows:
        ends = {int(path.nonzero().max()) for path in example.path}
        logprobs = row_logprobs(model, tree, ends)
    else:
        logprobs = dvo.step_logprobs(model, example.pack)
    example = example.like(logprobs)
    example.reference = example.reference + 0.2
    loss = dvo.objective_loss(objective, example, logprobs, example.value).mean()
    gradient = torch.autograd.grad(loss, [*model.parameters()])
    parts = [part.flatten() for part in gradient]
    return torch.cat([loss.view(1), *parts]).cpu().double()


def objectives(card):
    """Packs have the loss and gradient of plain rows, and of the CPU; other types come near."""
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.3}     # its norms are in float32
    cpu = tiny.model(dtype=torch.float64)

    def teaches_all(tree):
        return all(dvo.make_example(tree, keep_unsolved=True, choose=c) for c in dvo.OBJECTIVES.values())

    trees = filter(teaches_all, search(card, cpu, slots=4))
    tree = max(trees, key=lambda tree: tree.nodes[0].visits)
    worst = Counter()
    models = {dtype: copy.deepcopy(cpu).to(card.device, dtype) for dtype in tolerance}
    for objective in dvo.OBJECTIVES:
        expected = learned(cpu, tree, objective)
        for dtype, most in tolerance.items():
            model = models[dtype]
            for of_rows in (False, True) if dtype == torch.float64 else (False,):
                found = learned(model, tree, objective, of_rows)
                distance = (found - expected).norm() / expected.norm()
                need(distance <= most, f"{objective} in {dtype}, rows {of_rows}: off by {distance:.1e}")
                worst[f"off in {dtype}"] = max(worst[f"off in {dtype}"], distance.item())
    return worst


def unlikely_rows(card):
    """T = 192, scores near -200: the shape and the sum over a row at which cuDNN's gradient is NaN."""
    T = 192
    draw = torch.Generator().manual_seed(0)
    direction = torch.randn(64, generator=draw)
    q = 5 * direction + torch.randn(1, 4, T, 64, generator=draw)
    k = -5 * direction + torch.randn(1, 2, T, 64, generator=draw)
    v = torch.randn(1, 2, T, 64, generator=draw)
    q, k, v = (x.bfloat16().float() for x in (q, k, v))             # the same numbers in every type

    def gradient(device, dtype):
        mine = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        seen = torch.ones(1, T, T, dtype=torch.bool, device=device).tril()
        attention = mcts.tree_attention(seen, torch.arange(T, device=device)[None])
        out = attention(0, None, *mine, scaling=0.125)
        parts = torch.autograd.grad(out.square().sum(), mine)
        return torch.cat([part.flatten().cpu().double() for part in parts])

    score = (q[0, 0] @ k[0, 0].T).max() * 0.125
    need(score < -88.7, f"the rows are too likely: {score}")
    expected = gradient("cpu", torch.float64)
    distances = {}
    for dtype, most in (torch.float32, 1e-3), (torch.bfloat16, 0.1):
        found = gradient(card.device, dtype)
        need(found.isfinite().all(), f"the gradient in {dtype} is not finite")
        distance = ((found - expected).norm() / expected.norm()).item()
        need(distance < most, f"the gradient in {dtype} is off by {distance}")
        distances[f"off in {dtype}"] = distance
    return distances


ATTENTION = "_scaled_dot_product"


def attention_kernels(card, work):
    """Which forms of attention `work` runs, by their names in PyTorch and on the GPU."""
    with profile(activities=card.activities) as seen:
        work()
    names = [event.key for event in seen.key_averages()]
    forms = {name.partition(ATTENTION)[2].strip("_") for name in names if ATTENTION in name}
    forms |= {name[:80] for name in names if "fmha" in name or "cudnn" in name}
    return sorted(forms)


def kernels(card):
    """Prefill, decoding and training run a fused attention, never cuDNN's, never the plain one."""
    types = {card.dtype, torch.float32}
    return {str(dtype): kernels_in(card, dtype) for dtype in types}


def kernels_in(card, dtype):
    model, tokenizer = card.build(layers=2, dtype=dtype)
    engine = mcts.Engine(model, tokenizer, slots=2, siblings=5, max_tokens=8, kv_budget=card.kv_budget)
    engine.cache.resize(256, {})
    tokens = [5] * 10
    lanes = [0] * 5 + [1] * 5
    siblings = [*range(5)] * 2
    table = np.array([tokens, lanes, siblings, [40] * 10, [0] * 10])
    long = random_tree(card, seed=0)
    policy = dvo.Policy(model)

    def prefill():
        mcts.prefill(model, engine.cache, 0, 0, [*range(100)])
        mcts.prefill(model, engine.cache, 0, 100, [*range(100)])

    def train():
        policy(packs=[dvo.pack(long, leaves(long))])[0].sum().backward()

    found = {}
    with torch.no_grad():
        found["prefill"] = attention_kernels(card, prefill)
        found["decode"] = attention_kernels(card, lambda: mcts.decode(model, engine.cache, table))
    found["train"] = attention_kernels(card, train)
    for phase, forms in found.items():
        need(forms, f"{phase} runs no attention of PyTorch")
        need(not any("cudnn" in form for form in forms), f"{phase} runs {forms}")
        need(not any("math" in form for form in forms), f"{phase} runs {forms}")
    return found


# ---------------------------------------------------------------- runs


VARIANTS = {"plain": (),
            "offload": ("--offload",),
            "both": ("--offload", "--shard-search"),
            "checkpointing": ("--activation-checkpointing",),
            "shard-search": ("--shard-search",)}


def start_run(card, folder, name, *flags):
    """dvo.py as the one rank of a group, in float64, which makes runs comparable."""
    model, data = folder / "model", folder / "data.jsonl"
    if not model.exists():
        tiny.model().save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)
        data.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return Command(
        "--device", card.device, "--model", model, "--data", data, "--eval-data", "--out", folder / name,
        "--dtype", "float64", "--no-bootstrap", "--rounds", 1, "--questions-per-round", 4, "--iterations", 5,
        "--breadth", 3, "--depth", 3, "--max-step-tokens", 8, "--slots", 4, "--lr", 1e-3, "--epochs", 2,
        "--questions-per-step", 2, "--micro-tokens", 300, "--keep-unsolved", "--save-minutes", 0, *flags,
        ranks=1)


def end_run(process):
    out, err = process.communicate(timeout=200)
    need(process.returncode == 0, f"the run failed:\n{err[-3000:]}")


def losses(folder):
    """What a run has logged of its training, by step."""
    log = folder / "log.jsonl"
    written = log.read_text() if log.exists() else ""
    whole = written[:written.rfind("\n") + 1]                       # no line that is half written
    lines = map(json.loads, whole.splitlines())
    return {line["step"]: line["loss"] for line in lines if line["event"] == "train"}


def same_losses(found, expected):
    numbers = [*found.values()], [*expected.values()]
    return found.keys() == expected.keys() and np.allclose(*numbers, rtol=1e-6)


def one_rank_runs(card):
    """Every way to hold the weights gives the same training, a killed run goes on, and its model loads."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        names = list(VARIANTS)
        if not card.is_gpu:
            names = ["plain", "offload", "both"]                    # the others on a CPU: test_ranks.py
        runs = {name: start_run(card, folder, name, *VARIANTS[name]) for name in names}
        for name, process in runs.items():
            end_run(process)
            need(same_losses(losses(folder / name), losses(folder / "plain")), f"{name}: other losses")
        killed = start_run(card, folder, "killed")
        while killed.poll() is None and not losses(folder / "killed"):
            time.sleep(0.005)
        killed.kill()
        killed.communicate()
        end_run(start_run(card, folder, "killed"))
        need(same_losses(losses(folder / "killed"), losses(folder / "plain")), "killed: other losses")
        model, tokenizer = mcts.load_model(str(folder / "killed/round1/model"), card.device)
        [[response]] = mcts.sample(model, tokenizer, QUESTIONS[:1], max_new_tokens=8)
        need(response.tokens, "the saved model says nothing")
        return {"runs": [*names, "killed"], "steps": len(losses(folder / "plain"))}


# ---------------------------------------------------------------- what is fast: search


def start_search(card, slots):
    """An engine of the whole model, whose steps end by chance after 40 tokens."""
    model, tokenizer = card.whole
    engine = mcts.Engine(model, tokenizer, slots=slots, siblings=card.breadth, max_tokens=card.longest_step,
                         kv_budget=card.kv_budget)
    engine.ending = bench.Forced(engine.ending, len(engine.token_hash))
    return engine


def search_until(engine, before_step, number):
    """Search for so many steps, before_step(n) being called before each, and after the last."""
    advance, numbers = engine.advance, itertools.count()

    def watched():
        n = next(numbers)
        before_step(n)
        if n == number:
            raise bench.Enough
        return advance()

    engine.advance = watched
    problems = tasks.load_problems("arithmetic", split="train", limit=2 * engine.slots)
    with contextlib.suppress(bench.Enough):
        list(mcts.search(engine.model, engine.tokenizer, problems, lambda text, answer: -1, iterations=999,
                         breadth=engine.siblings, engine=engine))


def waits(card):
    """A step waits for the GPU twice: its table goes there, the tokens come back."""
    card.only_gpu("how often the host waits (test_fakecuda.py counts the same on a CPU)")
    engine = start_search(card, card.slots[0])
    found = []

    def counted(draw=engine.draw):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            drawn = draw()
            torch.cuda.set_sync_debug_mode("default")
        found.append(sum("called a synchronizing" in str(warning.message) for warning in seen))
        return drawn

    engine.draw = counted
    search_until(engine, lambda n: None, card.steps[0])
    need(max(found) <= 2, f"a step waits {max(found)} times")
    return {"waits a step": max(found)}


def synchronize(card):
    if card.is_gpu:
        torch.cuda.synchronize(card.device)


def time_search(card, slots):
    """What steady steps of a search do in a second, and how much of the time the GPU works."""
    engine = start_search(card, slots)
    warm, timed, profiled = card.steps
    profiler = profile(activities=card.activities)
    marks, columns = {}, 0

    def before_step(n):
        nonlocal columns
        if warm <= n < timed:
            columns += sum(engine.schedule.used().values())
        if n in card.steps:
            synchronize(card)
            marks[n] = engine.stats | {"seconds": time.perf_counter()}
        if n == timed:
            profiler.__enter__()
        if n == profiled:
            profiler.__exit__(None, None, None)

    with bench.Peak(card.device) as peak:
        search_until(engine, before_step, profiled)
    done = {name: marks[timed][name] - marks[warm][name] for name in marks[warm]}
    held = engine.cache.nbytes + engine.store.stored
    need(held <= card.kv_budget, f"{held} bytes of KV, but kv_budget is {card.kv_budget}")
    found = {"tokens/s": done["sampled"] / done["seconds"],
             "ms a step": 1000 * done["seconds"] / done["forwards"], "GiB of KV": held / 2**30,
             "GiB of kv_budget": card.kv_budget / 2**30, "peak GiB above the weights": peak.gib}
    found |= shares_of_card(card, engine.model, done, columns)
    found |= profiled_steps(profiler, profiled - timed)
    if card.is_gpu:
        found["GPU works"] = found["GPU ms a step"] / found["ms a step"]
    live = {draft.job.order[:2]: draft.job.path for draft in engine.schedule.drafts}
    return found, [[token for _, tokens in path for token in tokens] for path in live.values()]


def shares_of_card(card, model, done, columns):
    """Least traffic and work of these steps, as shares of what the card was measured to do."""
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    kv = sum(heads * width for layer in model.served.layers for heads, width in layer)      # numbers a column
    moved = (weights * done["forwards"] + kv * columns) * model.dtype.itemsize
    flops = 2 * weights * (done["sampled"] + done["prefilled"])
    copy_rate, matrix_rate = card.rates
    return {"TB/s": moved / done["seconds"] / 1e12, "of the copy rate": moved / done["seconds"] / copy_rate,
            "TFLOP/s": flops / done["seconds"] / 1e12,
            "of the matrix rate": flops / done["seconds"] / matrix_rate}


def profiled_steps(profiler, steps):
    events = profiler.key_averages()
    launches = sum(event.count for event in events if "LaunchKernel" in event.key)
    busy = sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA)
    return {"launches a step": launches / steps, "GPU ms a step": busy / 1000 / steps}


def time_generate(card, paths):
    """Useful tokens/s of `generate` on 16 leaves at once: all samples wait for the longest step."""
    model, tokenizer = card.whole
    ending = start_search(card, 2).ending
    with bench.Peak(card.device) as peak:
        bench.by_generate(model, tokenizer, ending, paths, card.breadth, card.longest_step)
    return len(paths) * card.breadth * 40 / peak.seconds


def time_continuous_batching(card, paths):
    """Tokens/s of transformers' own engine with paged attention; None where it does not run."""
    model, _ = card.whole
    try:
        with bench.Peak(card.device) as peak:
            bench.by_continuous_batching(model, paths, card.breadth, 40)
        return len(paths) * card.breadth * 40 / peak.seconds
    except Exception as error:                  # whatever of it is missing here
        print(f"  continuous batching does not run: {mcts.reason(error)}")
        return None
    finally:
        model.set_attn_implementation("sdpa")   # it takes another


def goal(number, least):
    return f"{number:.2f}, {'the goal is met' if number >= least else 'BELOW the goal'} ({least})"


def search_speed(card):
    """Search against the card's own rates, `generate` and continuous batching; KV stays within its budget."""
    found, paths = {}, {}
    for slots in card.slots:
        measured, paths[slots] = time_search(card, slots)
        found |= {f"{name}, {slots} slots": number for name, number in measured.items()}
    first = card.slots[0]
    ours = found[f"tokens/s, {first} slots"]
    found["goal: roofline"] = goal(found[f"of the copy rate, {first} slots"], 0.6)
    draw = random.Random(0)
    few = draw.sample(paths[first], min(16, len(paths[first])))
    found["goal: times generate"] = goal(ours / time_generate(card, few), 3)
    peer = time_continuous_batching(card, paths[card.slots[-1]]) if card.is_gpu else None
    if peer:
        most = found[f"tokens/s, {card.slots[-1]} slots"]
        found["goal: times continuous batching"] = goal(most / peer, 1)
    return as_measured(card, found)


def as_measured(card, found):
    """What was found, on a GPU; elsewhere it has run, and no more."""
    if not card.is_gpu:
        raise NotChecked("it runs, but its figures would be those of a CPU")
    return found


def worst_evaluation(card):
    """Responses that never end, as many as an evaluation draws at once, stay within the card's memory."""
    model, tokenizer = card.whole
    prompts = [[*range(3, 3 + card.prompt_tokens)]] * card.prompts
    with bench.Peak(card.device) as peak:
        responses = mcts.sample(model, tokenizer, prompts, n=3, max_new_tokens=card.response_tokens,
                                format=mcts.Format(marker="what chance never writes"))
    lengths = {len(response.tokens) for of_prompt in responses for response in of_prompt}
    need(lengths == {card.response_tokens}, f"responses have {lengths} tokens")
    tokens = 3 * card.prompts * card.response_tokens
    found = {"tokens/s": tokens / peak.seconds, "GiB above the weights": peak.gib}
    if card.is_gpu:
        found["GiB reserved"] = torch.cuda.max_memory_reserved(card.device) / 2**30
        found["GiB of the card"] = torch.cuda.mem_get_info(card.device)[1] / 2**30
    return as_measured(card, found)


# ---------------------------------------------------------------- what is fast: training


def random_tree(card, seed):
    """A question's tree of 8 solutions of 8 steps, which part in the first three."""
    draw = random.Random(seed)
    vocabulary = bench.SHAPES[card.shape]["vocab_size"]

    def some(n):
        return [draw.randrange(vocabulary) for _ in range(n)]

    tree = mcts.Tree(f"question {seed}", "", some(card.prompt_tokens))
    level = [0]
    for depth in range(1, 9):
        parents = sorted(level * 2) if depth <= 3 else level
        level = [tree.add(mcts.Node(parent, some(card.step_tokens), visits=1)) for parent in parents]
    for n, i in enumerate(level):
        tree.nodes[i].reward = (-1) ** n
        tree.nodes[i].terminal = True
    return tree


def leaves(tree):
    return [tree.path(i) for i, node in enumerate(tree.nodes) if node.terminal]


@contextlib.contextmanager
def sharded_policy(card):
    """A policy of the shape with few layers, its weights in float32, as a run on this device holds it."""
    dvo.start_ranks(str(card.device), "bfloat16")
    try:
        with torch.device("meta"):
            sizes = bench.SHAPES[card.shape] | {"num_hidden_layers": card.train_layers}
            lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="sdpa"))
        policy = dvo.Policy(lm.eval(), torch.bfloat16, card.device)
        dvo.shard(policy, policy)
        for weight in policy.parameters():
            torch.nn.init.normal_(weight.to_local(), std=0.02)
        frequencies = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(lm.config).inv_freq
        for buffer in policy.buffers():
            buffer.copy_(frequencies)
        yield policy
    finally:
        dist.destroy_process_group()


def packed_steps(card, policy, trees):
    """Three optimiser steps of a run: tokens of packs a second in the last."""
    examples = [dvo.make_example(tree) for tree in trees]
    loss_fn = functools.partial(dvo.objective_loss, "dvo")
    logged = []
    dvo.train([dvo.Learner(policy, 1e-6)], examples, loss_fn, [[*range(len(examples))]] * 3,
              micro_tokens=4096, log=lambda **fields: logged.append(fields))
    need(all(np.isfinite(fields["loss"]) and not fields["skipped"] for fields in logged), f"{logged}")
    return logged[-1]["tokens_per_second"]


def padded_seconds(card, policy, trees):
    """Forward and backward of one padded row a path, full logits: as other trainers do."""

    def loss_of(steps):
        errors = [(0.1 * step).square() for row in steps for step in row]
        return sum(errors) / len(errors)

    with bench.Peak(card.device) as peak:
        for tree in trees:
            bench.padded_step(policy, tree, leaves(tree), loss_of).backward()
    return peak.seconds, peak.gib


def training_speed(card):
    """A training step's tokens/s, share of the matrix rate and memory, beside rows padded."""
    card.__dict__.pop("whole", None)            # its memory is needed
    number = 2 if card.shape == "tiny" else 16
    trees = [random_tree(card, seed) for seed in range(number)]
    copy_rate, matrix_rate = card.rates
    with sharded_policy(card) as policy:
        with bench.Peak(card.device) as peak:
            rate = packed_steps(card, policy, trees)
        policy.zero_grad()
        padded, padded_gib = padded_seconds(card, policy, trees[:4])
        weights = sum(p.numel() for name, p in policy.named_parameters() if "embed_tokens" not in name)
    packed_tokens = sum(len(dvo.pack(tree, leaves(tree)).tokens) for tree in trees)
    seconds = packed_tokens / rate
    ratio = padded / 4 * number / seconds
    return as_measured(card, {
        "tokens/s": rate, "s a step": seconds, "MFU": 6 * weights * rate / matrix_rate, "peak GiB": peak.gib,
        "padded rows, s": padded / 4 * number, "padded rows, GiB above weights": padded_gib,
        "goal: times padded rows": goal(ratio, 1)})


# ---------------------------------------------------------------- the rest


def many_gpus(card):
    """NCCL between several GPUs."""
    raise NotChecked("needs several GPUs (test_ranks.py runs 2 and 4 ranks by gloo)")


def several_machines(card):
    """NCCL between machines."""
    raise NotChecked("needs several machines (test_ranks.py runs two by gloo on one)")


def a_model_that_learns(card):
    """That a real model gains."""
    raise NotChecked("needs weights and hours: python dvo.py --model M")


CHECKS = [environment, search_in_float64, search_in_float32, search_in_bfloat16, objectives, unlikely_rows,
          kernels, one_rank_runs, waits, search_speed, worst_evaluation, training_speed, many_gpus,
          several_machines, a_model_that_learns]


def listed(found):
    """What a check found, in a line."""
    if isinstance(found, str):
        return found
    return "; ".join(f"{name} {n:.4g}" if isinstance(n, float) else f"{name} {n}"
                     for name, n in found.items())


def run(check, card):
    """(verdict, what was found) of one check."""
    try:
        return "PASS", check(card)
    except NotChecked as reason:
        return "NOT CHECKED", str(reason)
    except Exception:
        return "FAIL", traceback.format_exc()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default: the first GPU, else the CPU, which needs --tiny")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape instead of Llama 3 8B's")
    parser.add_argument("--out", type=Path, help="file for all figures, JSON")
    args = parser.parse_args(arguments)
    card = Card(args.device, args.tiny)
    if not (card.is_gpu or args.tiny):
        raise tasks.InputError("there is no GPU here: give --device cpu --tiny")
    results = []
    for check in CHECKS:
        if card.is_gpu:
            gc.collect()                        # what an earlier one held
        start = time.time()
        verdict, found = run(check, card)
        seconds = round(time.time() - start, 1)
        title = check.__name__.replace("_", " ")
        print(f"{verdict:11} {title}: {listed(found)} ({seconds} s)", flush=True)
        results.append({"check": title, "proves": check.__doc__, "verdict": verdict, "found": found,
                        "seconds": seconds})
        if verdict == "FAIL":
            break
    if args.out:
        args.out.write_text(json.dumps(results, indent=1, default=str) + "\n")
    sys.exit(verdict == "FAIL")


if __name__ == "__main__":
    tasks.run_command(main)
