# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Tree search over reasoning steps: the first half of Direct Value Optimization (arXiv 2502.13723, Sec. 4.2).

    python mcts.py --model M --data questions.jsonl --out trees.jsonl     # search, one tree a line; goes on
    python mcts.py --show trees.jsonl                                     # draw trees in the terminal
    python mcts.py --html trees.jsonl > trees.html                        # a page that unfolds them

A *step* is the text up to a blank line; a node of the tree is one step; the search repeats

    select   walk down from the root by PUCT                        Q + c * prior * sqrt(N(s)) / (1 + N(s'))
    expand   sample next steps from the policy, keep `breadth` different ones
    backup   N and V up from each step at which a path ended        V = mean of N outcomes: +1 right, else -1

The file reads in this order: the prompt, the Tree, the few lines of the algorithm (`grow`). Below it lies the
machine: the model, the random numbers, and the engine, where the time goes. All samples in flight go through
the model as ONE row of N tokens; only attention knows which token belongs to which path. The keys and values
(KV) of a path are kept once and shared by the siblings sampled from it. To let its own attention in, the file
puts a function before transformers' "sdpa" when it is imported; other calls of a model are as they were,
but for cuDNN's attention, which it switches off (with the libraries' bars and warnings).
"""
import argparse
import contextlib
import functools
import hashlib
import heapq
import html
import inspect
import json
import logging
import math
import numbers
import os
import re
import shutil
import sys
import threading
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import accumulate, chain, count, cycle, islice, takewhile
from operator import attrgetter

import eval as tasks
from eval import MARKER, InputError, check_range, open_lines, reason, run_command, told, visible, write_line

if __name__ == "__main__":
    tasks.watch_imports()
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")           # no stack of a rank whose peer has ended
if "PYTORCH_ALLOC_CONF" not in os.environ:      # else the user has set it; below the name that every torch reads
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()     # a search shows its own
for library in "transformers", "huggingface_hub":
    logging.getLogger(library).setLevel(logging.ERROR)      # what matters of their warnings is told here

PLAIN = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)      # how tokens become text


# ---------------------------------------------------------------- format and prompt


INSTRUCTION = """\
Solve the problem step by step, in at most 8 steps. Write one short reasoning step, then {gap}, then the \
next step. Finish with a last step that holds only "{marker}" and the answer; if the problem offers lettered \
options, answer with the letter."""


# The end of a text that something must follow: a colon, "is", the beginning of a formula
OPENED = re.compile(r"(?:[:：=,{]|\bis|\\[\[(]|\\begin\{[\w*]+\})\Z")


@dataclass(frozen=True)
class Format:
    """What a solution looks like, and how it is asked for: one object for search, sampling, evaluation and
    training, so that their prompts cannot differ."""
    instruction: str | None = None      # the system turn; None: asks for steps and the marker; "": there is none
    step_end: str = "\n\n"              # the text that ends a step, once the step holds other text before it
    marker: str = MARKER                # the text that announces the final answer
    # A step ends after so many tokens instead, for thoughts without such a structure; a solution still ends
    # at a step_end after its answer.
    step_tokens: int | None = None
    # (tokenizer, question) -> token ids or text, instead of the template; called with a third argument, pairs
    # (question, solution), where worked examples are to be shown
    prompt: Callable | None = None

    def __post_init__(self):
        check_range(step_tokens=(self.step_tokens, 1))
        if not (self.step_end and self.marker):
            raise InputError("a Format needs a step_end and a marker that are not empty")
        if self.instruction is None:
            names = {"\n\n": "a blank line", "\n": "a new line"}
            gap = names.get(self.step_end, repr(self.step_end))
            instruction = INSTRUCTION.format(gap=gap, marker=self.marker)
            object.__setattr__(self, "instruction", instruction)        # as the class is frozen

    def announces(self, response):
        """Whether `response` names its final answer: not in a thought, and not by quoting the marker."""
        return len(self.parted(response)) > 1

    def parted(self, response):
        """The response without its thoughts, parted at its markers. Bold may end before the last character of a
        marker; the usual one counts in any case, as for the judge; none counts between quotation marks."""
        marker = re.escape(self.marker[:-1]) + r"\**" + re.escape(self.marker[-1])
        any_case = re.IGNORECASE if self.marker == MARKER else 0
        unquoted = rf"(?<![\"'`“‘]){marker}|{marker}(?![\"'`”’])"
        return re.split(unquoted, visible(response), flags=any_case)

    def waits(self, response):
        """Whether the final answer is announced, but still to come.

        >>> format = Format()
        >>> format.waits("Final Answer: The answer is\\n\\n"), format.waits("Final Answer: 4\\n\\n")
        (True, False)
        """
        *before, tail = self.parted(response)
        tail = tail.rstrip("* \t\r\n")
        is_open = tail.count("$$") % 2 or tail.count("```") % 2         # a formula, a block of code
        has_value = re.search(r"[^\W_]|[∅∞<>]|\{\}|\(\)", tail)
        return bool(before and (OPENED.search(tail) or is_open or not has_value))


def build_prompt(tokenizer, question: str, examples=(), format: Format = Format()) -> list[int]:
    """Token ids that ask `question`, after worked `examples` (question, solution) if any (App. B): by the
    tokenizer's chat template if it has one, else as plain text. Raises InputError if the template fails."""
    if format.prompt:
        shown = [examples] if examples else []
        prompt = format.prompt(tokenizer, question, *shown)
        return encode(tokenizer, prompt) if isinstance(prompt, str) else [*prompt]
    said = [*chain(*examples), question]
    special = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if special:
        said = [re.sub("|".join(special), "\ufdd0\\g<0>\ufdd1", text) for text in said]     # see `encode`
    if tokenizer.chat_template is not None:
        _, text = chat(tokenizer, format.instruction, said)
        return encode(tokenizer, text, add_special_tokens=False)
    *shown, question = said
    text = f"{format.instruction}\n\n"
    for asked, solution in zip(shown[::2], shown[1::2]):
        text += f"Problem: {asked}\n\nSolution:\n\n{solution}\n\n\n"
    text += f"Problem: {question}\n\nSolution:\n\n"
    return encode(tokenizer, text.lstrip("\n"))


SAME_DAY = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"       # put before a template: its clock


def chat(tokenizer, instruction, said):
    """The turns, and the text, of a conversation in which user and assistant have `said` that in turn. Some
    templates refuse a system turn, some drop it without a word: then the first user turn says it all. Raises
    InputError if instruction or question are left out even so. In templates that tell the date it is always
    the same: else the trees of a run that goes on tomorrow would be others."""
    roles = cycle(("user", "assistant"))
    first, *later = [dict(role=role, content=text) for role, text in zip(roles, said)]
    system = dict(role="system", content=instruction)
    whole = dict(role="user", content=f"{instruction}\n\n{said[0]}")
    openings = [[system, first], [whole]] if instruction else [[first]]
    for start in openings:
        try:
            with told("apply the tokenizer's chat template", "repair it, or give Format a prompt", Exception):
                template = SAME_DAY + tokenizer.get_chat_template()
                how = dict(chat_template=template, add_generation_prompt=True, tokenize=False)
                text = tokenizer.apply_chat_template(start + later, **how)
                for part in instruction, said[-1]:
                    if part.strip() not in text:
                        raise ValueError(f"it leaves out {part[:40]!r}")
                return start + later, text
        except InputError:
            if start is openings[-1]:
                raise


def encode(tokenizer, text, add_special_tokens=True):
    """Token ids of a prompt: one BOS where the tokenizer adds one, no EOS at its end. What stands between two
    characters that no text has, U+FDD0 and U+FDD1, looks like a special token and stays text."""
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        add_special_tokens = False
    ids = []
    for n, piece in enumerate(re.split("\ufdd0(.*?)\ufdd1", text)):
        how = dict(split_special_tokens=True) if n % 2 else {}
        ids += tokenizer(piece, add_special_tokens=add_special_tokens and n == 0, **how).input_ids
        if ids[-1:] == [tokenizer.eos_token_id] and not piece.endswith(tokenizer.eos_token):
            ids.pop()
    return ids


def decoder(tokenizer) -> Callable:
    """The function from token ids to their text: without special tokens, but for those that mark thoughts."""
    of_thoughts = re.compile("think|thought|reason", re.I)
    added = tokenizer.added_tokens_decoder.items()
    dropped = {i for i, token in added if token.special and not of_thoughts.search(str(token))}

    def text_of(tokens):
        kept = [token for token in tokens if token not in dropped]
        return tokenizer.decode(kept, clean_up_tokenization_spaces=False)
    return text_of


def fingerprint(tokenizer) -> str:
    """8 hex digits that tell tokenizers apart, by vocabulary and chat template."""
    text = json.dumps([tokenizer.get_vocab(), tokenizer.chat_template], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


# ---------------------------------------------------------------- the tree


@dataclass(slots=True)
class Node:
    """One step a_t taken in state s_t, and the state s_{t+1} it leads to. Node 0, the root, holds no step."""
    parent: int               # index of the node of s_t, -1 at the root
    tokens: list              # the step, with the token that completed its end or the EOS
    logprob: float = 0.0      # log pi(a|s), summed over the step's tokens, at temperature 1
    visits: int = 0           # N: outcomes backed up through this node, not how often it was selected
    value: float = 0.0        # V in [-1, 1]: their mean, 0 while there is none; see Tree.credit of terminals
    reward: int = 0           # r: 0 inside the tree, +1 or -1 on a terminal step
    terminal: bool = False
    valid: bool = True        # False: a failure of form (cut, too deep, no answer); never a training path
    text: str = ""            # for people; derived from tokens, never tokenised again
    count: int = 1            # how many of the samples drawn at the expansion were this step
    children: list = field(default_factory=list, repr=False)   # indices
    depth: int = 0            # steps from the root
    exhausted: bool = False   # every path below has ended; known while it is searched, not stored

    @property
    def prior(self):
        """pi(a|s) of PUCT in (0, 1]: exp of the mean token log-prob, the geometric mean of its tokens'."""
        return math.exp(self.logprob / max(1, len(self.tokens)))

    @property
    def ended(self):
        return self.terminal or self.exhausted

    @property
    def summary(self):
        return f"V {self.value:+.2f}  N {self.visits:<3}"


STORED = ("parent", "tokens", "logprob", "visits", "value", "reward", "terminal", "valid", "text", "count")


def credit(reward, after, before):
    """What a step changed in value, the DVO target (Eq. 10), of numbers or of tensors."""
    return reward + after - before                                  # r + V(s') - V(s)


@dataclass
class Tree:
    """All that a search learnt about one question. Parents come before children in `nodes`."""
    question: str
    answer: str
    prompt: list              # token ids
    config: dict = field(default_factory=dict)
    nodes: list = field(default_factory=lambda: [Node(parent=-1, tokens=[])])

    def add(self, node: Node) -> int:
        """Append `node` below its parent and return its index."""
        parent = self.nodes[node.parent]
        index = len(self.nodes)
        node.depth = parent.depth + 1
        parent.children.append(index)
        self.nodes.append(node)
        return index

    def path(self, i: int) -> list[int]:
        """Indices of the nodes from the first step down to node i; empty for the root."""
        nodes = []
        while i > 0:
            nodes.append(i)
            i = self.nodes[i].parent
        return nodes[::-1]

    def credit(self, i: int) -> float:
        """The credit of step i, in [-2, 2]. After a terminal step V(s') is 0 here, whatever `value` shows: so
        its credit is r - V(s), and the credits along a path sum to r - V(s_0)."""
        node = self.nodes[i]
        after = 0 if node.terminal else node.value
        return credit(node.reward, after, before=self.nodes[node.parent].value)

    def ending(self, i: int) -> str:
        """How terminal node i ended: "right" or "wrong"; or, not valid, "unanswered" (EOS without a final
        answer), "deep" (the last step allowed did not end the solution), "cut" (by a limit of tokens)."""
        node = self.nodes[i]
        if node.valid:
            return "right" if node.reward > 0 else "wrong"
        if node.tokens[-1] in self.config.get("eos", ()):
            return "unanswered"
        step_end = self.config.get("step_end", "\n\n")
        _, ended, after = node.text.lstrip().rpartition(step_end)
        counted = len(node.tokens) == self.config.get("step_tokens")
        whole = counted or ended and not after.strip()
        return "deep" if whole and node.depth >= self.config.get("depth", 0) else "cut"

    def endings(self):
        """How often its terminal nodes ended how."""
        return Counter(self.ending(i) for i, node in enumerate(self.nodes) if node.terminal)

    def record(self):
        """The tree as it is written, a dict for JSON; of a node what STORED names."""
        nodes = [{name: getattr(node, name) for name in STORED} for node in self.nodes]
        return vars(self) | {"nodes": nodes}

    def to_json(self) -> str:
        return json.dumps(self.record(), ensure_ascii=False)

    @classmethod
    def from_json(cls, line):
        """The tree of a line of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        data = json.loads(line)
        stored = [{"count": 1} | node for node in data["nodes"]]    # older files do not count
        root, *others = [Node(**{name: node[name] for name in STORED}) for node in stored]
        texts = data["question"], data["answer"]
        tree = cls(*texts, data["prompt"], data["config"], nodes=[root])
        for node in others:
            if not 0 <= node.parent < len(tree.nodes):
                raise ValueError("a parent must come before its children")
            tree.add(node)
        texts = [*texts, *map(attrgetter("text"), tree.nodes)]
        has_texts = all(isinstance(text, str) for text in texts)
        has_steps = all(node.tokens for node in others)
        if not (has_texts and has_steps and tree.prompt and isinstance(tree.config, dict)):
            raise ValueError("a text, a step, the prompt or the config is missing")
        return tree


def read_trees(path) -> Iterator[Tree]:
    """The trees of a JSON Lines file, one at a time. Raises InputError naming the line that is not a tree."""
    with told(f"read trees from {path}"), open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield Tree.from_json(line)
            except (ValueError, KeyError, TypeError, IndexError):
                raise InputError(f"{path}, line {number}: not a search tree; search that question again, or "
                                 "delete the line") from None


# ---------------------------------------------------------------- the search of one tree


def grow(tree, outcome, *, iterations, breadth, depth, c_puct):
    """Search one tree (Sec. 4.2). A coroutine: yields the leaf to expand, is sent the Samples drawn there.
    outcome(token ids of an ended response) -> its reward and whether its form is valid.

    What the paper leaves open: a terminal node is backed up once, when it is created, and never selected
    again: to visit the best one over and over would pull V from the mean outcome towards the maximum. There
    are no rollouts, and no KL penalty in what is backed up: in the value of a KL-regularised policy that is
    its own reference, the log-ratio is 0, which leaves the mean of the plain outcomes.
    """
    for _ in range(iterations):
        leaf = select(tree, c_puct)
        if leaf is None:
            return
        samples = yield leaf
        for child, end in expand(tree, leaf, samples, breadth):
            judge(tree, child, end, outcome, depth)
            if tree.nodes[child].terminal:
                backup(tree, child)
        close(tree, leaf)


def select(tree, c_puct):
    """The leaf that PUCT reaches from the root, None if every path has ended. Ties go to the larger prior: so
    it goes by the prior alone while nothing has ended below. sqrt(N(s)) and c are as in the authors' code."""
    nodes = tree.nodes
    if nodes[0].exhausted:
        return None
    i = 0
    while nodes[i].children:
        explore = c_puct * math.sqrt(nodes[i].visits)

        def score(j):
            Q = nodes[j].value                                      # 0 if unvisited; r = 0: it has not ended
            U = explore * nodes[j].prior / (1 + nodes[j].visits)
            return Q + U, nodes[j].prior
        open_children = [j for j in nodes[i].children if not nodes[j].ended]
        i = max(open_children, key=score)
    return i


def expand(tree, leaf, samples, breadth):
    """Add the sampled steps below `leaf`. Returns (index, how it ended) of each new node.

    Samples of the same text and ending are one action, represented by the first of them; `count` keeps how
    many there were. Of the actions the `breadth` of the largest summed log-prob stay, in the order in which
    they were drawn.
    """
    actions = {}
    for s in samples:
        actions.setdefault((s.text, s.end), []).append(s)

    def logprob_of(action):
        return actions[action][0].logprob

    likeliest = sorted(actions, key=logprob_of, reverse=True)[:breadth]
    children = []
    for action, group in actions.items():
        if action in likeliest:
            first = group[0]
            logprob = round(first.logprob, 9)                       # more digits depend on the batch
            node = Node(leaf, first.tokens, logprob, text=first.text, count=len(group))
            children.append((tree.add(node), first.end))
    return children


def judge(tree, i, end, outcome, depth):
    """Say whether new node i is terminal, and its reward.

    A step that neither ends the solution nor may go on (cut, or at full depth) is a failure of the policy,
    and so is a wrong solution that announced no answer: -1, counted in V, but no `valid` training path.
    """
    node = tree.nodes[i]
    if end in ("answer", "eos"):
        response = [token for j in tree.path(i) for token in tree.nodes[j].tokens]
        node.terminal = True
        node.reward, node.valid = outcome(response)
    elif end == "cut" or node.depth >= depth:
        node.terminal, node.reward, node.valid = True, -1, False


def backup(tree, i):
    """Count the outcome of terminal node i in N and V of every node on its path, from itself to the root."""
    reward = tree.nodes[i].reward
    while i >= 0:
        node = tree.nodes[i]
        node.visits += 1
        node.value += (reward - node.value) / node.visits       # so V = sum_a N(s')(r + V(s')) / sum_a N(s'),
        i = node.parent                                         # where V(s') after a terminal step is 0


def close(tree, i):
    """Mark node i exhausted if every child has ended or is exhausted itself, and so on upwards."""
    nodes = tree.nodes
    while i >= 0 and all(nodes[j].ended for j in nodes[i].children):
        nodes[i].exhausted = True
        i = nodes[i].parent


# ---------------------------------------------------------------- the model: loading


def pick_device(name: str | None = None) -> torch.device:
    """`name` as a torch.device; by default the first GPU, else the CPU. InputError if there is none."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with told(f"use --device {name}", "give cpu or cuda, or leave it out", (RuntimeError, AssertionError)):
        empty = torch.empty(0, device=torch.device(name))
        empty.cpu()                                                 # not from "meta", which holds no numbers
        return empty.device                                         # with its number: cuda:0


def load_model(name: str, device=None, dtype: str | None = None):
    """A causal LM and its tokenizer from a Hugging Face folder or hub name: safetensors only, no remote code.

    `dtype` is a name, by default "bfloat16" on a GPU, else "float32". On torch.device("meta") no weights are
    read. Raises InputError for whatever cannot be loaded as it was saved.
    """
    if device != torch.device("meta"):
        device = pick_device(device)
    dtype = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    is_hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name))
    if not (is_hub_name or os.path.exists(name)):
        raise InputError(f"there is no folder {name}: give one written by save_pretrained, or a hub name")
    if os.path.exists(os.path.join(name, "adapter_config.json")):
        raise InputError(f"{name} holds an adapter (LoRA) and no model: merge it into its base model first")
    config = load("config", AutoConfig.from_pretrained, name)
    if getattr(config, "quantization_config", None):
        raise InputError(f"{name} is quantised and cannot be trained: give the model that it was made from")
    tokenizer = load("tokenizer", AutoTokenizer.from_pretrained, name)
    if os.path.exists(os.path.join(name, "generation_config.json")):        # else a torn one is passed over
        load("generation config", GenerationConfig.from_pretrained, name)
    model = load_weights(name, config, device, dtype)
    highest = max(tokenizer.get_vocab().values(), default=0)
    rows = model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise InputError(f"the tokenizer of {name} has a token {highest}, but the model embeds only {rows}: "
                         "resize its embeddings and train them first")
    return model.eval(), tokenizer


def load_weights(name, config, device, dtype):
    """The model alone, see load_model; on the meta device from its config."""
    if device.type == "meta":
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with contextlib.suppress(OSError):      # without one, from_config has taken what the config says
            model.generation_config = GenerationConfig.from_pretrained(name)
        return model
    model, report = load("weights", AutoModelForCausalLM.from_pretrained, name, dtype=dtype,
                         use_safetensors=True, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{name} lacks {len(missing)} weights of {type(model).__name__}, such as "
                         f"{missing[0]}: it was saved as another kind of model, or under other names")
    if unknown := sorted(report["unexpected_keys"]):
        print(f"{name}: its config.json has no place for {len(unknown)} of its weights, such as {unknown[0]}",
              file=sys.stderr)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = getattr(config.get_text_config(), "tie_word_embeddings", False) and type(model)._tied_weights_keys
    if is_tied and None not in ends and ends[0].weight is not ends[1].weight:       # ranks would tie them
        raise InputError(f"the config of {name} ties the head to the embeddings, but its weights have both: set "
                         "tie_word_embeddings to false in config.json, or delete lm_head from the weights")
    with told(f"move {name} to {device}", "take a smaller one, or more GPUs", torch.OutOfMemoryError):
        return model.to(device)


def load(what, function, name, **how):
    """function(name, ...), any failure as one sentence: each library has its own exceptions."""
    remedy = "give a folder written by save_pretrained, or a hub name and a network"
    with told(f"load the {what} of {str(name)!r}", remedy, Exception):
        return function(name, trust_remote_code=False, **how)


# ---------------------------------------------------------------- the model: attention of our own


class Unserved(Exception):
    """Why models of a kind cannot be searched and trained here; `check_model` tells it to the user."""


library_sdpa = AttentionInterface()["sdpa"]


def attend(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **how):
    """What transformers calls in every layer as `sdpa`: that itself, unless the mask carries an attention.

    So `call_model` changes nothing in a model, threads may share it, and activation checkpointing, which runs
    a layer again when the call has long returned, finds the attention in the mask that it has kept.
    """
    attention = getattr(attention_mask, "attention", None)
    if attention is None:
        if attention_mask is not None and attention_mask.numel() < query.shape[2]:      # ours, see call_model
            raise InputError("its forward copies the mask (in activation checkpointing: use_reentrant=False)")
        return library_sdpa(module, query, key, value, attention_mask, scaling=scaling,
                            sliding_window=sliding_window, **how)
    for name in "softcap", "s_aux", "position_bias":
        if how.get(name) is not None:
            raise Unserved(f"its attention has a {name}, which ours lacks")
    layer = attention_mask.calls
    attention_mask.calls += 1
    scaling = scaling or query.shape[-1] ** -0.5
    out = attention(layer, sliding_window, query, key, value, scaling)
    return out.contiguous(), None


AttentionInterface.register("sdpa", attend)
torch.backends.cuda.enable_cudnn_sdp(False)     # its gradient can be NaN, and each new shape costs a plan


def call_model(model, tokens: torch.Tensor, positions: torch.Tensor, attention: Callable, **how):
    """The output of `model`, with another attention in all of its layers for this call.

    tokens, positions (B, T); attention(layer, window, q, k, v, scaling) -> (B, T, Hq, Dv) of q (B, Hq, T, D),
    k (B, H, T, D), v (B, H, T, Dv); layer: 0, 1, ... within a forward, in a recomputation any number; window:
    how many positions back the layer sees, itself included, None without limit. Differentiable.
    """
    # Not used as a mask: every model hands a 4D one down to its layers untouched, so it carries our attention.
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    mask.attention = attention
    mask.calls = 0
    return model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False, **how)


def masked_attention(seen, behind):
    """An attention for call_model: token t of row b sees column c if seen[b, t, c] and, in a layer with a
    window, if behind[b, t, c], the positions from c to t, is less than that.

    seen, behind (B, T, C). The Hq / H query heads that share a key head become rows of one head, so that no
    key is copied.
    """
    biases = {}

    def attention(layer, window, q, k, v, scaling):
        B, Hq, T, D = q.shape
        H = k.shape[1]
        kind = window, Hq // H
        if kind not in biases:
            near = seen if window is None else seen & (behind < window)
            bias = torch.zeros(near.shape, dtype=q.dtype, device=q.device)
            bias = bias.masked_fill_(~near, -torch.inf)
            biases[kind] = bias[:, None].repeat(1, 1, Hq // H, 1)   # (B, 1, Hq / H * T, C)
        rows = q.reshape(B, H, -1, D)                               # (B, H, Hq / H * T, D)
        out = F.scaled_dot_product_attention(rows, k, v, biases[kind], scale=scaling)
        return out.reshape(B, Hq, T, -1).transpose(1, 2)            # (B, T, Hq, Dv)
    return attention


def tree_attention(seen: torch.Tensor, positions: torch.Tensor) -> Callable:
    """An attention for call_model in which token t of a row sees token u if seen[b, t, u].

    seen (B, T, T) bool, every token sees itself; positions (B, T), which layers with a window go by.
    """
    behind = positions[:, :, None] - positions[:, None, :]          # (B, T, T)
    return masked_attention(seen, behind)


def causal_lm(model):
    """`model`, or the causal LM that it wraps, as dvo.Policy does."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def backbone_name(lm):
    """The name of the part of causal LM `lm` that makes its hidden states."""
    if hasattr(lm, lm.base_model_prefix):
        return lm.base_model_prefix
    return next(name for name, part in lm.named_children() if isinstance(part, PreTrainedModel))


def hidden_states(lm, tokens, positions, attention) -> torch.Tensor:
    """(B, T, D) the last hidden states of causal LM `lm`, see call_model."""
    return call_model(getattr(lm, backbone_name(lm)), tokens, positions, attention)[0]


def pass_on(*args, inputs_embeds=None, **how):
    """Stands for a backbone, see `logits_of`: its input embeddings are the last hidden states."""
    return Hidden((inputs_embeds,))


pass_on.decoder = pass_on                       # which some LMs call instead


class Hidden(tuple):
    """What a backbone returns, with hidden states only."""
    last_hidden_state = property(lambda self: self[0])

    def __getattr__(self, name):
        return None


def logits_of(lm) -> Callable:
    """The function from last hidden states (R, D) to logits (R, V): exactly what the forward of causal LM
    `lm` makes of them, with scaling, caps and dense layers. Differentiable; shares the parameters."""
    head = lm.__class__.__new__(lm.__class__)   # the same LM, with `pass_on` in place of its backbone
    head.__dict__.update(lm.__dict__)
    head.__dict__["_modules"] = lm._modules | {backbone_name(lm): pass_on}
    return lambda hidden: head(inputs_embeds=hidden[None]).logits[0]


# ---------------------------------------------------------------- the model: is it served exactly?


NOT_FINITE = "{} logits are not finite: its weights hold NaN, or numbers too large for their type"

# Fields of configs that limit the length: beyond it a model is untrained (max_position_embeddings), or its
# attention changes (Llama 4, Doge and others).
LIMITS = "max_position_embeddings", "attention_chunk_size", "floor_scale", "keep_window_size"


def context_length(model) -> int:
    """Tokens a sequence may have. A window counts only if `check_model` found that it is not exact beyond."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in LIMITS]
    settings = str(vars(config))
    if "longrope" in settings:                  # its frequencies depend on the longest sequence of a call
        limits += map(int, re.findall(r"'original_max_position_embeddings': (\d+)", settings))
    if "served" in vars(model):
        limits.append(model.served.window)
    return min(filter(None, limits), default=sys.maxsize)


# What a passed check found: for which type of weights and mode, the window within which all is exact (None: at
# any length), the (heads, size) of keys and of values in every layer, their type, and the number of logits.
Served = namedtuple("Served", "checked window layers dtype vocabulary")
CHECKING = threading.Lock()                     # of a model that several threads use: it changes its windows


def check_model(model) -> None:
    """Raise InputError unless search and training give the numbers of the model's own forward; say why not.
    A passed check is remembered in the model."""
    with CHECKING:
        lm = causal_lm(model)
        checked = lm.dtype, model.training, torch.is_autocast_enabled(lm.device.type)
        if "served" in vars(model) and model.served.checked == checked:
            return
        name = type(lm).__name__
        try:
            with torch.no_grad():
                refuse_by_name(model)
                model.served = Served(checked, *within_windows(model))
        except torch.OutOfMemoryError:
            raise InputError(f"{name} leaves no memory on {model.device} to run 18 tokens") from None
        except InputError as error:
            raise InputError(f"{name} can be neither searched nor trained as it is: {error}") from None
        except Exception as error:              # of its kind, or whatever its own code raises
            kind = "" if isinstance(error, Unserved) else f"{type(error).__name__}: "
            raise InputError(f"{name} can be neither searched nor trained here: {kind}{reason(error)}; take "
                             "a decoder such as Llama, Qwen, Mistral or Gemma 3") from None


def refuse_by_name(model):
    """Raise Unserved for what is known not to be served, by its true name, and InputError for what
    its user can change."""
    config = model.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ())
    types -= {"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe", "dense"}
    if torch.is_autocast_enabled(model.device.type):
        raise InputError("torch.autocast is on, under which its logits are not its own; leave that")
    if getattr(config, "attn_logit_softcapping", None):
        raise Unserved("its attention has a soft cap, which ours lacks")
    if any("sink" in name for name, _ in model.named_parameters()):
        raise Unserved("its attention has sinks, which ours lacks")
    if types:
        kinds = ", ".join(sorted(types))
        raise Unserved(f"its layers of type {kinds} keep a state or choose what they see")
    if model.config._attn_implementation != "sdpa":
        raise InputError(f"its attention is {model.config._attn_implementation!r}, not PyTorch's sdpa (load "
                         'it with attn_implementation="sdpa", if it has that)')


def within_windows(model):
    """The rest of Served. First with windows so small that the few tokens of `compare` look beyond them: if
    that is exact, all is, at any length; else as the model is, and only within its smallest window."""
    modules = [*model.modules()]
    owners = modules + [getattr(module, "config", None) for module in modules]
    owners = [owner for owner in owners if isinstance(getattr(owner, "sliding_window", None), int)]
    windows = [owner.sliding_window for owner in owners]
    try:
        for owner, window in zip(owners, windows):
            owner.sliding_window = min(4, window)
        return None, *compare(model)
    except Exception:
        if not owners:
            raise
    finally:
        for owner, window in zip(owners, windows):
            owner.sliding_window = window
    return min(windows), *compare(model)


def compare(model):
    """Raise Unserved unless decoding in the engine, and a packed tree as in training, have the logits of a
    plain forward: a prompt of 6 tokens, two answers of 3; InputError where that is NaN, or differs from another.
    Returns what Served says of KV and logits."""
    lm = causal_lm(model)
    vocabulary = min(97, model.config.get_text_config().vocab_size)
    tokens = torch.arange(12, device=model.device) * 7 % vocabulary
    prompt, answers = tokens[:6], tokens[6:].view(2, 3)
    rows = torch.cat((prompt.expand(2, 6), answers), 1)             # (2, 9)
    plain = model(input_ids=rows, use_cache=False).logits           # (2, 9, V)
    if not plain.isfinite().all():
        raise InputError(NOT_FINITE.format("its"))
    if not same(model(input_ids=rows, use_cache=False).logits, plain):
        raise InputError("two forwards of it differ: it is in train mode with dropout; call model.eval()")
    position = torch.tensor([[*range(9), 6, 7, 8]], device=model.device)
    seen = torch.ones(1, 12, 12, dtype=torch.bool, device=model.device).tril()
    seen[:, 9:, 6:9] = False                                        # the second answer sees not the first
    attention = tree_attention(seen, position)
    layers, dtypes = [], []

    def recorded(layer, window, q, k, v, scaling):
        layers.append([(x.shape[1], x.shape[3]) for x in (k, v)])   # (heads, size)
        dtypes.append(k.dtype)
        return attention(layer, window, q, k, v, scaling)
    hidden = hidden_states(lm, tokens[None], position, recorded)
    if not layers:
        raise Unserved(why_not(model, 0))
    drawn = decoded(model, prompt, answers, layers, dtypes[0])
    if not same(drawn, plain[:, 5:]):
        raise Unserved(why_not(model, len(layers)))
    expected = torch.cat((plain[0], plain[1, 6:]))                  # (12, V): the prompt, then both answers
    if not same(logits_of(lm)(hidden[0]), expected):
        raise Unserved("its forward makes other logits of its hidden states than its head alone")
    return layers, dtypes[0], plain.shape[-1]


def decoded(model, prompt, answers, layers, dtype):
    """Logits (2, 4, V) of the last token of the prompt and of the answers, as the engine computes them: in
    lane 1, the prompt in two parts, the answers as siblings 0 and 2 of 3."""
    cache = Cache(layers, dtype, model.device, max_lanes=2, siblings=3, columns=64)
    cache.resize(32, {})
    prefill(model, cache, 1, 0, prompt[:3].tolist())
    prefill(model, cache, 1, 3, prompt[3:5].tolist())
    inputs = torch.cat((prompt[5:].expand(2, 1), answers), 1)       # (2, 4)
    logits = []
    for t, newest in enumerate(inputs.T.tolist()):
        lane = [1, 1]
        sibling = [0, 2]
        start = [5, 5]
        table = np.array([newest, lane, sibling, start, [t, t]])
        logits.append(decode(model, cache, table)[0])
    return torch.stack(logits, 1)


def same(a, b):
    """Whether logits are the same but for rounding: by norm, since 128k logits have outliers."""
    tolerance = {2: 0.05, 4: 3e-4, 8: 1e-5}[a.dtype.itemsize]
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    distance = (a - b).norm()
    return bool(distance <= tolerance * (b - b.mean()).norm())


def why_not(model, calls):
    """The reason why its logits are others: attention of ours was called `calls` times in a forward."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", calls)
    if calls == 0:
        return "its attention does not go through transformers' AttentionInterface, or adds to the mask"
    if calls < layers:
        return f"only {calls} of its {layers} layers are attention; the others keep a state of their own"
    return ("what a token sees depends on more than its path and positions (both directions, a bias by "
            "distance, positions of its own, a choice of tokens)")


# ---------------------------------------------------------------- random numbers by key


def hash_tokens(key, tokens):
    """128-bit key of a path, made from its parent's key (at a root: the seed's) and its last step."""
    data = np.asarray(tokens, dtype="<i8").tobytes()
    return hashlib.blake2b(key + data, digest_size=16).digest()


def random_words(key, length, n):
    """(n, length, 2) int32 random words for n samples after a path: a longer length only adds words, another n
    changes all but the first of each sample."""
    generator = np.random.Philox(key=np.frombuffer(key, dtype="<u8"))
    words = generator.random_raw(length * n).view(np.int32)
    return words.reshape(length, n, 2).swapaxes(0, 1)


def mix(x):
    """A bijection of int32 that spreads every bit (shift and multiply, as in Murmur3), in place."""
    x ^= (x >> 15) & 0x1FFFF
    x *= -2048144789
    x ^= (x >> 13) & 0x7FFFF
    return x


def hash_vocabulary(size, device):
    """(V,) int32, a hash of each token id."""
    tokens = torch.arange(size, dtype=torch.int32, device=device)
    return mix(tokens * -1640531535)


def pick(logits, words, token_hash, temperature):
    """Draw one token a row by Gumbel-max, with noise that depends on (words, token id) alone.

    logits (N, V), words (N, 2) int32, token_hash (V,) int32 -> tokens (N,), their log-probs at temperature 1
    (N,). Logits of another batch differ in the last bits; noise keyed per token id makes a different winner
    as unlikely as can be (an inverse CDF would shift every boundary at once).
    """
    on_cpu = logits.device.type == "cpu"
    some = max(1, 2**18 // logits.shape[1]) if on_cpu else len(logits)          # rows that fit its cache
    tokens = []
    logprobs = []
    for row, word in zip(logits.split(some), words.split(some)):
        row = row if row.dtype == torch.float64 else row.float()
        row = row - row.amax(-1, keepdim=True)
        p = row.exp()                                               # at temperature 1, times `total`
        total = p.sum(-1)
        if temperature == 0:
            token = row.argmax(-1, keepdim=True)
        else:
            p = p if temperature == 1 else (row / temperature).exp_()
            token = gumbel_argmax(p, word, token_hash)
        tokens.append(token[:, 0])
        logprobs.append(row.gather(1, token)[:, 0] - total.log())
    return torch.cat(tokens), torch.cat(logprobs)


def gumbel_argmax(p, words, token_hash):
    """(N, 1) a draw from each row of p (N, V), which need not sum to 1.

    With u uniform in (0, 1), -log(-log u) is Gumbel noise, and the token of the largest log p + noise is a
    draw from p. That is the token of the largest p / -log u, so of the smallest p / log u. As u has 23 bits, a
    token of p below about 1e-7 comes too seldom.
    """
    a = words[:, :1]
    b = words[:, 1:] | 1
    bits = mix((token_hash ^ a).mul_(b))                            # (N, V) int32
    bits = bits.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF)
    u = bits.to(p.dtype).add_(0.5).mul_(2.0**-23)                   # of 23 bits: exact, never 0 or 1
    log_u = u.log_()
    return torch.div(p, log_u, out=log_u).argmin(-1, keepdim=True)


# ---------------------------------------------------------------- the engine: keys and values

# Its words. A *job*: draw `siblings` samples after a path (the prompt and the steps to a leaf). It waits until
# a *lane* of the cache is free, which takes the KV of its path, and becomes as many *drafts*, which share the
# lane; a forward draws one token for the drafts of all lanes; a draft that ends becomes a *sample*. The KV of
# a path lies in the store, a *segment* a step, where the jobs of its children find it:
#
#     leaf -> Job -> waits -> lane -> drafts a, b, c -> a token each -> ... -> Samples -> children of the leaf


class Cache:
    """Keys and values of the paths being sampled from: memory that is taken once, cut into lanes of `stride`
    columns, lane s from s * stride on. A lane holds n columns for all tokens of a path but the last; then
    come, of G = 3 siblings a, b, c, the inputs: a0 = b0 = c0, the last token of the path, and what each drew:

        column      0 ... n-1    n    n+1  n+2  n+3  n+4  n+5  n+6 ...
        token       the path     a0   b0   c0   a1   b1   c1   a2
        position    0 ... n-1    n    n    n    n+1  n+1  n+1  n+2

    So input t of sibling g stands in column n + t * G + g, at position n + t: nothing else is to be known.
    """
    CALL = 400                # a call of attention costs a CPU as much as so many columns of one sibling

    def __init__(self, layers, dtype, device, *, max_lanes, siblings, columns):
        """layers: of each layer the (heads, size) of its keys and of its values; columns: of all lanes."""
        self.max_lanes = max_lanes
        self.G = siblings                       # in a lane; a job may have more, and take several lanes
        self.heads = layers[0][0][0]
        self.columns = columns
        self.device = device
        self.stride = 0
        shapes = [*chain(*layers)]              # of the planes: K and V of layer 0, of layer 1, ...
        self.blocks = []                        # one tensor for all planes of the same shape: mostly one
        planes = {}
        for (H, D), number in Counter(shapes).items():
            block = torch.empty(number, H, columns, D, dtype=dtype, device=device)
            self.blocks.append(block)
            planes[H, D] = iter(block)
        self.planes = [next(planes[shape]) for shape in shapes]     # (H, columns, D) each

    @property
    def nbytes(self):
        return sum(block.nbytes for block in self.blocks)

    def room(self):
        """How many lanes there are at this stride."""
        return min(self.max_lanes, self.columns // self.stride) if self.stride else 0

    def resize(self, stride, used):
        """Give lanes another stride. used: {lane: its columns in use}. Returns the new number of each."""
        numbers = {lane: number for number, lane in enumerate(sorted(used))}
        columns = [(lane, t) for lane in numbers for t in range(used[lane])]
        source = [lane * self.stride + t for lane, t in columns]
        target = [numbers[lane] * stride + t for lane, t in columns]
        source, target = torch.tensor([source, target], dtype=torch.long, device=self.device)
        self.stride = stride
        stop = self.room() * stride
        for plane in self.planes:
            kept = plane.index_select(1, source)
            plane[:, :stop] = 0                 # a column that is not seen weighs 0, but 0 * NaN is NaN
            plane.index_copy_(1, target, kept)
        return numbers

    def take(self, first, columns, every=1):
        """A copy of `columns` columns from `first` on, every `every`th: a (planes, H, T, D) of each block."""
        stop = first + columns * every
        return [block[:, :, first:stop:every].clone() for block in self.blocks]

    def put(self, first, segments):
        """Write what `take` returned, one after the other, from column `first` on."""
        for block, *parts in zip(self.blocks, *segments):
            new = torch.cat(parts, 2)
            block[:, :, first:first + new.shape[2]] = new

    def extend(self, at, layer, k, v):
        """Write the k, v (1, H, N, D) of a layer into columns `at` (N,). Returns all that it has now, by
        lane: K, V (S, H, stride, D), without a copy."""
        held = []
        K, V = self.planes[2 * layer:2 * layer + 2]
        for plane, new in (K, k), (V, v):
            plane.index_copy_(1, at, new[0])
            used = plane[:, :self.room() * self.stride]
            lanes = used.unflatten(1, (-1, self.stride))            # (H, S, stride, D)
            held.append(lanes.transpose(0, 1))
        return held


def prefill(model, cache, lane, start, tokens):
    """Compute the KV of the `tokens` of a path, which come after `start` others in `lane`: each of them as the
    first input of a sample whose path is all that comes before it."""
    for first in range(0, len(tokens), 1024):                       # so that a long path needs no more memory
        newest = tokens[first:first + 1024]
        n = len(newest)
        begin = start + first
        zeros = np.zeros(n, dtype=np.int64)
        table = np.stack((newest, zeros + lane, zeros, begin + np.arange(n), zeros))
        decode(model, cache, table, logits_to_keep=1)


def decode(model, cache, table, **how):
    """Logits (N, V) of the token after the newest of N samples, which are sorted by lane. table (5 + x, N)
    int64: of each sample its newest token, its lane, its sibling number, the columns of its path and how many
    tokens it has drawn. The other x rows, its random words, come back on the device: so a forward copies to
    it once."""
    lanes, firsts, alive = np.unique(table[1], return_index=True, return_counts=True)
    G = cache.G
    columns_of = table[3] + table[4] * G + table[2] + 1             # of each sample, its new one included
    used = np.maximum.reduceat(columns_of, firsts)                  # of each lane
    used = np.minimum(cache.stride, -(-used // 16) * 16)            # kernels like whole blocks
    on_device = torch.from_numpy(table).to(cache.device)
    newest, lane, sibling, start, length, *others = on_device
    at = lane * cache.stride + start + length * G + sibling
    seen, behind = sight(used.max(), G, sibling, start, length)
    if len(lanes) == 1 or lane_by_lane(cache, lanes, alive, used):  # one may have any number of rows: prefill
        rows = map(slice, firsts, firsts + alive)
        groups = [*zip(map(slice, lanes, lanes + 1), rows, used)]
        place = slice(None)
    else:           # all lanes up to the last in one call, G rows each; for a sibling that has ended row 0 again
        S = lanes[-1] + 1
        place = lane * G + sibling
        rows = place.new_zeros(S * G)
        rows[place] = torch.arange(len(lane), device=cache.device)
        groups = [(slice(0, S), rows, used.max())]
    attention = lane_attention(cache, at, seen, behind, groups, place)
    position = start + length
    logits = call_model(model, newest[None], position[None], attention, **how).logits[0]
    return logits, others


def lane_by_lane(cache, lanes, alive, used):
    """Whether attention is faster one lane after the other, each as wide as it is used: on a CPU with no more
    threads than heads, which one lane keeps busy, if that spares more columns than the calls cost."""
    in_one_call = (lanes[-1] + 1) * cache.G * used.max()            # columns that are attended to
    spared = in_one_call - (alive * used).sum()
    lane_fills_threads = cache.device.type == "cpu" and torch.get_num_threads() <= cache.heads
    return lane_fills_threads and spared > cache.CALL * len(lanes)


def sight(columns, G, sibling, start, length):
    """What N samples, see `decode`, see in their lanes: the path, and what each itself has drawn; and how many
    positions behind that is: (N, columns) each."""
    n = start[:, None]
    column = torch.arange(columns, device=start.device)
    after = column - n                                              # (N, columns)
    on_path = after < 0
    own = (after % G == sibling[:, None]) & (after // G <= length[:, None])
    position = torch.where(on_path, column, n + after // G)
    return on_path | own, n + length[:, None] - position


def lane_attention(cache, at, seen, behind, groups, place):
    """An attention for call_model of N tokens, whose keys and values become columns `at` (N,) of the cache.

    seen, behind (N, C): see `masked_attention`. groups: (lanes, rows, columns): which lanes are attended to
    together, by which of the N rows, as many for each lane, and as far as which column. place: where each of
    the N comes in what the groups return.
    """
    parts = []
    for lanes, rows, columns in groups:
        split = (lanes.stop - lanes.start, -1)
        masks = [mask[rows, :columns].unflatten(0, split) for mask in (seen, behind)]
        parts.append((lanes, rows, columns, split, masked_attention(*masks)))

    def attention(layer, window, q, k, v, scaling):
        K, V = cache.extend(at, layer, k, v)                        # (S, H, stride, D)
        queries = q[0].transpose(0, 1)                              # (N, Hq, D)
        outs = []
        for lanes, rows, columns, split, attend_in_lanes in parts:
            asking = queries[rows].unflatten(0, split).transpose(1, 2)      # (lanes, Hq, T, D)
            keys, values = K[lanes, :, :columns], V[lanes, :, :columns]
            out = attend_in_lanes(layer, window, asking, keys, values, scaling)
            outs.append(out.flatten(0, 1))                          # (lanes * T, Hq, Dv)
        return torch.cat(outs)[place][None]
    return attention


@dataclass
class Store:
    """The KV of steps, by the key of the path that they end, at most `budget` bytes of it. What was not used
    for longest goes first; it is computed again when needed.

    The segment of a step holds the inputs that predicted it: the last token of its parent and its own but the
    last, which is the first input of its children.
    """
    budget: float
    stored: int = 0
    segments: OrderedDict = field(default_factory=OrderedDict)      # the first goes first

    def keep(self, key, segment):
        if key not in self.segments:
            self.segments[key] = segment
            self.stored += sum(block.nbytes for block in segment)
        while self.stored > self.budget and self.segments:
            self.forget([next(iter(self.segments))])

    def find(self, keys):
        """The segments of the longest beginning of the path `keys` that is here. They count as used, the root
        last: of these, descendants will go before their ancestors."""
        known = [*takewhile(self.segments.__contains__, keys)]
        for key in reversed(known):
            self.segments.move_to_end(key)
        return [self.segments[key] for key in known]

    def forget(self, keys):
        for key in keys:
            for block in self.segments.pop(key, ()):
                self.stored -= block.nbytes


# ---------------------------------------------------------------- the engine: jobs and drafts


@dataclass
class Sample:
    """Tokens drawn after a path. `end`: "step" (at the step's end), "answer" (there, after a final answer),
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
    """A path to draw samples after. `serve` adds the owner and the keys; `submit` splits it into parts of a lane
    each, of which each draws those of the siblings that come from `first` on."""
    path: list                # (key, tokens) of the prompt and of each step to the leaf
    said: list = field(default_factory=list)    # token ids of the steps
    thinking: str = ""        # "<think>" if the prompt has opened a thought
    order: object = 0         # the lowest goes first; `submit` makes it (order, number of the job, first)
    owner: object = None      # the coroutine that waits for the samples
    keys: set = field(default_factory=set)      # of all KV stored for the owner, to be forgotten with it
    samples: list = None      # the result, of all siblings
    first: int = 0

    @property
    def start(self):
        """The columns of its path: all tokens but the last, which is the first input of every sibling."""
        return sum(len(tokens) for _, tokens in self.path) - 1

    def __lt__(self, other):
        return self.order < other.order


@dataclass(slots=True)
class Draft:
    """One sample being drawn, a token at a time."""
    job: Job
    lane: int
    sibling: int              # within its lane
    start: int                # columns of its path
    words: np.ndarray         # (max_tokens, 2) its random words
    newest: int               # the next input
    tokens: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)


@dataclass
class Scheduler:
    """Which samples the next forward draws for: drafts up to max_live, as far as there is memory: long paths
    leave room for fewer lanes, since all are as wide as the widest needs. Where samples outgrow it, the job
    that is last in order gives its lane up and starts again later, to draw the same, as its random words are
    the same."""
    cache: Cache
    max_live: int
    max_tokens: int
    context: int
    waiting: list = field(default_factory=list)     # heap of jobs
    drafts: list = field(default_factory=list)

    HEADROOM = 64             # tokens of each sibling for which a job must find room to start

    def limit(self, start):
        """Tokens that a sample after a path of `start` columns may draw."""
        return min(self.max_tokens, self.context - start - 1)

    def fits(self, start, deepest):
        """Whether there is memory, with no other job there, for samples after paths of start to deepest
        columns."""
        # A deeper path needs more, until the context leaves its samples fewer tokens than max_tokens
        worst = max(start, min(deepest, self.context - 1 - self.max_tokens))
        return worst + self.cache.G * self.limit(worst) <= self.cache.columns

    def used(self):
        """{lane: its columns in use}, without those of the coming token."""
        used = {}
        for draft in self.drafts:
            columns = draft.start + len(draft.tokens) * self.cache.G
            used[draft.lane] = max(columns, used.get(draft.lane, 0))
        return used

    def provide(self, columns, lanes):
        """Make so many lanes of so many columns, if there is memory; which lane is whose may change. Returns
        whether there is."""
        used = self.used()
        if columns <= self.cache.stride and lanes <= self.cache.room():
            return True
        columns = max(columns, *used.values(), 0)
        most = self.cache.columns // lanes
        if most < columns or lanes > self.cache.max_lanes:
            return False
        generous = -(-columns * 5 // 4 // 64) * 64
        numbers = self.cache.resize(min(most, generous), used)
        for draft in self.drafts:
            draft.lane = numbers[draft.lane]
        return True

    def next_job(self):
        """(job, lane) to start now; None if there is none or no room."""
        G = self.cache.G
        if not self.waiting or len(self.drafts) + G > self.max_live:
            return None
        start = self.waiting[0].start
        columns = start + G * min(self.limit(start), self.HEADROOM)
        if not self.provide(columns, len(self.used()) + 1):
            return None
        free = set(range(self.cache.room())) - set(self.used())
        return heapq.heappop(self.waiting), min(free)

    def make_room(self):
        """Make room for the coming tokens, or send the last jobs back. Returns the drafts given up."""
        given_up = []
        while True:
            used = self.used()
            if self.provide(max(used.values()) + self.cache.G, len(used)):
                return given_up
            last = max(draft.job for draft in self.drafts)
            given_up += [draft for draft in self.drafts if draft.job is last]
            self.drafts = [draft for draft in self.drafts if draft.job is not last]
            heapq.heappush(self.waiting, last)


class Ending:
    """Where samples end. To decode a text for every token would be slow: it is done for those few that may
    complete a step's end."""

    def __init__(self, engine):
        self.engine = engine
        self.text_of = decoder(engine.tokenizer)
        self.eos = eos_tokens(engine.model, engine.tokenizer)
        last = engine.format.step_end[-1]
        self.completing = tokens_with(engine.tokenizer, len(engine.tokenizer), last)
        size = engine.model.served.vocabulary
        if max(self.eos, default=0) >= size:
            raise InputError(f"an EOS token is {max(self.eos)}, but the model has only {size} logits: "
                             "correct its generation_config.json, or take its own tokenizer")

    def step_ends(self, draft):
        """Whether the newest token of `draft` completes the step's end after other text, alone (".\\n\\n") or
        with tokens before it ("\\n", "\\n"). Blanks, and ends, that a step begins with do not count."""
        if draft.newest not in self.completing:
            return False
        format = self.engine.format
        step_end = format.step_end
        said = draft.job.said if format.step_tokens else []             # may have ended amid a line
        before = self.text_of(said + draft.tokens[:-1]).rstrip("\ufffd")    # without half a character
        text = self.text_of(said + draft.tokens)
        opening = re.match(rf"(\s|{re.escape(step_end)})*", text)
        unseen = len(before) - len(step_end) + 1                        # where an end not yet seen may begin
        return step_end in text[max(opening.end(), unseen):]

    def __call__(self, draft):
        """How the sample ends with its newest token, see Sample; None if it goes on.

        1. At any EOS. 2. At the step's end after an announced answer: the solution. 3. At the step's end, or
        with the last of the tokens that a step has: the step, unless the whole response is wanted, no other
        step would fit, or an announced answer is still to come (which a number of tokens does not wait for).
        4. At a limit.
        """
        engine, format = self.engine, self.engine.format
        drawn = len(draft.tokens)
        full = draft.start + 1 + drawn >= engine.schedule.context
        if draft.newest in self.eos:
            return "eos"
        at_end = self.step_ends(draft)
        counted = drawn == format.step_tokens
        if at_end or counted:
            response = draft.job.thinking + self.text_of(draft.job.said + draft.tokens)
            waits = format.waits(response)
            if at_end and not waits and format.announces(response):
                return "answer"
            ended = counted if format.step_tokens else not waits
            if ended and not (engine.whole or full):
                return "step"
        return "cut" if full or drawn >= engine.max_tokens else None


@functools.lru_cache(maxsize=2)
def tokens_with(tokenizer, known, character):
    """Those of `known` tokens, len(tokenizer), which is asked for since it may grow, whose text holds
    `character`, or a part of one; after other text: some tokenizers drop the space that a text begins
    with."""
    other = tokenizer.encode("a", add_special_tokens=False)
    skipped = len(tokenizer.decode(other, **PLAIN))
    texts = tokenizer.batch_decode([[*other, i] for i in range(known)], **PLAIN)
    return {i for i, text in enumerate(texts) if character in text[skipped:] or "\ufffd" in text}


def eos_tokens(model, tokenizer):
    """Any EOS of the generation config or of the tokenizer."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    declared = declared if isinstance(declared, (list, tuple)) else [declared]
    return {int(token) for token in (*declared, tokenizer.eos_token_id) if token is not None}


@dataclass(eq=False)
class Engine:
    """Draws samples for many jobs: `submit` jobs; every `advance` returns those that ended. Raises InputError
    for a model that cannot be served."""
    model: torch.nn.Module
    tokenizer: object
    _: KW_ONLY
    siblings: int             # samples a job; more than SHARE take several lanes of the cache
    slots: int | None = None  # jobs at a time; default: as many as make 80 samples on a CPU, else 320
    max_tokens: int
    temperature: float = 1.0
    whole: bool = False       # samples are whole responses instead of steps, whose own KV is not kept
    format: Format = Format()
    kv_budget: float | None = None      # bytes of all keys and values; default: half the free memory

    SHARE = 8                 # siblings in a lane of the cache: each attends over what all of them added

    @torch.inference_mode(False)            # else its memory could be written to in that mode only
    def __post_init__(self):
        check_model(self.model)
        fill = 80 if self.model.device.type == "cpu" else 320
        self.slots = self.slots or max(1, fill // self.siblings)
        context = context_length(self.model)
        self.ending = Ending(self)
        self.token_hash = hash_vocabulary(self.model.served.vocabulary, self.model.device)
        self.clients = {}                       # see serve
        self.numbers = count()                  # of the jobs
        self.stats = dict(prefilled=0, reused=0, sampled=0, forwards=0)         # tokens, and decode forwards
        self.cache, self.store = take_memory(self, context)
        of_a_job = math.ceil(self.siblings / self.cache.G) * self.cache.G
        self.schedule = Scheduler(self.cache, self.slots * of_a_job, self.max_tokens, context)

    def restart(self):
        """Drop what an earlier search left unfinished, with its KV."""
        self.schedule.waiting = []
        self.schedule.drafts = []
        self.store.forget([*self.store.segments])
        self.clients = {}

    def submit(self, job):
        """Let the parts of `job` wait for lanes; they share one list of samples."""
        number = next(self.numbers)
        samples = [None] * self.siblings
        for first in range(0, self.siblings, self.cache.G):
            order = job.order, number, first
            part = replace(job, samples=samples, first=first, order=order)
            heapq.heappush(self.schedule.waiting, part)

    @torch.no_grad()
    def advance(self):
        """Start jobs, draw one token for every live sample, and return the jobs that this completed."""
        while begun := self.schedule.next_job():
            self.begin(*begun)
        if not self.schedule.drafts:
            return []
        for draft in self.schedule.make_room():
            self.stats["sampled"] -= len(draft.tokens)
        drafts = sorted(self.schedule.drafts, key=attrgetter("lane"))
        live = []
        completed = []
        for draft, token, logprob in zip(drafts, *self.draw(drafts)):
            draft.newest = token
            draft.tokens.append(token)
            draft.logprobs.append(logprob)
            end = self.ending(draft)
            if not end:
                live.append(draft)
                continue
            self.finish(draft, end)
            if None not in draft.job.samples:
                completed.append(draft.job)
        self.schedule.drafts = live
        return completed

    def begin(self, job, lane):
        """Turn `job` into drafts."""
        gather(self, job, lane)
        key, tokens = job.path[-1]
        words = random_words(key, self.max_tokens, self.siblings)
        mine = job.samples[job.first:job.first + self.cache.G]
        for sibling, sample in enumerate(mine):
            if sample is None:                  # else it ended before the job gave up its lane
                own = words[job.first + sibling]
                draft = Draft(job, lane, sibling, job.start, own, tokens[-1])
                self.schedule.drafts.append(draft)

    def draw(self, drafts):
        """The next token of each draft and its log-prob. The drafts are sorted by lane."""
        state = [(d.newest, d.lane, d.sibling, d.start, len(d.tokens)) for d in drafts]
        words = [draft.words[len(draft.tokens)] for draft in drafts]
        table = np.hstack((state, words)).T                         # (7, N)
        logits, words = decode(self.model, self.cache, np.ascontiguousarray(table))
        words = torch.stack(words, 1).int()                         # (N, 2)
        token, logprob = pick(logits, words, self.token_hash, self.temperature)
        both = torch.stack((token.to(logprob.dtype), logprob))      # exact: ids are below 2^24
        token, logprob = both.tolist()                              # the only wait for the device
        if not all(map(math.isfinite, logprob)):
            raise InputError(NOT_FINITE.format("the model's"))
        self.stats["forwards"] += 1
        self.stats["sampled"] += len(drafts)
        return map(int, token), logprob

    def finish(self, draft, end):
        """Turn `draft` into a Sample; keep the KV of a step."""
        text = self.ending.text_of(draft.tokens)
        place = draft.job.first + draft.sibling
        draft.job.samples[place] = Sample(draft.tokens, draft.logprobs, text, end)
        if end == "step":
            key = hash_tokens(draft.job.path[-1][0], draft.tokens)
            first = draft.lane * self.cache.stride + draft.start + draft.sibling
            segment = self.cache.take(first, len(draft.tokens), every=self.cache.G)
            self.store.keep(key, segment)
            draft.job.keys.add(key)


def gather(engine, job, lane):
    """Bring the KV of the path of `job` into `lane`, all tokens but the last: what is stored, and the rest
    computed."""
    keys, steps = zip(*job.path)
    inputs = [*chain(*steps)]
    stops = accumulate(map(len, steps), initial=0)
    bounds = [max(0, stop - 1) for stop in stops]                   # of the segments, see Store
    found = engine.store.find(keys)
    have, need = bounds[len(found)], bounds[-1]
    column = lane * engine.cache.stride
    if found:
        engine.cache.put(column, found)
    if have < need:
        prefill(engine.model, engine.cache, lane, have, inputs[have:need])
        for i in range(len(found), len(keys)):
            begin, stop = bounds[i], bounds[i + 1]
            segment = engine.cache.take(column + begin, stop - begin)
            engine.store.keep(keys[i], segment)
            job.keys.add(keys[i])
    engine.stats["reused"] += have
    engine.stats["prefilled"] += need - have


def take_memory(engine, context):
    """The cache of the live samples, which come first, and a store with the rest of the budget."""
    model = engine.model
    layers, dtype = model.served.layers, model.served.dtype
    column_bytes = dtype.itemsize * sum(heads * size for heads, size in chain(*layers))
    parts = -(-engine.siblings // engine.SHARE)                     # lanes of a job
    siblings = -(-engine.siblings // parts)
    # In spare lanes further jobs take the place of samples that finish; whole responses need the columns.
    spare = 0 if engine.whole else engine.slots // 2
    max_lanes = parts * (engine.slots + spare)
    budget = engine.kv_budget
    if budget is None:
        budget = 0.5 * free_memory(model.device)
    one_job = column_bytes * (1024 + siblings * engine.max_tokens)  # after a path of usual length
    share = min(budget, max(budget / 2, one_job))
    most = max_lanes * (context + siblings * engine.max_tokens)
    columns = min(int(share / column_bytes), most)
    cache = Cache(layers, dtype, model.device, max_lanes=max_lanes, siblings=siblings, columns=columns)
    return cache, Store(budget - cache.nbytes)


def some_weights(model):
    """A few values of every weight: enough to notice that it was trained. Of sharded weights nothing, since
    they come and go."""
    weights = [p.detach() for p in model.parameters()]
    if any(hasattr(weight, "to_local") for weight in weights):
        return []
    some = []
    for weight in weights:
        every = 1 + weight.numel() // 16
        some.append(weight.flatten()[::every].float())
    return torch.cat(some).tolist()


def free_memory(device):
    """Bytes that may be taken: on a GPU with what torch has cached, else what Linux calls available (page
    cache included; other systems: 8 GiB), within the limits of the control groups, of version 1 or 2, that the
    process is in."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = re.search(r"MemAvailable: *(\d+)", read("/proc/meminfo"))
    free = [1024 * int(available[1]) if available else 2**33]
    own = re.search(r"^0::/(.+)$", read("/proc/self/cgroup"), re.M)
    names = own[1].split("/") if own else []
    groups = [("/sys/fs/cgroup/memory", "limit_in_bytes", "usage_in_bytes")]
    groups += [(folder, "max", "current") for folder in accumulate(["/sys/fs/cgroup", *names], os.path.join)]
    for folder, limit, usage in groups:
        most = read(f"{folder}/memory.{limit}").strip()
        if most.isdigit():
            cached = re.findall(r"\binactive_file (\d+)", read(f"{folder}/memory.stat"))
            used = int(read(f"{folder}/memory.{usage}"))
            free.append(int(most) - used + sum(map(int, cached)))
    return max(0, min(free))


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


# ---------------------------------------------------------------- what others call


def ignore(number):
    """The callback of callers who ask for none."""


def search(model, tokenizer, problems, reward_fn, *, iterations=80, breadth=5, depth=8, c_puct=1.5,
           candidates=None, seed=0, slots=None, max_step_tokens=256, kv_budget=None, format=Format(),
           engine=None, progress=ignore):
    """Search one tree for each of `problems` (Sec. 4.2) and yield each finished Tree, in order of completion.

    problems           dicts with `question` and `answer`; any iterable, read as trees finish
    reward_fn          (response text, answer) -> +1 or -1; by name it also gets what else it asks for: other
                       fields of the problem, and the `marker` of the format
    iterations         expansions a tree at most
    breadth            children kept at an expansion, of `candidates` sampled (default: as many)
    depth              steps a solution may have
    max_step_tokens    a step cut at this length is a failure
    slots, kv_budget   see Engine
    engine             a ready Engine of that model, instead of slots, candidates, max_step_tokens, format and
                       kv_budget
    progress           called with the iterations completed; a tree that ends early counts its rest

    The same seed gives the same trees, whatever `slots` and `kv_budget`: random numbers belong to seed,
    question, path, sibling and position. (In float64; in float32 the rounding of another batch flips about
    one token in 10^7, in bfloat16 on a GPU about one in 100.) Raises InputError for settings out of range, a
    model that cannot be served or whose weights change meanwhile, a reward that is not +1 or -1. A question
    that is blank, or fills the model's context or the KV memory, is skipped with a line on stderr.
    """
    if engine:
        is_theirs = engine.model is model and engine.tokenizer is tokenizer
        if not is_theirs or engine.whole or engine.temperature != 1:
            raise InputError("this engine draws for another model, whole responses, or not at temperature 1: "
                             "give one that draws steps, made with the same model and tokenizer")
        candidates, max_step_tokens, format = engine.siblings, engine.max_tokens, engine.format
    if candidates is None:
        candidates = breadth
    config = dict(iterations=iterations, breadth=breadth, depth=depth, c_puct=c_puct, candidates=candidates,
                  seed=seed, max_step_tokens=max_step_tokens)
    check_search(config | dict(slots=slots, kv_budget=kv_budget))
    check_range(max_step_tokens=(max_step_tokens, format.step_tokens or 1))
    config |= dict(tokenizer=fingerprint(tokenizer), eos=sorted(eos_tokens(model, tokenizer)),
                   step_end=format.step_end, step_tokens=format.step_tokens, marker=format.marker)
    engine = engine or Engine(model, tokenizer, slots=slots, siblings=candidates, max_tokens=max_step_tokens,
                              format=format, kv_budget=kv_budget)
    return serve(engine, (explore(engine, reward_fn, config, progress, problem) for problem in problems))


def stream(model, tokenizer, prompts, *, n=1, temperature=1.0, max_new_tokens=1024, seed=0, slots=None,
           kv_budget=None, format=Format(), progress=ignore):
    """n full responses to each prompt (text or token ids), by the engine of the search: an iterator of (index
    of the prompt, list of n Samples), as they complete. The list is empty if the prompt fills the model's
    context or the KV memory. A prompt given again draws other ones.

    A response ends by the rule of the search: EOS, a blank line after the final answer, or the token limit.
    No top-k, no top-p; temperature 0 takes the likeliest token. Log-probs are those at temperature 1.
    `progress` is called with the number of tokens drawn and, when responses end, of those left of their limit: in
    all len(prompts) * n * max_new_tokens; `slots` and `kv_budget` are those of Engine.
    """
    check_range(n=(n, 1), slots=(slots, 1), max_new_tokens=(max_new_tokens, 1))
    check_range(temperature=(temperature, 0), kv_budget=(kv_budget, 0))
    prompts = [encode(tokenizer, p) if isinstance(p, str) else [*p] for p in prompts]
    engine = Engine(model, tokenizer, slots=slots, siblings=n, max_tokens=max_new_tokens, whole=True,
                    temperature=temperature, format=format, kv_budget=kv_budget)
    seen = Counter()

    def respond(index, prompt):
        before = seen[tuple(prompt)]
        seen[tuple(prompt)] += 1
        path = root_path(engine, prompt, seed, tokenizer.decode(prompt), repeat=before)
        samples = (yield Job(path, thinking=thinking(tokenizer, prompt))) if path else []
        drawn = sum(len(s.tokens) for s in samples)
        progress(n * max_new_tokens - drawn)
        return index, samples
    return serve(engine, map(respond, count(), prompts), drawn=progress)


def sample(model, tokenizer, prompts, **settings):
    """The responses of `stream`, with its arguments, in the order of the prompts: n Samples for each."""
    responses = dict(stream(model, tokenizer, prompts, **settings))
    return [responses[index] for index in sorted(responses)]


def check_search(settings):
    """Raise InputError for the first of the keyword arguments of `search` that is out of range."""
    least = dict.fromkeys(("iterations", "breadth", "depth", "max_step_tokens", "slots"), 1)
    least |= dict(c_puct=0, kv_budget=0, candidates=settings["breadth"])
    check_range(**{name: (settings[name], bound) for name, bound in least.items()})


def serve(engine, clients, drawn=ignore):
    """Serve clients, twice as many at a time as there are slots, so that all are busy.

    clients: an iterator of coroutines, each of which yields a Job, is sent its samples, and so on. Yields what
    each returns, unless None, as they end. drawn is called with the number of new tokens.

        engine  <- Job, tokens ->  serve  <- Job, samples ->  explore  <- leaf, samples ->  grow
    """
    engine.restart()
    keys = engine.clients                       # of the KV stored for each client
    while True:
        if not keys:                            # so there is no KV, which might be that of other weights
            weights = some_weights(engine.model)
        sent = [(client, None) for client in islice(clients, 2 * engine.slots - len(keys))]     # begins them
        keys |= {client: set() for client, _ in sent}
        if not keys:
            return
        if engine.clients is not keys:
            raise InputError("another search has begun on this engine: let one end before the next, or "
                             "give each an engine of its own")
        before = engine.stats["sampled"]
        sent += [(job.owner, job.samples) for job in engine.advance()]
        drawn(engine.stats["sampled"] - before)
        ended = []
        for client, samples in sent:
            try:
                job = client.send(samples)
            except StopIteration as done:
                engine.store.forget(keys.pop(client))
                if done.value is not None:
                    ended.append(done.value)
            else:
                engine.submit(replace(job, owner=client, keys=keys[client]))
        if ended:
            yield from ended                                        # whoever takes them may train the model
            if keys and some_weights(engine.model) != weights:
                raise InputError("the model's weights changed while its samples were drawn: let the search "
                                 "end, or start another")


def explore(engine, reward_fn, config, progress, problem):
    """A client of `serve`: makes jobs of the leaves that `grow` asks for; returns the tree."""
    left = config["iterations"]
    deeper = (config["depth"] - 1) * engine.max_tokens
    prompt = build_prompt(engine.tokenizer, problem["question"], format=engine.format)
    root = root_path(engine, prompt, config["seed"], problem["question"], deeper=deeper)
    if not root:
        progress(left)
        return None
    thought = thinking(engine.tokenizer, prompt)
    outcome = functools.partial(outcome_of, engine, reward_fn, problem, thought)
    tree = Tree(problem["question"], problem["answer"], prompt, config)
    limits = {name: config[name] for name in ("iterations", "breadth", "depth", "c_puct")}
    leaves = grow(tree, outcome, **limits)
    samples = None
    while True:
        try:
            leaf = leaves.send(samples)
        except StopIteration:
            progress(left)
            return tree
        path = [*root]
        said = []
        for i in tree.path(leaf):
            tokens = tree.nodes[i].tokens
            path.append((hash_tokens(path[-1][0], tokens), tokens))
            said += tokens
        samples = yield Job(path, said, thought, order=-left)       # the least advanced tree goes first
        left -= 1
        progress(1)


def root_path(engine, prompt, seed, name, repeat=0, deeper=0):
    """The path of a root, see Job; None, with a line on stderr, for a prompt that cannot be answered. Its key
    names its KV, and is that of its random numbers: so it depends on the seed, and on the `repeat`."""
    n, context = len(prompt), engine.schedule.context
    why = None
    if not prompt or not name.strip():
        why = "a blank question"
    elif n >= context:
        why = f"a prompt of {n} tokens does not fit the model's context of {context}"
    elif not engine.schedule.fits(n - 1, n - 1 + deeper):
        why = f"what may follow a prompt of {n} tokens does not fit into the KV memory (kv_budget)"
    if why:
        print(f"skipped: {why}: {name[:60]!r}...", file=sys.stderr)
        return None
    key = (seed % 2**64).to_bytes(8, "little")
    key = hash_tokens(hash_tokens(key, [repeat]) if repeat else key, prompt)
    return [(key, prompt)]


def outcome_of(engine, reward_fn, problem, thought, tokens):
    """(reward, valid) of a response: what the reward function says, and whether it may be a training path."""
    response = thought + engine.ending.text_of(tokens)
    offered = dict(problem, marker=engine.format.marker)
    asked = inspect.signature(reward_fn).parameters
    names = [*asked][2:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in asked.values()):
        names += problem.keys() - {"question", "answer"}
    others = {name: offered[name] for name in names if name in offered}
    reward = reward_fn(response, problem["answer"], **others)
    number = isinstance(reward, numbers.Real) and not isinstance(reward, bool)
    if not number or reward not in (1, -1):
        raise InputError(f"the reward function returned {reward!r}: a reward is +1 or -1")
    reward = int(reward)
    return reward, reward > 0 or engine.format.announces(response)


def thinking(tokenizer, prompt):
    """The tag with which the prompt has opened a thought, as the templates of some models do; else ""."""
    return tasks.opened_thought(tokenizer.decode(prompt[-8:]))


# ---------------------------------------------------------------- pictures


def paint(text, value):
    """`text` in red (value -1) to green (+1) on a terminal, plain elsewhere."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    value = max(-1.0, min(1.0, value))
    green = round(2.5 * (value + 1))                                # 0 ... 5, the 6 x 6 x 6 colour cube
    return f"\033[38;5;{16 + 36 * (5 - green) + 6 * green}m{text}\033[0m"


MARKS = {"right": "+", "wrong": "-"}


def picture(tree, width=110, i=0, indent=""):
    """Lines that show `tree` from node i on: the credit on each edge, V, N and the step on each node; +
    right, - wrong, x failed. Steps below which nothing ended (N = 0) are only counted."""
    node = tree.nodes[i]
    if i == 0:
        question = " ".join(tree.question.split())
        yield f"{paint(node.summary, node.value)} {question} -> {tree.answer}"
    children = [j for j in node.children if tree.nodes[j].visits]
    for j in children:
        node = tree.nodes[j]
        branch, deeper = ("└─", "   ") if j == children[-1] else ("├─", "│  ")
        mark = MARKS.get(tree.ending(j), "x") if node.terminal else " "
        edge = f"{indent}{branch} {tree.credit(j):+.2f} ─ "
        head = f"{node.summary} {mark} "
        room = max(1, width - len(edge) - len(head))
        text = " ".join(node.text.split())
        if len(text) > room:
            text = text[:room - 1] + "…"
        yield edge + paint(head, node.value) + text
        yield from picture(tree, width, j, indent + deeper)
    unvisited = sum(node.visits == 0 for node in tree.nodes[1:]) if i == 0 else 0
    if unvisited:
        yield f"(unvisited steps left out: {unvisited})"


PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>Search trees</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
details > :not(summary) { margin: .15em 0 .15em 1.6em } summary { cursor: pointer }
pre { font: inherit; white-space: pre-wrap; display: inline-block; vertical-align: top; margin: 0 4px }
pre { max-width: 85% } b, i { font: 12px monospace; border-radius: 3px; padding: 1px 5px } i { color: #666 }
.right { background: #d9f2d9 } .wrong { background: #fadcd9 } .failed { background: #eee }
</style><h1>Search trees</h1><p>On each step: its credit r + V(s') - V(s), then V and N; + right, - wrong,
x a failure of form: cut, deep, unanswered.</p>"""


def page(trees):
    """The HTML of a page that lists `trees` by question and unfolds them; it needs nothing but itself."""
    return PAGE + "\n".join(unfolding(tree, 0) for tree in trees)


def unfolding(tree, i):
    """Node i as HTML and, folded, its children; those below which nothing ended in a fold of their own."""
    children = tree.nodes[i].children
    if not children:
        return f"<div>{label(tree, i)}</div>"
    below = [unfolding(tree, j) for j in children if tree.nodes[j].visits]
    rest = [unfolding(tree, j) for j in children if not tree.nodes[j].visits]
    if rest:
        below.append(fold(f"{len(rest)} unvisited", rest))
    return fold(label(tree, i), below)


def fold(title, parts):
    return f"<details><summary>{title}</summary>{''.join(parts)}</details>"


def label(tree, i):
    node = tree.nodes[i]
    counts = f'<b style="background: hsl({60 + 60 * node.value:.0f} 80% 85%)">{node.summary}</b>'
    if i == 0:
        listed = ", ".join(f"{n} {end}" for end, n in tree.endings().most_common())
        outcome = html.escape(f"-> {tree.answer} · {listed}")
        return f"{counts} <pre>{html.escape(tree.question)}</pre> <i>{outcome}</i>"
    end = tree.ending(i) if node.terminal else ""
    kind = end if end in MARKS else "failed" if end else ""
    mark = MARKS.get(end, f"x {end}:" if end else "")
    text = html.escape(f"{mark} {node.text.strip()}")
    credit = f"{tree.credit(i):+.2f}" if node.visits else "unvisited"
    return f'<i>{credit}</i> {counts} <pre class="{kind}">{text}</pre>'


def describe(trees):
    """Of some trees: how many, how many with a right and a valid wrong solution, the mean value of the root,
    tokens a step, and the share of each kind of ending."""
    endings = Counter()
    total = Counter()
    for tree in trees:
        kinds = tree.endings()
        endings += kinds
        total["trees"] += 1
        total["with right"] += "right" in kinds
        total["with wrong"] += "wrong" in kinds
        total["mixed"] += {"right", "wrong"} <= kinds.keys()
        total["value"] += tree.nodes[0].value
        total["steps"] += len(tree.nodes) - 1
        total["tokens"] += sum(len(node.tokens) for node in tree.nodes)
    ended = max(1, endings.total())
    counts = {key: total[key] for key in ("trees", "with right", "with wrong", "mixed")}
    return counts | {
        "root_value": total["value"] / max(1, total["trees"]),
        "endings": {kind: endings[kind] / ended for kind in ("right", "wrong", *REMEDY)},
        "tokens_per_step": total["tokens"] / max(1, total["steps"]),
    }


REMEDY = {"cut": "steps reach the limit of tokens: raise --max-step-tokens",
          "deep": "solutions have more steps than allowed: raise --depth",
          "unanswered": f"solutions end without '{MARKER}': let --bootstrap of dvo.py teach the form, or take a "
                        "model that follows the instruction"}


def explain(found):
    """What `describe` found, and what to change if most solutions failed in form."""
    shares = found["endings"]
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    text = (f"of {found['trees']} questions {found['with right']} have a correct solution, "
            f"{found['with wrong']} a valid wrong one, {found['mixed']} both; endings: {kinds}; "
            f"{found['tokens_per_step']:.0f} tokens a step")
    if sum(shares.values()) > 0 and shares["right"] + shares["wrong"] < 0.5:
        worst = max(REMEDY, key=shares.get)
        text += f"; most endings are failures of form, which are no training paths: {REMEDY[worst]}"
    return text


# ---------------------------------------------------------------- the command line


def add_search_flags(parser):
    """The settings of `search`, with its defaults: the one place where they are written is its signature."""
    group = parser.add_argument_group("search (Sec. 4.2)")
    for flag, kind, text in (
            ("iterations", int, "expansions a tree at most; paper: 80"),
            ("breadth", int, "children kept at an expansion; paper: 5"),
            ("depth", int, "steps a solution may have; paper: 8"),
            ("c-puct", float, "weight of exploration in PUCT; the authors' code: 1.5"),
            ("candidates", int, "steps sampled at an expansion, at temperature 1; the likeliest stay; default: "
                                "as breadth"),
            ("max-step-tokens", int, "a step cut at this length is a failure"),
            ("slots", int, "leaves whose samples fill a forward; default: 80 samples, 320 on a GPU"),
            ("kv-budget", float, "GiB of keys and values; default: half of the free memory")):
        default = search.__kwdefaults__[flag.replace("-", "_")]
        group.add_argument(f"--{flag}", type=kind, default=default, metavar="N",
                           help=text if default is None else f"{text} (default: {default})")


def search_settings(args):
    """Keyword arguments of `search` from parsed flags, --seed included."""
    names = search.__kwdefaults__.keys() - {"format", "engine", "progress"}
    settings = {name: getattr(args, name) for name in names}
    check_range(kv_budget=(args.kv_budget, 0))
    if args.kv_budget is not None:
        settings["kv_budget"] = args.kv_budget * 2**30
    return settings


def search_file(args):
    """Search the questions of a file and append each tree to another as it is finished. What is there is not
    searched again; under torchrun each rank does its share into a file of its own."""
    settings = search_settings(args)
    check_search(settings)
    settings["candidates"] = settings["candidates"] or args.breadth
    rank, world = tasks.ranks()
    if world > 1:
        stem, suffix = os.path.splitext(args.out)
        args.out = f"{stem}.{rank}{suffix}"
        if torch.cuda.is_available() and args.device in (None, "cuda"):
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if os.path.realpath(args.out) == os.path.realpath(args.data):
        raise InputError(f"--out is --data, {args.out}: choose another file for the trees")
    problems = tasks.load_problems(args.data, split="train")[:args.limit]
    with open_lines(args.out) as out:
        mine = problems[rank::world]
        left = not_searched(mine, args.out, settings | {"model": args.model})
        model, tokenizer = load_model(args.model, args.device, args.dtype)
        not_searched(left, args.out, {"tokenizer": fingerprint(tokenizer)})
        total = len(left) * args.iterations
        with tasks.progress("search", total, "iteration", disable=rank > 0) as bar:
            for tree in search(model, tokenizer, left, tasks.reward, progress=bar.update, **settings):
                tree.config["model"] = args.model
                write_line(out, tree.record())
    found = explain(describe(known_trees(args.out)))
    print(f"{args.out}: {len(left)} questions searched now; {found}", file=sys.stderr)


def known_trees(path):
    """The trees that a file of --out holds; none of a device, which may have no end."""
    return read_trees(path) if os.path.isfile(path) else ()


def not_searched(problems, path, settings):
    """Those of `problems` that have no tree in the file, whose trees must have the same settings."""
    there = Counter()
    for tree in known_trees(path):
        there[tree.question] += 1
        for name in settings.keys() & tree.config.keys():
            if tasks.resolved(settings[name]) != tasks.resolved(tree.config[name]):
                raise InputError(f"{path} holds trees of {name} {tree.config[name]}, not {settings[name]}: "
                                 "choose another --out")

    def is_new(problem):
        there[problem["question"]] -= 1
        return there[problem["question"]] < 0
    return list(filter(is_new, problems))


def main():
    """The command: draw trees, or search and append each tree to a file as it is finished."""
    parser = argparse.ArgumentParser(description="Search reasoning trees (Direct Value Optimization).")
    parser.add_argument("--model", help="Hugging Face folder or hub name")
    parser.add_argument("--data", help="a task, whose training questions are taken, or a JSON Lines file")
    parser.add_argument("--out", help="file to append trees to; what is there is not searched again")
    parser.add_argument("--limit", type=int, help="the first N questions, or trees, only")
    parser.add_argument("--seed", type=int, default=search.__kwdefaults__["seed"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"),
                        help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--show", metavar="TREES", help="draw the trees of this file instead of searching")
    parser.add_argument("--html", metavar="TREES", help="print a page that unfolds the trees of this file")
    add_search_flags(parser)
    args = parser.parse_args()
    check_range(limit=(args.limit, 1))
    if args.html:
        sys.stdout.reconfigure(encoding="utf-8", errors="xmlcharrefreplace")    # as the page says
        print(page(islice(read_trees(args.html), args.limit)))
    elif args.show:
        width = shutil.get_terminal_size((110, 24)).columns
        for tree in islice(read_trees(args.show), args.limit):
            print(*picture(tree, width), sep="\n", end="\n\n")
    elif args.model and args.data and args.out:
        search_file(args)
    else:
        raise InputError("give --model, --data and --out to search, or --show TREES or --html TREES to look")


if __name__ == "__main__":
    run_command(main)
