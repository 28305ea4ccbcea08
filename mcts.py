"""Tree search over reasoning steps: the first half of Direct Value Optimization (arXiv 2502.13723, Sec. 4.2).

    python mcts.py --model M --data questions.jsonl --out trees.jsonl     # search, one tree a line
    python mcts.py --show trees.jsonl                                     # draw trees in the terminal

A *step* is the text up to a blank line; a node of the tree is one step; the search repeats

    select   walk down from the root by PUCT                        Q + c * prior * sqrt(N(s)) / (1 + N(s'))
    expand   sample `breadth` next steps from the policy
    backup   N and V of every ancestor of a step that ended         V = mean outcome: +1 right, -1 wrong

The file reads in that order: the prompt, the Tree, the four lines of the algorithm (`grow`), then the
sampling engine below it, which is where the time goes. The engine keeps as many samples in flight as `slots`
leaves have, each leaf of another tree. All of them go through the model as ONE row of N tokens; the KV of a
path is stored once and shared by the siblings sampled from it, which are one token until they differ; as
samples finish, the next leaf takes their place.

What the paper leaves open is settled in the docstrings of `grow`, `expand` and `StepSplitter`.
"""
import argparse
import hashlib
import heapq
import json
import math
import os
import sys
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, cycle, groupby, takewhile

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

logging.disable_progress_bar()                  # of transformers' loading; a search shows its own

MARKER = "Final Answer:"
INSTRUCTION = f"""\
Solve the problem step by step. Write one short reasoning step, then a blank line, then the next step. \
Finish with a last step that holds only "{MARKER}" and the answer; if the problem offers lettered options, \
answer with the letter."""
PLAIN = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)      # how tokens become text


class InputError(ValueError):
    """Something the user can put right, told in one sentence: commands print it and exit with status 2."""


# ---------------------------------------------------------------- model and prompt


def pick_device(name=None):
    """`name` as a torch.device; by default the first GPU, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_model(name, device=None, dtype=None):
    """A causal LM and its tokenizer from a Hugging Face folder or hub name: safetensors only, no remote code.

    `dtype` is a name, by default "bfloat16" on a GPU, else "float32". On the device "meta" no weights are
    read. Raises InputError if there is no such model.
    """
    device = pick_device(device)
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    how = dict(dtype=getattr(torch, dtype), attn_implementation="sdpa")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if device.type == "meta":
            with device:
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), **how)
            model.generation_config = GenerationConfig.from_pretrained(name)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **how)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"no causal language model could be loaded from {name!r} ({reason}); "
                         "give a folder written by save_pretrained, or a hub name and a network") from None
    return model.to(device).eval(), tokenizer


def build_prompt(tokenizer, question, examples=()):
    """Token ids that ask `question`, after worked `examples` (question, solution) if any (App. B): by the
    tokenizer's chat template if it has one, else as plain text."""
    if tokenizer.chat_template is None:
        shown = "".join(f"Problem: {q}\n\nSolution:\n\n{solution}\n\n\n" for q, solution in examples)
        return tokenizer(f"{INSTRUCTION}\n\n{shown}Problem: {question}\n\nSolution:\n\n").input_ids
    texts = [*chain(*examples), question]
    turns = [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), texts)]
    how = dict(add_generation_prompt=True, tokenize=False)
    try:
        text = tokenizer.apply_chat_template([{"role": "system", "content": INSTRUCTION}, *turns], **how)
    except Exception:  # some templates (Gemma's) refuse a system turn: say it all in the first user turn
        turns[0]["content"] = f"{INSTRUCTION}\n\n{turns[0]['content']}"
        text = tokenizer.apply_chat_template(turns, **how)
    return tokenizer(text, add_special_tokens=False).input_ids


def fingerprint(tokenizer):
    """8 hex digits that tell tokenizers apart, by vocabulary and chat template."""
    text = json.dumps([tokenizer.get_vocab(), tokenizer.chat_template], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def context_length(model):
    """Tokens a sequence may have. A sliding window or a chunk is a limit too: within it, it hides nothing."""
    names = "max_position_embeddings", "sliding_window", "attention_chunk_size"
    return min(filter(None, (getattr(model.config, name, None) for name in names)), default=sys.maxsize)


# ---------------------------------------------------------------- the tree


@dataclass(slots=True)
class Node:
    """One step a_t taken in state s_t, and the state s_{t+1} it leads to. Node 0, the root, holds no step."""
    parent: int               # index of the node of s_t, -1 at the root
    tokens: list              # the step, with the token that completed its blank line or the EOS
    logprob: float = 0.0      # log pi(a|s), summed over the step's tokens, at temperature 1
    visits: int = 0           # N: outcomes backed up through this node
    value: float = 0.0        # V in [-1, 1]: their mean; 0 while there is none
    reward: int = 0           # r: 0 inside the tree, +1 or -1 on a terminal step
    terminal: bool = False
    valid: bool = True        # False: a failure of form (cut, too deep, no answer); never a training path
    text: str = ""            # for people; derived from tokens, never tokenised again
    children: list = field(default_factory=list, repr=False)   # indices
    depth: int = 0            # steps from the root
    exhausted: bool = False   # every path below has ended

    @property
    def prior(self):
        """pi(a|s) of PUCT in (0, 1]: exp of the mean token log-prob."""
        return math.exp(self.logprob / max(1, len(self.tokens)))


STORED = ("parent", "tokens", "logprob", "visits", "value", "reward", "terminal", "valid", "text")


@dataclass
class Tree:
    """All that a search learnt about one question. Parents come before children in `nodes`."""
    question: str
    answer: str
    prompt: list              # token ids
    config: dict = field(default_factory=dict)
    nodes: list = field(default_factory=lambda: [Node(parent=-1, tokens=[])])

    def add(self, node):
        """Append `node` below its parent and return its index."""
        parent, index = self.nodes[node.parent], len(self.nodes)
        node.depth = parent.depth + 1
        parent.children.append(index)
        self.nodes.append(node)
        return index

    def path(self, i):
        """Indices of the nodes from the first step down to node i; empty for the root."""
        nodes = []
        while i > 0:
            nodes.append(i)
            i = self.nodes[i].parent
        return nodes[::-1]

    def credit(self, i):
        """r + V(s') - V(s) in [-2, 2], the DVO target of step i (Eq. 10). V of an ended state is 0 here, so a
        terminal step has credit r - V(s), and the credits along a path sum to r - V(s_0)."""
        node = self.nodes[i]
        after = node.reward if node.terminal else node.value
        return after - self.nodes[node.parent].value

    def to_json(self):
        nodes = [{name: getattr(node, name) for name in STORED} for node in self.nodes]
        return json.dumps({"question": self.question, "answer": self.answer, "prompt": self.prompt,
                           "config": self.config, "nodes": nodes}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line):
        data = json.loads(line)
        root, *rest = [Node(**{name: node[name] for name in STORED}) for node in data["nodes"]]
        tree = cls(data["question"], data["answer"], data["prompt"], data["config"], [root])
        for node in rest:
            if not 0 <= node.parent < len(tree.nodes):
                raise ValueError("a parent must come before its children")
            tree.add(node)
        return tree


def read_trees(path):
    """The trees of a JSON Lines file, one at a time. Raises InputError naming the line that is not a tree."""
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield Tree.from_json(line)
                except (ValueError, KeyError, TypeError, IndexError):
                    raise InputError(f"{path}, line {number}: not a search tree; search that question again, "
                                     "or delete the line") from None
    except OSError as error:
        raise InputError(f"cannot read trees from {path}: {error.strerror}") from None


# ---------------------------------------------------------------- the search of one tree


def grow(tree, reward_fn, response_text, *, iterations, breadth, depth, c_puct):
    """Search one tree (Sec. 4.2). A coroutine: yields the leaf to expand, is sent the Samples drawn there.

    Left open by the paper, settled here: a terminal node is never selected again (visiting it twice would
    pull V from the policy's mean towards the maximum), each new terminal is backed up once, when it is
    created, there are no rollouts, and the search ends early once every path has ended.
    """
    for _ in range(iterations):
        leaf = select(tree, c_puct)
        if leaf is None:
            return
        samples = yield leaf
        for child in expand(tree, leaf, samples, reward_fn, response_text, breadth, depth):
            if tree.nodes[child].terminal:
                backup(tree, child)


def select(tree, c_puct):
    """The leaf that PUCT reaches from the root, None if every path has ended. Ties go to the larger prior."""
    nodes, i = tree.nodes, 0
    if nodes[0].exhausted:
        return None
    while nodes[i].children:
        explore = c_puct * math.sqrt(nodes[i].visits)
        score = lambda j: nodes[j].value + explore * nodes[j].prior / (1 + nodes[j].visits)     # Q + U
        choices = [j for j in nodes[i].children if not (nodes[j].terminal or nodes[j].exhausted)]
        i = max(choices, key=lambda j: (score(j), nodes[j].prior))
    return i


def expand(tree, leaf, samples, reward_fn, response_text, breadth, depth):
    """Add the sampled steps below `leaf` and return the indices of the new nodes.

    Samples of the same text and ending are one action. Of those, the `breadth` most probable stay, in the
    order in which they were drawn. A step that neither ends the solution nor may go on (cut by a limit, or at
    full depth), and a wrong solution without a final answer, are failures of the policy: outcome -1, counted
    in V, but not `valid` training paths.
    """
    actions = {}
    for s in samples:
        actions.setdefault((s.text, s.end), s)
    likeliest = sorted(actions, key=lambda a: -actions[a].logprob)[:breadth]
    children = []
    for s in (actions[a] for a in actions if a in likeliest):
        node = Node(leaf, s.tokens, round(s.logprob, 9), text=s.text)   # more digits depend on the batch
        children.append(tree.add(node))
        node.terminal = s.end != "step" or node.depth >= depth
        if s.end in ("answer", "eos"):
            text = response_text([t for j in tree.path(children[-1]) for t in tree.nodes[j].tokens])
            node.reward = reward_fn(text, tree.answer)
            node.valid = node.reward > 0 or MARKER in text
        elif node.terminal:
            node.reward, node.valid = -1, False
    close(tree, leaf)
    return children


def close(tree, i):
    """Mark node i exhausted if every child has ended or is exhausted itself, and so on upwards."""
    nodes = tree.nodes
    while i >= 0 and all(nodes[j].terminal or nodes[j].exhausted for j in nodes[i].children):
        nodes[i].exhausted = True
        i = nodes[i].parent


def backup(tree, i):
    """Count the outcome of terminal node i in N and V of every node on its path, from itself to the root."""
    outcome = tree.nodes[i].reward
    while i >= 0:
        node = tree.nodes[i]
        node.visits += 1
        node.value += (outcome - node.value) / node.visits      # so V = sum_a N(s')(r + V(s')) / sum_a N(s')
        i = node.parent


# ---------------------------------------------------------------- where a step ends


class StepSplitter:
    """Tells where sampled steps end from token ids alone: decoding text would slow the sampling loop.

    A step ends at the first token after which its text holds a blank line, as in `a\\n\\n`; a BPE merges that
    with its neighbours (`.\\n\\n`) or splits it (`\\n` then `\\n`), so each vocabulary entry is decoded once
    and asked what it does to the text so far. A blank line before any other text does not end a step. Any
    EOS of the model does.
    """

    def __init__(self, model, tokenizer, size, device):
        texts = tokenizer.batch_decode([[i] for i in range(min(len(tokenizer), size))], **PLAIN)
        texts += [""] * (size - len(texts))                         # logits can be wider than the tokenizer
        flags = torch.tensor([(bool(t.strip()), "\n\n" in t, "\n\n" in t.lstrip(),
                               t.startswith("\n"), t.endswith("\n"), not t) for t in texts], device=device)
        self.word, self.blank, self.ends_alone, self.starts, self.ends, self.empty = flags.T
        eos = getattr(model.generation_config, "eos_token_id", None)
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos = torch.zeros(size, dtype=torch.bool, device=device)
        self.eos[[] if eos is None else eos] = True

    def __call__(self, token, started, newline):
        """All (N,): the new token; whether its step held text before; whether that ended in a newline.
        Returns whether the step ends by a blank line, and started and newline after the token."""
        blank = self.ends_alone[token] | started & (self.blank[token] | newline & self.starts[token])
        return blank, started | self.word[token], self.ends[token] | newline & self.empty[token]


def unanswered(text):
    """Whether the last `Final Answer:` of `text` still waits for its answer.

    >>> unanswered("Final Answer:\\n\\n"), unanswered("Final Answer: 4\\n\\n"), unanswered("so 4\\n\\n")
    (True, False, False)
    """
    _, marker, tail = text.rpartition(MARKER)
    return bool(marker) and not tail.strip("* \t\r\n")


# ---------------------------------------------------------------- random numbers by key


def hash_tokens(key, tokens):
    """128-bit key of a path: of its parent's key and its last step."""
    return hashlib.blake2b(key + np.asarray(tokens, dtype="<i8").tobytes(), digest_size=16).digest()


def draw_keys(key, length, n):
    """(n, length, 2) int32 random words for n samples after a path: a longer length only adds words."""
    words = np.random.Philox(key=np.frombuffer(key, dtype="<u8")).random_raw(length * n)
    return torch.from_numpy(words.view(np.int32)).view(length, n, 2).transpose(0, 1)


def mix(x):
    """A bijection of int32 that spreads every bit (shift and multiply, as in Murmur3), in place."""
    x ^= (x >> 15) & 0x1FFFF
    x *= -2048144789
    x ^= (x >> 13) & 0x7FFFF
    return x


def pick(logits, rows, keys, token_hash, temperature):
    """Draw one token a sample by Gumbel-max, with noise that depends on (key, token id) alone.

    logits (R, V), rows (N,) of the samples, keys (N, 2) int32, token_hash (V,) int32 -> tokens (N,) and their
    log-probs at temperature 1 (N,). Logits computed in another batch differ in the last bits; noise keyed per
    token id makes a different winner as unlikely as can be (an inverse CDF would shift every boundary at
    once).
    """
    tokens, logprobs = [], []
    some = max(1, 2**18 // logits.shape[1]) if logits.device.type == "cpu" else len(rows)   # fit its cache
    for row, key in zip(rows.split(some), keys.split(some)):
        row = logits[row]
        row = row if row.dtype == torch.float64 else row.float()
        row = row - row.amax(-1, keepdim=True)
        weights = row.exp()                                     # of the tokens at temperature 1
        total = weights.sum(-1)
        if temperature == 0:
            token = row.argmax(-1, keepdim=True)
        else:
            a, b = key[:, :1], key[:, 1:] | 1
            bits = mix((token_hash ^ a).mul_(b)).bitwise_right_shift_(9).bitwise_and_(0x7FFFFF)
            log_u = bits.to(row.dtype).add_(0.5).mul_(2.0**-23).log_()      # of 23 bits: exact, u in (0, 1)
            weights = weights if temperature == 1 else (row / temperature).exp_()
            token = torch.div(weights, log_u, out=log_u).argmin(-1, keepdim=True)  # largest log p + Gumbel
        tokens.append(token[:, 0])
        logprobs.append(row.gather(1, token)[:, 0] - total.log())
    return torch.cat(tokens), torch.cat(logprobs)


# ---------------------------------------------------------------- the engine: slots, and jobs through them


def attend(module, query, key, value, mask, scaling, through=None, softcap=None, s_aux=None, **_):
    """The attention that transformers calls while the engine runs: `through` a function of q, k and v."""
    if softcap is not None or s_aux is not None:
        raise ValueError("it has a soft cap or sinks, which shared attention lacks")
    q, k, v = query[0], key[0], value[0]                            # (Hq, N, D), (H, N, D), (H, N, D)
    return through(module.layer_idx, q, k, v, scaling)[None], None              # (1, N, Hq, D)


AttentionInterface.register("dvo_slots", attend)


torch_linear = F.linear
ONEDNN = torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability()
LARGE = 2**16 if ONEDNN else math.inf


def pack_weights(model, memory):
    """{weight: the same in the layout of oneDNN's kernels}, of the float32 linear layers of `model` on an x86
    CPU that have LARGE weights or more, while `memory` bytes last. They multiply 76 rows 1.2 to 1.3 times
    faster than as torch does, 5 rows twice as fast."""
    packed = {}
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight.numel() >= LARGE:
            weight = layer.weight.detach()
            kind = type(weight), weight.device.type, weight.dtype   # not a shard
            if kind == (torch.Tensor, "cpu", torch.float32) and weight.nbytes <= memory:
                memory -= weight.nbytes
                packed[layer.weight] = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def multiply(packed, x, weight, bias=None):
    """F.linear, by `packed` weights where it has them and no gradient is wanted."""
    if weight not in packed or torch.is_grad_enabled():
        return torch_linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed[weight], bias, "none", [], "")


class Slots:
    """Keys and values of S slots. A slot holds a path and then, in any order, what up to 15 samples after it
    added: per layer, kv (2, S, H, C, D). Bit g of seen (S, C) says that sample g attends to a column; 0, that
    it is free."""
    PATH = -1               # all bits
    RAGGED = 256            # from this width of all heads on, more calls that skip what is empty suit a CPU

    def __init__(self, S):
        self.kv, self.groups, self.ragged = [], 0, False        # of the model, known with the first prefill
        self.seen, self.used = np.zeros((S, 0), dtype=np.int16), np.zeros(S, dtype=np.int64)

    def reserve(self, size):
        columns = self.seen.shape[1]
        if size > columns:                                          # by a quarter at least: growing is a copy
            short = -(-max(size, 256, columns * 5 // 4) // 64) * 64 - columns
            self.seen = np.pad(self.seen, ((0, 0), (0, short)))
            for layer, buffer in enumerate(self.kv):                # a layer at a time keeps the peak low
                self.kv[layer] = F.pad(buffer, (0, 0, 0, short))

    def clear(self, s, size):
        """Make room in slot s for a path of `size` tokens."""
        self.reserve(size)
        self.seen[s], self.used[s] = 0, size
        self.seen[s, :size] = self.PATH

    def release(self, s, sample):
        """Free what only `sample` attends to in slot s."""
        self.seen[s, self.seen[s] != self.PATH] &= ~(1 << sample)

    def take(self, s, columns):
        """A copy (L, 2, H, T, D) of columns of slot s."""
        return torch.stack([buffer[:, s][:, :, columns] for buffer in self.kv])

    def prefill(self, s, start, layer, q, k, v, scaling):
        """Attention of T new tokens of a path to themselves and the columns of slot s before `start`; their
        keys and values follow there."""
        if layer == len(self.kv):
            S, C = self.seen.shape
            self.groups = len(q) // len(k)                          # query heads that share a key head
            self.ragged = q.device.type == "cpu" and len(q) * q.shape[-1] >= self.RAGGED
            self.kv.append(k.new_zeros(2, S, len(k), C, k.shape[-1]))
        kv = self.kv[layer][:, s, :, :start + k.shape[1]]           # (2, H, start + T, D)
        kv[:, :, start:] = torch.stack((k, v))
        mask = q.new_ones(q.shape[1], kv.shape[2], dtype=torch.bool).tril(start) if start else None
        out = F.scaled_dot_product_attention(q[None], kv[None, 0], kv[None, 1], mask, is_causal=not start,
                                             scale=scaling, enable_gqa=True)
        return out[0].transpose(0, 1)                               # (T, Hq, D)

    def focus(self, slot, who):
        """Give each row of the coming `decode`, (N,) of numpy and sorted by slot, a free column there. who:
        the samples that share the row, as bits. Returns the columns (N,)."""
        place = np.arange(len(slot)) - np.searchsorted(slot, slot)          # of a row within its slot
        rows = np.bincount(slot, minlength=len(self.used))
        self.reserve((self.used + rows).max())
        column = np.concatenate([np.flatnonzero(self.seen[s] == 0)[:n] for s, n in enumerate(rows) if n])
        self.seen[slot, column] = who
        np.maximum.at(self.used, slot, column + 1)
        S, R = slot.max() + 1, rows.max()
        C = -(-self.used[:S].max() // 16) * 16
        bits = np.full((S, R, 1), self.PATH, dtype=np.int16)
        bits[slot, place, 0] = who
        move = lambda array: torch.from_numpy(array).to(self.kv[0].device)
        hidden = move(self.seen[:S, None, :C]) & move(bits) == 0
        mask = self.kv[0].new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        mask = mask.repeat_interleave(self.groups, 1)[:, None]              # (S, 1, R * groups, C)
        alike = (lambda s: (rows[s], self.used[s] // 128)) if self.ragged else (lambda s: R)
        self.parts = []         # neighbours of as many rows and about one length: slots, rows, columns, mask
        for _, part in groupby(range(S), alike):
            part = [*part]
            if n := rows[part].max() * self.groups:
                c, part = self.used[part].max() if self.ragged else C, slice(part[0], part[-1] + 1)
                self.parts.append((part, n, c, mask[part, :, :n, :c]))
        H, capacity = self.kv[0].shape[2:4]
        head = slot[:, None] * H + np.arange(H)                             # (N, H)
        query = (head * R + place[:, None])[..., None] * self.groups + np.arange(self.groups)
        self.at = move((head * capacity + column[:, None]).flatten())       # where new keys go in (S, H, C)
        self.grid, self.queries = (S, H, R * self.groups), move(query.flatten())    # and queries in this grid
        return column

    def decode(self, layer, q, k, v, scaling):
        """Attention of one new token a row to its slot's path and to what its own samples added."""
        flat = lambda x: x.transpose(0, 1).reshape(-1, x.shape[-1])         # (H, N, D) -> (N * H, D)
        keys, values = self.kv[layer]                                       # (S, H, C, D)
        keys.view(-1, k.shape[-1]).index_copy_(0, self.at, flat(k))
        values.view(-1, k.shape[-1]).index_copy_(0, self.at, flat(v))
        grid = q.new_empty(*self.grid, q.shape[-1])                         # (S, H, R * groups, D)
        grid.view(-1, k.shape[-1]).index_copy_(0, self.queries, flat(q))
        out = torch.empty_like(grid)
        for part, n, c, mask in self.parts:
            out[part, :, :n] = F.scaled_dot_product_attention(
                grid[part, :, :n], keys[part, :, :c], values[part, :, :c], mask, scale=scaling)
        return out.flatten(0, 2)[self.queries].unflatten(0, (-1, len(q)))   # (N, Hq, D)


@dataclass
class Sample:
    """Tokens drawn after a path. `end`: "step" (blank line), "answer" (blank line after a final answer),
    "eos", or "cut" (by the token limit or the context length)."""
    tokens: list
    logprobs: list            # one a token, at temperature 1
    text: str
    end: str

    @property
    def logprob(self):
        return sum(self.logprobs)


@dataclass
class Job:
    """A path to draw samples after: (key, tokens) of the prompt and of each step down to the leaf."""
    path: list
    keys: set = field(default_factory=set)   # of all KV stored for the owner, for `forget`
    turn: int = 0             # the lowest goes first
    owner: object = None
    samples: list = None      # the result


class Engine:
    """Draws `siblings` samples for each of many jobs: `submit` jobs; every `step` returns those that ended.

    slots: the samples of so many jobs fill a forward; in half as many spare slots, further jobs take over the
    rows of samples that finish. (A job of more than SHARE siblings takes several slots of the cache.)
    whole: a sample ends with the response instead of at the first blank line, and its KV is not kept.
    opening: token ids with which many prompts begin; their KV outlives the trees.
    kv_budget: bytes of stored KV; what was never used goes first, then the least recently used. It is
    computed again when needed.
    stats counts decode forwards, their rows, and tokens: prefilled, reused (prefixes found in the store) and
    sampled.
    The model's weights must stay as they are while the engine lives. Raises InputError for a model that it
    cannot serve.
    """
    SHARE = 8               # siblings in a slot of the cache: the attention of each runs over what all added

    def __init__(self, model, tokenizer, *, slots, siblings, max_tokens, temperature=1.0, whole=False,
                 opening=(), kv_budget=None):
        self.model, self.device, self.decode = model, model.device, partial(tokenizer.decode, **PLAIN)
        self.max_tokens, self.temperature, self.whole = max_tokens, temperature, whole
        self.opening = hash_tokens(b"", opening), list(opening)
        self.stats = dict(prefilled=0, reused=0, sampled=0, rows=0, forwards=0)
        self.store, self.stored = OrderedDict(), 0      # key -> KV (L, 2, H, T, D), oldest first; their bytes
        self.packed = pack_weights(model, 0.2 * free_memory(self.device))
        self.budget = kv_budget if kv_budget is not None else 0.4 * free_memory(self.device)
        self.waiting, self.submitted = [], 0    # heap of (turn, order of submission, first sibling, job)
        self.siblings, self.live, self.max_live = siblings, 0, slots * siblings         # samples
        parts = -(-siblings // self.SHARE)
        self.width = -(-siblings // parts)              # samples of a slot
        slots = parts * (slots if whole else slots + slots // 2)    # whole ones take too much KV
        # Of each slot: job (None: idle) and its first sibling there; start, length and limit of its samples.
        self.jobs = [None] * slots
        self.first, self.start, self.length, self.limit = np.zeros((4, slots), dtype=np.int64)
        self.cache = Slots(slots)
        vocabulary = self._check_model()
        self.splitter = StepSplitter(model, tokenizer, vocabulary, self.device)
        self.token_hash = mix(torch.arange(vocabulary, dtype=torch.int32, device=self.device) * -1640531535)
        zeros = lambda dtype, *shape: torch.zeros(slots, self.width, *shape, dtype=dtype, device=self.device)
        self.tokens = zeros(torch.long, max_tokens + 1)         # the last of the path, then those drawn
        self.logprobs = zeros(torch.float64, max_tokens)
        self.keys = zeros(torch.int32, max_tokens, 2)           # random words of every token to come
        self.started, self.newline = zeros(torch.bool), zeros(torch.bool)       # of StepSplitter
        self.columns = np.zeros((slots, self.width, max_tokens), dtype=np.int64)    # of the KV of `tokens`
        self.twin = np.zeros((slots, self.width), dtype=np.int64)   # the first sibling with the same tokens

    def _forward(self, tokens, positions, through, keep=0):
        """Logits (N, V) of one row of N tokens that attend `through` a method of Slots; of the last `keep` if
        given. The model's own attention and products are put back afterwards."""
        config, own = self.model.config, self.model.config._attn_implementation
        config._attn_implementation, F.linear = "dvo_slots", partial(multiply, self.packed)
        try:
            with torch.no_grad():
                return self.model(input_ids=torch.as_tensor(tokens, device=self.device)[None],
                                  position_ids=torch.as_tensor(positions, device=self.device)[None],
                                  use_cache=False, logits_to_keep=keep, through=through).logits[0]
        finally:
            config._attn_implementation, F.linear = own, torch_linear

    def _check_model(self):
        """Compare two prefills and a decode with the model's own forward, once, so that no model is served
        wrongly. Returns the width of the logits."""
        tokens = torch.tensor([1, 0, 1, 1, 0, 0, 1], device=self.device)
        with torch.no_grad():
            expected = self.model(input_ids=tokens[None], use_cache=False).logits[0, -1].float()
        try:
            self.cache.clear(0, 6)
            for start in 0, 3:
                self._forward(tokens[start:start + 3], range(start, start + 3),
                              partial(self.cache.prefill, 0, start), keep=1)
            self.cache.focus(np.array([0]), np.array([1]))
            logits = self._forward(tokens[6:], [6], self.cache.decode)[0]
            tolerance = 0.05 if logits.dtype.itemsize == 2 else 3e-4    # by norm: 128k logits have outliers
            if not (logits.float() - expected).norm() <= tolerance * (expected - expected.mean()).norm():
                raise ValueError("the logits differ: a soft cap, a bias or a state of its own")
        except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
            name = type(self.model).__name__
            raise InputError(f"the search cannot serve {name}: its attention cannot be replaced ({error}); "
                             "take a plain decoder such as Llama, Qwen or Mistral") from None
        return len(logits)

    def submit(self, job):
        """Let `job` wait for slots; its `samples` become the result."""
        job.samples = [None] * self.siblings
        for first in range(0, self.siblings, self.width):
            heapq.heappush(self.waiting, (job.turn, self.submitted, first, job))
        self.submitted += 1

    def step(self):
        """Admit jobs, draw one token for every live sample, and return the jobs that this completed."""
        for s, job in enumerate(self.jobs):
            if job is None and self.waiting and self.live + self.width <= self.max_live:
                self._admit(s, *heapq.heappop(self.waiting)[2:])
        if not self.live:
            return []
        slot, sibling = np.array([(s, g) for s, job in enumerate(self.jobs) if job
                                  for g, sample in enumerate(self._part(s)) if sample is None]).T
        # Siblings that have drawn the same tokens so far are one row of the forward.
        _, first, row = np.unique(slot * self.width + self.twin[slot, sibling], True, True)     # (R,), (N,)
        length = self.length[slot]
        s, g, t, position, row_of = torch.from_numpy(               # (N,) each
            np.stack((slot, sibling, length, self.start[slot] + length, row))).to(self.device)
        rows = torch.from_numpy(first).to(self.device)
        columns = self.cache.focus(slot[first], np.bincount(row, 1 << sibling).astype(np.int16))
        self.columns[slot, sibling, length] = columns[row]
        logits = self._forward(self.tokens[s, g, t][rows], position[rows], self.cache.decode)
        token, logprob = pick(logits, row_of, self.keys[s, g, t], self.token_hash, self.temperature)
        self.tokens[s, g, t + 1], self.logprobs[s, g, t] = token, logprob.double()
        blank, self.started[s, g], self.newline[s, g] = self.splitter(
            token, self.started[s, g], self.newline[s, g])
        event = blank + 2 * self.splitter.eos[token]
        token, event = torch.stack((token, event)).cpu().numpy()    # the only wait for the device
        _, first, row = np.unique(row * len(self.token_hash) + token, True, True)
        self.twin[slot, sibling] = sibling[first[row]]
        event = event + 4 * (length + 1 >= self.limit[slot])
        self.length[slot] = length + 1
        self.stats["forwards"] += 1
        self.stats["rows"] += len(rows)
        self.stats["sampled"] += len(slot)
        done = [self._end(slot[i], sibling[i], event[i]) for i in np.flatnonzero(event)]
        return [job for job in done if job]

    def _end(self, s, g, event):
        """End sample g of slot s if `event` (1 blank line, 2 EOS, 4 limit) does. Returns a completed job."""
        n, job = self.length[s], self.jobs[s]
        tokens = self.tokens[s, g, 1:n + 1].tolist()
        text = self.decode(tokens)
        blank = event & 1 and not unanswered(text)
        full = self.start[s] + 1 + n >= context_length(self.model)  # no room for another step
        end = ("eos" if event & 2 else "answer" if blank and MARKER in text else
               "step" if blank and not (self.whole or full) else "cut" if event & 4 else None)
        if end is None:
            return None
        job.samples[self.first[s] + g] = Sample(tokens, self.logprobs[s, g, :n].tolist(), text, end)
        self.live -= 1
        if end == "step":                                           # never used yet, it may be dropped first
            columns = torch.from_numpy(self.columns[s, g, :n]).to(self.device)
            self._keep(job, hash_tokens(job.path[-1][0], tokens), self.cache.take(s, columns), False)
        self.cache.release(s, g)
        if None not in self._part(s):
            self.jobs[s] = None
        return None if None in job.samples else job

    def _part(self, s):
        """The samples of the job in slot s that are drawn there."""
        return self.jobs[s].samples[self.first[s]:self.first[s] + self.width]

    def _admit(self, s, first, job):
        """Start the samples of `job` from `first` on in slot s: gather the KV of its path, compute the rest.

        The last token of the path is not part of that KV: it is the first input of every sibling. So a node's
        segment is the KV of the inputs that predicted its step (the last token of its parent and its own but
        the last), and the root needs no case of its own.
        """
        keys, steps = zip(*job.path)
        inputs = [*chain(*steps)]
        bounds = [max(0, end - 1) for end in accumulate(map(len, steps), initial=0)]    # of the segments
        cached = [self.store[key] for key in takewhile(self.store.__contains__, keys)]
        have, need = bounds[len(cached)], bounds[-1]
        self.stats["reused"] += have
        self.stats["prefilled"] += need - have
        self.cache.clear(s, need)
        for start, kv in zip(bounds, cached):
            for buffer, new in zip(self.cache.kv, kv):              # new (2, H, T, D) of a layer
                buffer[:, s, :, start:start + new.shape[2]] = new
        if have < need:
            self._forward(inputs[have:need], range(have, need), partial(self.cache.prefill, s, have), keep=1)
            for key, start, end in [*zip(keys, bounds, bounds[1:])][len(cached):]:
                self._keep(job, key, self.cache.take(s, slice(start, end)))
        for key in reversed(keys):              # the root last: so descendants are dropped before ancestors
            if key in self.store:
                self.store.move_to_end(key)
        draws = draw_keys(keys[-1], self.max_tokens, self.siblings)[first:first + self.width]
        self.keys[s, :len(draws)] = draws.to(self.device)
        self.tokens[s, :, 0], self.started[s], self.newline[s] = inputs[-1], False, False
        self.first[s], self.start[s], self.length[s], self.twin[s] = first, need, 0, 0
        self.limit[s] = min(self.max_tokens, context_length(self.model) - len(inputs))
        self.jobs[s] = job
        self.live += len(draws)

    def _keep(self, job, key, kv, last=True):
        """Store the KV of a step. Not `last`: it goes before all others if memory runs short."""
        if key != self.opening[0]:
            job.keys.add(key)
        if key not in self.store:
            self.store[key] = kv
            self.store.move_to_end(key, last)
            self.stored += kv.nbytes
        while self.stored > self.budget and self.store:
            self.stored -= self.store.popitem(last=False)[1].nbytes

    def forget(self, keys):
        """Drop the KV of `keys`: their tree is finished."""
        for key in keys & self.store.keys():
            self.stored -= self.store.pop(key).nbytes


def free_memory(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- what others call


def search(model, tokenizer, problems, reward_fn, *, iterations=80, breadth=5, depth=8, c_puct=1.5,
           candidates=None, seed=0, slots=None, max_step_tokens=256, kv_budget=None, progress=None):
    """Search one tree for each of `problems` (Sec. 4.2) and yield each finished Tree, in order of completion.

    model, tokenizer   a Hugging Face causal LM, on its device, and its tokenizer
    problems           dicts with `question` and `answer`; any iterable, read as trees finish
    reward_fn          (response text, answer) -> +1 or -1
    iterations         expansions a tree at most
    breadth            children kept at an expansion, of `candidates` sampled (default: as many)
    depth              steps a solution may have
    c_puct             weight of exploration in PUCT
    max_step_tokens    a step cut at this length is a failure
    slots              leaves whose samples fill a forward, see Engine (default: 16 on a CPU, else 64)
    kv_budget          bytes of stored keys and values (default: 40 % of the free memory)
    progress           called with the iterations completed; a tree that ends early counts its rest

    The same seed gives the same trees, whatever `slots` and `kv_budget`: random numbers belong to seed,
    question, path, sibling and position. (In float64; in float32 the rounding of another batch flips about
    one token in 10^7.) Raises InputError for settings out of range and for a model that cannot be served. A
    question that fills the model's context is skipped with a line on stderr.
    """
    candidates = breadth if candidates is None else candidates
    config = dict(iterations=iterations, breadth=breadth, depth=depth, c_puct=c_puct, candidates=candidates,
                  seed=seed, max_step_tokens=max_step_tokens, tokenizer=fingerprint(tokenizer))
    check_search(config | dict(slots=slots, kv_budget=kv_budget))
    slots = slots or (16 if model.device.type == "cpu" else 64)
    opening = os.path.commonprefix([build_prompt(tokenizer, question) for question in "A1"])
    engine = Engine(model, tokenizer, slots=slots, siblings=candidates, max_tokens=max_step_tokens,
                    opening=opening, kv_budget=kv_budget)
    return _search(engine, tokenizer, iter(problems), reward_fn, config, slots, progress or (lambda n: None))


def _search(engine, tokenizer, problems, reward_fn, config, slots, progress):
    limits = {name: config[name] for name in ("iterations", "breadth", "depth", "c_puct")}
    growing = 0                                                 # trees; twice the slots keep all of them busy

    def advance(job):
        """Give the tree of `job` the samples and submit its next leaf. Returns the tree if it is finished."""
        tree, growth, root = job.owner
        try:
            leaf = growth.send(job.samples)
        except StopIteration:
            engine.forget(job.keys)
            progress(config["iterations"] - job.turn + 1)
            return tree
        path = [*root]
        for i in tree.path(leaf):
            path.append((hash_tokens(path[-1][0], tree.nodes[i].tokens), tree.nodes[i].tokens))
        progress(job.samples is not None)
        engine.submit(Job(path, job.keys, job.turn + 1, job.owner))

    while True:
        while growing < 2 * slots and (problem := next(problems, None)):
            prompt = build_prompt(tokenizer, problem["question"])
            if root := begin(engine, prompt, config["seed"], problem["question"]):
                tree = Tree(problem["question"], problem["answer"], prompt, config)
                advance(Job(root, owner=(tree, grow(tree, reward_fn, engine.decode, **limits), root)))
                growing += 1
        if not growing:
            return
        for job in engine.step():
            if tree := advance(job):
                growing -= 1
                yield tree


def sample(model, tokenizer, prompts, *, n=1, temperature=1.0, max_new_tokens=1024, seed=0, slots=None,
           kv_budget=None, progress=None):
    """n full responses to each prompt (text or token ids), by the engine of the search: for each prompt a
    list of n Samples, empty if the prompt fills the model's context. A prompt given again draws other ones.

    A response ends by the rule of the search: EOS, a blank line after the final answer, or the token limit.
    No top-k, no top-p; temperature 0 takes the likeliest token. Log-probs are those at temperature 1.
    `progress` is called with 1 for each prompt completed, `slots` and `kv_budget` are those of Engine.
    """
    slots = max(1, (80 if model.device.type == "cpu" else 320) // max(1, n)) if slots is None else slots
    check_range(n=(n, 1), slots=(slots, 1), max_new_tokens=(max_new_tokens, 1), temperature=(temperature, 0))
    prompts = [tokenizer(p).input_ids if isinstance(p, str) else list(p) for p in prompts]
    engine = Engine(model, tokenizer, slots=slots, siblings=n, max_tokens=max_new_tokens,
                    temperature=temperature, whole=True, opening=os.path.commonprefix(prompts) or (),
                    kv_budget=kv_budget)
    responses, seen = [[] for _ in prompts], Counter()
    for i, prompt in enumerate(prompts):
        if path := begin(engine, prompt, seed, tokenizer.decode(prompt), seen[tuple(prompt)]):
            engine.submit(Job(path, owner=i))
        seen[tuple(prompt)] += 1
    left = engine.submitted
    while left:
        for job in engine.step():
            responses[job.owner] = job.samples
            engine.forget(job.keys)
            left -= 1
            if progress:
                progress(1)
    return responses


def check_search(settings):
    """Raise InputError for the first of the keyword arguments of `search` that is out of range."""
    least = dict(iterations=1, breadth=1, depth=1, max_step_tokens=1, slots=1, c_puct=0, kv_budget=0)
    least["candidates"] = settings["breadth"]
    check_range(**{name: (settings[name], value) for name, value in least.items()})


def check_range(**settings):
    """Raise InputError for the first of name=(value, least) that is too small; None stands for a default."""
    for name, (value, least) in settings.items():
        if value is not None and not value >= least:
            raise InputError(f"--{name.replace('_', '-')} is {value}, but must be at least {least:g}")


def begin(engine, prompt, seed, name, repeat=0):
    """The path of a root, see Job; None, with a line on stderr, if the prompt fills the model's context."""
    context, key = context_length(engine.model), (seed % 2**64).to_bytes(8, "little")
    if not 0 < len(prompt) < context:
        print(f"skipped: a prompt of {len(prompt)} tokens does not fit the model's context of {context}: "
              f"{name[:60]!r}...", file=sys.stderr)
        return None
    key, n = hash_tokens(hash_tokens(key, [repeat]) if repeat else key, prompt), len(engine.opening[1])
    if 0 < n < len(prompt) and prompt[:n] == engine.opening[1]:
        return [engine.opening, (key, prompt[n:])]
    return [(key, prompt)]


# ---------------------------------------------------------------- pictures and the command line


def paint(text, value):
    """`text` in red (value -1) to green (+1) on a terminal, plain elsewhere."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    green = round(2.5 * (max(-1.0, min(1.0, value)) + 1))           # 0 ... 5, the 6 x 6 x 6 colour cube
    return f"\033[38;5;{16 + 36 * (5 - green) + 6 * green}m{text}\033[0m"


def draw(tree, width=110, unvisited=False):
    """Lines that draw `tree`: on each edge the credit, on each node V, N and the step; + right, - wrong,
    x failed. Steps below which nothing ended (N = 0) are left out unless `unvisited`."""
    counts = lambda node: f"V {node.value:+.2f}  N {node.visits:<3}"
    root = tree.nodes[0]
    yield f"{paint(counts(root), root.value)} {tree.question} -> {tree.answer}"

    def below(i, indent):
        children = [j for j in tree.nodes[i].children if unvisited or tree.nodes[j].visits]
        for j in children:
            node, last = tree.nodes[j], j == children[-1]
            mark = " " if not node.terminal else "+" if node.reward > 0 else "-" if node.valid else "x"
            line = f"{indent}{'└─' if last else '├─'} {tree.credit(j):+.2f} ─ "
            head, text = f"{counts(node)} {mark} ", " ".join(node.text.split())
            room = width - len(line) - len(head)
            yield line + paint(head, node.value) + (text if len(text) <= room else text[:room - 1] + "…")
            yield from below(j, indent + ("   " if last else "│  "))

    yield from below(0, "")


def run_command(main):
    """Run a command's main(): InputError becomes one sentence on stderr and exit status 2."""
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                     # the reader of stdout, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_search_flags(parser):
    """The settings of `search`, with its defaults: the one place where they are written is its signature."""
    group = parser.add_argument_group("search (Sec. 4.2)")
    for flag, kind, text in (
            ("iterations", int, "expansions a tree at most; paper: 80"),
            ("breadth", int, "children kept at an expansion; paper: 5"),
            ("depth", int, "steps a solution may have; paper: 8"),
            ("c-puct", float, "weight of exploration in PUCT; the authors' code: 1.5"),
            ("candidates", int, "steps sampled at an expansion; the likeliest stay; default: as breadth"),
            ("max-step-tokens", int, "a step cut at this length is a failure"),
            ("slots", int, "leaves whose samples fill a forward; default: 16 on a CPU, 64 on a GPU"),
            ("kv-budget", float, "GiB of stored keys and values; default: 40%% of the free memory")):
        default = search.__kwdefaults__[flag.replace("-", "_")]
        group.add_argument(f"--{flag}", type=kind, default=default, metavar="N",
                           help=text if default is None else f"{text} (default: {default})")


def search_settings(args):
    """Keyword arguments of `search` from parsed flags, --seed included."""
    settings = {name: getattr(args, name) for name in search.__kwdefaults__ if name != "progress"}
    return settings | dict(kv_budget=args.kv_budget and args.kv_budget * 2**30)


def main():
    """The command: draw trees, or search and append each tree to a file as it is finished."""
    import eval as tasks                        # its loader and grader, for the command alone
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description="Search reasoning trees (Direct Value Optimization).")
    parser.add_argument("--model", help="Hugging Face folder or hub name")
    parser.add_argument("--data", help="task name or JSON Lines file with question and answer")
    parser.add_argument("--out", help="file to append trees to, one a line")
    parser.add_argument("--limit", type=int, help="search the first N questions only")
    parser.add_argument("--seed", type=int, default=search.__kwdefaults__["seed"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"),
                        help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--show", metavar="TREES", help="draw the trees of this file instead of searching")
    add_search_flags(parser)
    args = parser.parse_args()
    if args.show:
        for tree in read_trees(args.show):
            print(*draw(tree), sep="\n", end="\n\n")
        return
    if not (args.model and args.data and args.out):
        raise InputError("give --model, --data and --out to search, or --show TREES to draw")
    settings = search_settings(args)
    check_search(settings)
    problems = tasks.load_problems(args.data, split="train")[:args.limit]
    try:
        out = open(args.out, "a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {args.out}: {error.strerror}; choose another --out") from None
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    with out, tqdm(total=len(problems) * args.iterations, unit="iteration", smoothing=0.05) as bar:
        for tree in search(model, tokenizer, problems, tasks.reward, progress=bar.update, **settings):
            out.write(tree.to_json() + "\n")
            out.flush()


if __name__ == "__main__":
    from mcts import main, run_command          # the module whose InputError eval.py raises, not a second one
    run_command(main)
