"""Direct Value Optimization (Zhang et al. 2025, arXiv 2502.13723): reasoning, learnt without preferences.

    python dvo.py                                       # the demo: minutes on a laptop, nothing to download
    python dvo.py --model M --data train.jsonl --eval-data test.jsonl --out RUN
    python dvo.py --model M --trees RUN/round1/trees.*.jsonl --objective kto --out RUN2     # any objective
    torchrun --nproc_per_node=8 dvo.py --model meta-llama/Meta-Llama-3-8B-Instruct    # the paper's run

A round: search a tree of reasoning steps for each question (mcts.py), so that every state s gets a value
V(s), the mean outcome of the solutions found below it; then train the policy pi by plain mean squared error
until, for every step a_t of the solutions drawn from the tree,

    beta * log( pi(a_t|s_t) / pi_ref(a_t|s_t) )  =  r(s_t, a_t) + V(s_{t+1}) - V(s_t)            (Eq. 10)

pi_ref being the policy at the start of the round. The right side is the step's *credit*: how much better off
the step left the solver. The file reads in that order: pack (many paths, one sequence), step log-probs,
losses, examples, training, many GPUs, the run folder, rounds, the demo, the command line.
"""
import argparse
import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast)

import eval as tasks
import mcts
from mcts import InputError

# ---------------------------------------------------------------- many paths, one sequence


@dataclass
class Pack:
    """The union of some paths of one tree as one sequence: every token of every node once, T in all.

    A token sees the tokens on its own path only, and the hidden state that predicts it is that of its
    predecessor on the path (`before`), not of its left neighbour. So log-probs and gradient are as with one
    row a path.
    """
    tokens: np.ndarray        # (T,) the prompt, then the nodes, parents before children
    position: np.ndarray      # (T,) depth in tokens along the path
    before: np.ndarray        # (T,) index of the predecessor on the path; -1 for the first
    node: np.ndarray          # (T,) index of the token's node in the tree; 0 in the prompt
    num_nodes: int            # of the whole tree

    def mask(self):
        """(T, T) bool, which tokens each token sees: all that its predecessor sees, and itself."""
        T = len(self.tokens)
        mask = np.eye(T, dtype=bool)
        for t in range(1, T):
            mask[t, :t] = mask[self.before[t], :t]
        return mask

    def states(self):
        """(num_nodes,) where the last token of each node is, for the root of the prompt; -1 outside."""
        last = np.full(self.num_nodes, -1)
        last[self.node] = np.arange(len(self.node))                 # the last of a node's tokens wins
        return last


def pack(tree, paths):
    """Pack `paths`, each a list of node indices from the first step down (tree.path(i)), into one sequence.

    >>> tree = mcts.Tree("q", "a", prompt=[5, 6])
    >>> a, b = tree.add(mcts.Node(0, [7, 8])), tree.add(mcts.Node(0, [9]))
    >>> p = pack(tree, [tree.path(a), tree.path(b)])
    >>> p.tokens.tolist(), p.position.tolist(), p.before.tolist(), p.node.tolist()
    ([5, 6, 7, 8, 9], [0, 1, 2, 3, 2], [-1, 0, 1, 2, 1], [0, 0, 1, 1, 2])
    """
    n = len(tree.prompt)
    tokens, position, before, node = list(tree.prompt), list(range(n)), list(range(-1, n - 1)), [0] * n
    last = {0: n - 1}                                               # where the last token of each node is
    for i in sorted({i for path in paths for i in path}):
        previous = last[tree.nodes[i].parent]
        for token in tree.nodes[i].tokens:
            tokens.append(token)
            position.append(position[previous] + 1)
            before.append(previous)
            node.append(i)
            previous = len(tokens) - 1
        last[i] = previous
    return Pack(*(np.array(x, dtype=np.int32) for x in (tokens, position, before, node)), len(tree.nodes))


def collate(packs, device):
    """Right-pad packs to a batch: tokens (B, T), positions (B, T), mask (B, 1, T, T); (R,) for each of the R
    tokens of steps, where in the flattened batch the hidden state that predicts it is, the token, its slot in
    the packs' concatenated node vectors; and (M,) where the state of each packed node is, and its slot."""
    B, T = len(packs), max(len(p.tokens) for p in packs)
    tokens, position = np.zeros((2, B, T), dtype=np.int64)
    mask = np.zeros((B, 1, T, T), dtype=bool)
    mask[:, 0] |= np.eye(T, dtype=bool)                             # a padded row sees itself: no NaN
    source, target, slot, state, state_slot, first = [], [], [], [], [], 0
    for b, p in enumerate(packs):
        t = len(p.tokens)
        tokens[b, :t], position[b, :t], mask[b, 0, :t, :t] = p.tokens, p.position, p.mask()
        step = p.node > 0
        source.append(b * T + p.before[step])
        target.append(p.tokens[step])
        slot.append(first + p.node[step])
        last = p.states()
        state.append(b * T + last[last >= 0])
        state_slot.append(first + np.flatnonzero(last >= 0))
        first += p.num_nodes
    indices = (np.concatenate(x).astype(np.int64) for x in (source, target, slot, state, state_slot))
    return [torch.from_numpy(x).to(device) for x in (tokens, position, mask, *indices)]


class Policy(nn.Module):
    """A causal LM to shard and train: its parameters are used in here only, where FSDP gathers them.

    policy(packs=[...]) -> one (num_nodes,) vector of step log-probs a pack, in float32 (float64 for a float64
    LM); with values=True (2, num_nodes), the second row V of the state that each step leads to, by a scalar
    head that starts at 0; policy(input_ids=...) -> the language model's own output.
    """

    def __init__(self, lm, compute=None, value_head=False):
        super().__init__()
        self.lm, self.config, self.generation_config = lm, lm.config, lm.generation_config
        self.compute = compute or lm.dtype                          # the type it computes in and is saved in
        self.value_head = None
        if value_head:
            self.value_head = nn.Linear(lm.config.hidden_size, 1, device=lm.device, dtype=lm.dtype)
            for parameter in self.value_head.parameters():
                nn.init.zeros_(parameter)

    @property
    def device(self):
        return self.lm.device

    def forward(self, packs=None, values=False, **inputs):
        """Step log-probs, and values if asked, of packs; without packs the LM's own output. See the class."""
        if packs is None:
            return self.lm(**inputs)
        tokens, position, mask, source, target, slot, state, state_slot = collate(packs, self.device)
        embed, head = self.lm.get_input_embeddings(), self.lm.get_output_embeddings()
        # an additive mask, since a boolean one is right for sdpa but silently wrong for eager attention
        bias = torch.zeros(mask.shape, dtype=embed.weight.dtype, device=mask.device)
        bias.masked_fill_(~mask, torch.finfo(bias.dtype).min)
        hidden = self.lm.base_model(
            input_ids=tokens, position_ids=position, attention_mask=bias, use_cache=False)[0]
        hidden = hidden.flatten(0, 1)                               # (B, T, D) -> (B * T, D)

        def token_logprobs(hidden, target):
            logits = head(hidden)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)

        rows = max(1, 2**26 // head.out_features)                   # the (R, V) logits never exist at once
        logprobs = torch.cat([checkpoint(token_logprobs, h, t, use_reentrant=False)
                              for h, t in zip(hidden[source].split(rows), target.split(rows))])
        sizes = [p.num_nodes for p in packs]
        nodes = logprobs.new_zeros(sum(sizes)).index_add(0, slot, logprobs)
        if values:
            value = self.value_head(hidden[state])[:, 0].to(nodes)      # (M, D) -> (M,)
            nodes = torch.stack((nodes, torch.zeros_like(nodes).index_add(0, state_slot, value)))
        return nodes.split(sizes, -1)


def step_logprobs(model, pack):
    """(num_nodes,) log pi(a|s) of every step in `pack`, summed over its tokens, EOS included; 0 for nodes
    outside.

    `model` is a Policy or a plain causal LM. Differentiable.
    """
    policy = model if isinstance(model, Policy) else Policy(model)
    return policy(packs=[pack])[0]


# ---------------------------------------------------------------- objectives: functions of step log-probs


def dvo_loss(policy, reference, credit, path, beta=0.1, level="step"):
    """Direct Value Optimization: (P,) loss of each path (Eq. 10 at the step level, Sec. 6.5 at the response
    level).

    policy, reference, credit: (num_nodes,) log pi, log pi_ref and r + V(s') - V(s) of every step; path: (P,
    num_nodes), 1 where a node lies on the path. Where the paper has half the sum over a path's steps, this is
    their mean: a long path counts no more than a short one.

    >>> policy, reference, credit = torch.tensor([[0., 3.], [0., 1.], [0., 0.5]])
    >>> dvo_loss(policy, reference, credit, path=torch.tensor([[0., 1.]]))      # (0.1 * (3 - 1) - 0.5)^2
    tensor([0.0900])
    """
    log_ratio = policy - reference
    if level == "response":
        return (beta * (path @ log_ratio) - path @ credit) ** 2     # Sec. 6.5: credits sum to r - V(s_0)
    squared_error = (beta * log_ratio - credit) ** 2                # Eq. 10
    return path @ squared_error / path.sum(1)


def rft_loss(policy, path):
    """Rejection sampling fine-tuning (Sec. 5): (P,) negative log-likelihood of each (correct) path."""
    return -(path @ policy)


def dpo_loss(policy, reference, chosen, rejected, beta=0.1):
    """Direct preference optimisation on whole paths (Eq. 2; arXiv 2305.18290, Eq. 7): (P,) loss of each pair.

    chosen, rejected: (P, num_nodes), 1 where a node lies on the better, on the worse path of the pair.

    >>> policy, reference = torch.tensor([[0., 3., 1.], [0., 1., 2.]])
    >>> dpo_loss(policy, reference, torch.tensor([[0., 1., 0.]]), torch.tensor([[0., 0., 1.]]), beta=1.)
    tensor([0.0486])
    """
    margin = (chosen - rejected) @ (policy - reference)
    return -F.logsigmoid(beta * margin)                             # Eq. 2


def step_dpo_loss(policy, reference, chosen, rejected, beta=0.1):
    """Step-DPO (App. C; arXiv 2406.18629, Eq. 2): dpo_loss on two steps taken in the same state, so each row
    of chosen and of rejected, (P, num_nodes), holds a single 1."""
    return dpo_loss(policy, reference, chosen, rejected, beta)


def kto_loss(policy, reference, path, correct, z0, beta=0.1, lambda_correct=1.33, lambda_incorrect=1.0):
    """Kahneman-Tversky optimisation (arXiv 2402.01306, Eq. 8; weights as in App. C): (P,) loss of each path.

    correct: (P,) bool; z0: the reference point, an estimate of KL(pi || pi_ref) in nats, at least 0, without
    gradient: see `reference_point`. The loss of a path lies between 0 and its lambda.
    """
    gain = beta * (path @ (policy - reference) - z0)                # of the policy over its reference
    weight = torch.where(correct, lambda_correct, lambda_incorrect).to(gain)
    return weight * torch.sigmoid(torch.where(correct, -gain, gain))    # lambda - lambda * sigmoid(+-gain)


def oreo_loss(policy, reference, value, path, parent, outcome, beta=0.1, alpha=0.01):
    """Offline reasoning optimisation at the step level (App. D; arXiv 2412.16145): (P,) loss of each path,
    value and policy part together.

    value: (num_nodes,) V of the state each step leads to, by the value head; parent: (num_nodes,) index of
    the node in whose state a step is taken; outcome: (P,) R, +1 or -1. Both parts ask for the soft Bellman
    equation V(s_t) = R - beta * sum_{i >= t} log_ratio_i, one by V(s_t), the other by the log-ratio of step t
    alone. The KL of the regulariser is estimated by half the squared log-ratio of the sampled steps.
    """
    log_ratio = path * (policy - reference)                         # (P, num_nodes), 0 off the path
    ahead = log_ratio.detach().flip(1).cumsum(1).flip(1)            # sum_{i >= t}: parents have lower indices
    before, R = value[parent], outcome[:, None]                     # V(s_t), (num_nodes,)
    value_error = before - R + beta * ahead
    policy_error = before.detach() - R + beta * (log_ratio + ahead - log_ratio.detach())
    per_step = value_error ** 2 + policy_error ** 2 + alpha * log_ratio ** 2 / 2
    return (path * per_step).sum(1) / path.sum(1)


def value_loss(value, path, parent, outcome):
    """Outcome value model (Sec. 4.4.2): (P,) mean over the states s_t of each path of (V(s_t) - R)^2.
    Arguments as in oreo_loss."""
    return (path * (value[parent] - outcome[:, None]) ** 2).sum(1) / path.sum(1)


# ---------------------------------------------------------------- from trees to training examples


@dataclass
class Example:
    """What one question contributes: packed paths or steps and, per node of its tree, what losses ask for."""
    pack: Pack
    path: torch.Tensor        # (P, num_nodes) 1 where a node lies on the path (Step-DPO: is the step)
    correct: torch.Tensor     # (P,) bool; of pairs, first all chosen ones, then their rejected ones
    units: int                # losses it gives: paths or pairs
    parent: torch.Tensor      # (num_nodes,) index; 0 for the root
    reward: torch.Tensor      # (num_nodes,) r; 0 but on terminals
    value: torch.Tensor       # (num_nodes,) V of the search, or of a value model
    sampled: torch.Tensor     # (num_nodes,) log pi(a|s) as the search stored it
    reference: torch.Tensor = None    # (num_nodes,) log pi_ref, filled in before the first update of a round
    foreign: Pack = None      # KTO: this prompt with a path of another question
    foreign_reference: float = 0.0    # log pi_ref of that path
    z0: float = 0.0           # KTO: the reference point of the optimiser step

    @property
    def credit(self):
        """(num_nodes,) r + V(s') - V(s) (Eq. 10), V of an ended state being 0; 0 at the root."""
        after = torch.where(self.reward != 0, self.reward, self.value)
        return after - self.value[self.parent]

    @property
    def outcome(self):
        """(P,) +1 or -1."""
        return 2 * self.correct.to(self.value) - 1

    def like(self, logprobs):
        """The same on the device and in the precision of `logprobs`."""
        floats = {name: None if (x := getattr(self, name)) is None else x.to(logprobs)
                  for name in ("path", "reward", "value", "reference")}
        return replace(self, **floats, correct=self.correct.to(logprobs.device),
                       parent=self.parent.to(logprobs.device))


def draw_paths(tree, per_outcome, seed):
    """Up to `per_outcome` correct and as many incorrect valid paths of `tree`, drawn without replacement,
    weighted by the sum of visits along the path (as in the authors' code): a list of each. Seed, question and
    tree decide the draw."""
    random = np.random.default_rng([seed, zlib.crc32(tree.question.encode())])
    chosen = []
    for outcome in (1, -1):
        ends = [i for i, n in enumerate(tree.nodes) if n.terminal and n.valid and n.reward == outcome]
        weight = np.array([sum(tree.nodes[j].visits for j in tree.path(i)) for i in ends], dtype=float)
        size = min(per_outcome, len(ends))
        drawn = random.choice(ends, size, replace=False, p=weight / weight.sum()).tolist() if ends else []
        chosen.append([tree.path(i) for i in drawn])
    return chosen


def correct_paths(tree, n, seed):
    """RFT trains on correct paths."""
    return draw_paths(tree, n, seed)[0], []


def path_pairs(tree, n, seed):
    """DPO: up to n pairs of a correct and an incorrect path, such that all drawn paths take part."""
    right, wrong = draw_paths(tree, n, seed)
    pairs = max(len(right), len(wrong)) if right and wrong else 0
    return [right[k % len(right)] for k in range(pairs)], [wrong[k % len(wrong)] for k in range(pairs)]


def sibling_pairs(tree, n, seed):
    """Step-DPO: in each state the visited, not invalid steps of the largest and of the smallest value; of
    those pairs the n with the largest gap."""
    pairs = []
    for node in tree.nodes:
        steps = [i for i in node.children if tree.nodes[i].visits and tree.nodes[i].valid]
        by_value = sorted(steps, key=lambda i: tree.nodes[i].value)
        if steps and (gap := tree.nodes[by_value[-1]].value - tree.nodes[by_value[0]].value) > 0:
            pairs.append((-gap, by_value[-1], by_value[0]))
    pairs = sorted(pairs)[:n]
    return [[better] for _, better, _ in pairs], [[worse] for _, _, worse in pairs]


def any_paths(tree, n, seed):
    """The value model: 2 n paths drawn evenly from all that ended, so that outcomes keep their shares."""
    random = np.random.default_rng([seed, zlib.crc32(tree.question.encode())])
    ends = [i for i, node in enumerate(tree.nodes) if node.terminal]
    drawn = random.permutation(ends)[:2 * n].tolist()
    return tuple([tree.path(i) for i in drawn if tree.nodes[i].reward == outcome] for outcome in (1, -1))


def make_example(tree, n=4, seed=0, keep_unsolved=False, choose=draw_paths):
    """The Example of `tree`, or None if it offers nothing to train on: no correct path (as in the authors'
    code), or with keep_unsolved none at all. choose(tree, n, seed) -> the better and the worse paths."""
    better, worse = choose(tree, n, seed)
    if not (better or keep_unsolved and worse):
        return None
    rows = better + worse
    path = torch.zeros(len(rows), len(tree.nodes))
    for row, nodes in zip(path, rows):
        row[nodes] = 1
    column = lambda name: torch.tensor([float(getattr(node, name)) for node in tree.nodes])
    paired = choose in (path_pairs, sibling_pairs)
    return Example(pack(tree, [tree.path(nodes[-1]) for nodes in rows]), path,
                   correct=torch.arange(len(rows)) < len(better), units=len(rows) // (1 + paired),
                   parent=torch.tensor([max(0, node.parent) for node in tree.nodes]),
                   reward=column("reward"), value=column("value"), sampled=column("logprob"))


def add_foreign(examples, seed):
    """Give each example, for KTO, a path of another question after its own prompt."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(examples))
    for i, j in zip(order, np.roll(order, 1)):
        if i != j:
            mine, other = examples[i].pack, examples[j].pack
            nodes = np.flatnonzero(random.choice(examples[j].path.numpy()))
            tree = mcts.Tree("", "", prompt=mine.tokens[mine.node == 0].tolist())
            tree.add(mcts.Node(0, other.tokens[np.isin(other.node, nodes)].tolist()))
            examples[i].foreign = pack(tree, [[1]])


# ---------------------------------------------------------------- training


def micro_batches(packs, tokens):
    """Split the indices of packs, by length, into batches of at most `tokens` padded tokens, or of one."""
    batches = []
    for i in sorted(range(len(packs)), key=lambda i: len(packs[i].tokens)):
        length = len(packs[i].tokens)                               # the longest so far
        if batches and length * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@torch.no_grad()
def evaluate_packs(policy, packs, name, tokens, shard_search=False, values=False):
    """policy(packs=...) of each pack, on the CPU: each rank does its share at its own pace."""
    mine, done = share(packs), []
    with at_own_pace(policy, name, shard_search), progress(name, len(mine), leave=False) as bar:
        for batch in micro_batches([p for _, p in mine], tokens):
            results = policy(packs=[mine[k][1] for k in batch], values=values)
            done += [(mine[k][0], result.cpu()) for k, result in zip(batch, results)]
            bar.update(len(batch))
    return gather(done)


def add_reference(policy, examples, tokens, shard_search=False):
    """Fill in log pi_ref of every step: the policy before its first update is the reference of the round.
    Raises InputError if the trees are another model's."""
    packs = [e.pack for e in examples]
    for e, reference in zip(examples, evaluate_packs(policy, packs, "reference", tokens, shard_search)):
        e.reference = reference
    foreign = [e for e in examples if e.foreign]
    packs = [e.foreign for e in foreign]
    for e, reference in zip(foreign, evaluate_packs(policy, packs, "reference of KTO", tokens, shard_search)):
        e.foreign_reference = reference[1].item()
    sampled = sum((e.pack.node > 0).sum() for e in examples)
    distance = sum((e.reference - e.sampled)[np.unique(e.pack.node)].abs().sum().item() for e in examples)
    if not distance < 0.1 * sampled:
        raise InputError("these trees were not sampled from this model: its log-probs differ by "
                         f"{distance / sampled:.2f} nats a token; give the model that searched them")


def my_micro_batches(examples, tokens):
    """This rank's share of an optimiser step as (weight, micro-batch) pairs, as many on every rank: FSDP's
    collectives must match, so a rank that runs out repeats an example with weight 0."""
    by_length = sorted(examples, key=lambda e: len(e.pack.tokens))
    shares = [by_length[r::world()] for r in range(world())]
    batches = [micro_batches([e.pack for e in part], tokens) for part in shares]
    mine = [(1, [shares[rank()][i] for i in batch]) for batch in batches[rank()]]
    return mine + [(0, by_length[:1])] * (max(map(len, batches)) - len(mine))


@torch.no_grad()
def reference_point(policy, batches, n):
    """KTO's z0: the mean log-ratio of n mismatched question/path pairs, an estimate of KL(pi || pi_ref), at
    least 0 (arXiv 2402.01306, Sec. 4.1)."""
    total = torch.zeros(1, dtype=torch.float64)
    for weight, batch in batches:
        for e, logprobs in zip(batch, policy(packs=[e.foreign for e in batch])):
            total += weight * (logprobs[1].item() - e.foreign_reference)
    if dist.is_initialized():
        dist.all_reduce(total)
    return max(0.0, total.item() / n)


def learning_rate(step, total, peak, warmup):
    """Linear warmup over the first share `warmup` of all steps, then a cosine to 0."""
    ramp = max(1, round(warmup * total))
    cosine = (1 + math.cos(math.pi * max(0, step - ramp) / max(1, total - ramp))) / 2
    return peak * min((step + 1) / ramp, cosine)


def train(policy, examples, loss_fn, *, lr, epochs, questions_per_step, micro_tokens, beta=0.1, warmup=0.1,
          seed=0, description="train", log=lambda **fields: None, state=None, save_every=100, value_lr=None):
    """Minimise the mean of loss_fn(example, policy's output) -> (units,) over all units (paths or pairs) of
    an optimiser step.

    A fresh AdamW, gradient norm clipped at 1. value_lr: ask the policy for values too, and train its value
    head at this rate. state: a folder that keeps weights and optimiser every `save_every` steps and at the
    end, and from which training goes on if it exists. A step whose gradient is not finite is skipped; the
    fifth in a row raises InputError.
    """
    values = value_lr is not None
    groups = [{"params": list(policy.lm.parameters()), "peak": lr}]
    if values:
        groups.append({"params": list(policy.value_head.parameters()), "peak": value_lr})
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    per_epoch, bad = math.ceil(len(examples) / questions_per_step), 0
    total = per_epoch * epochs
    first = load_state(state, policy, optimizer) if state and state.exists() else 0
    policy.train()
    for step in progress(description, total, "step", iterable=range(first, total), initial=first):
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(examples))
        chosen = [examples[i] for i in order[at * questions_per_step:(at + 1) * questions_per_step]]
        units, start = sum(e.units for e in chosen), time.time()
        sums = torch.zeros(6, dtype=torch.float64)                  # of `metrics`
        batches = my_micro_batches(chosen, micro_tokens)
        z0 = reference_point(policy, batches, len(chosen)) if chosen[0].foreign else 0.0
        for weight, batch in batches:
            loss = 0
            for example, out in zip(batch, policy(packs=[e.pack for e in batch], values=values)):
                example = replace(example.like(out), z0=z0)
                losses = loss_fn(example, out)
                loss = loss + weight * losses.sum() / units
                sums += weight * torch.tensor(metrics(example, out[0] if values else out, losses, beta))
            (loss * world()).backward()                             # FSDP averages over ranks: undo that
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # the same on every rank
        bad = 0 if math.isfinite(norm) else bad + 1
        if bad == 5:
            raise InputError("the gradient was not finite for 5 steps in a row; lower --lr, or look for NaN "
                             "in the model")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, group["peak"], warmup)
        if not bad:
            optimizer.step()
        optimizer.zero_grad()
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, tokens, reward_chosen, reward_rejected, n_chosen, n_rejected = sums.tolist()
        log(step=step + 1, loss=loss / units, lr=optimizer.param_groups[0]["lr"], grad_norm=norm,
            skipped=bool(bad), tokens_per_second=round(tokens / (time.time() - start)),
            **{"rewards/chosen": reward_chosen / n_chosen if n_chosen else None,
               "rewards/rejected": reward_rejected / n_rejected if n_rejected else None})
        if state and ((step + 1) % save_every == 0 or step + 1 == total):
            save_state(state, policy, optimizer, step + 1)
    policy.eval()


def metrics(example, logprobs, losses, beta):
    """Of one example: the sum of its losses, its packed tokens, the sums of the implicit rewards of correct
    and of incorrect paths, and their numbers."""
    reference = logprobs if example.reference is None else example.reference
    reward, right = beta * (example.path @ (logprobs - reference).detach()), example.correct
    return [losses.sum().item(), len(example.pack.tokens), reward[right].sum().item(),
            reward[~right].sum().item(), right.sum().item(), (~right).sum().item()]


def value_targets(policy, examples, valued, lr, *, micro_tokens, shard_search=False, **settings):
    """Replace the values of the search in `examples` by those of an outcome value model (Sec. 4.4.2): the
    policy itself and its scalar head, trained on `valued` to predict how their paths end, asked for V, and
    set back."""
    own = [p.to_local() if hasattr(p, "to_local") else p for p in policy.parameters()]      # a rank's shards
    before = [p.detach().to("cpu", copy=True) for p in own]
    train(policy, valued, lambda e, out: value_loss(out[1], e.path, e.parent, e.outcome), lr=lr, value_lr=lr,
          micro_tokens=micro_tokens, **settings)
    packs = [e.pack for e in examples]
    outs = evaluate_packs(policy, packs, "values", micro_tokens, shard_search, values=True)
    for e, out in zip(examples, outs):
        e.value = out[1]
    with torch.no_grad():
        for p, old in zip(own, before):
            p.copy_(old)


OBJECTIVES = {      # what each trains on, and its loss: (example, policy's output, beta, level) -> (units,)
    "dvo": (draw_paths, lambda e, policy, beta, level: dvo_loss(
        policy, e.reference, e.credit, e.path, beta, level)),
    "rft": (correct_paths, lambda e, policy, beta, level: rft_loss(policy, e.path)),
    "dpo": (path_pairs, lambda e, policy, beta, level: dpo_loss(policy, e.reference, *e.path.chunk(2), beta)),
    "step-dpo": (sibling_pairs, lambda e, policy, beta, level: step_dpo_loss(
        policy, e.reference, *e.path.chunk(2), beta)),
    "kto": (draw_paths, lambda e, policy, beta, level: kto_loss(
        policy, e.reference, e.path, e.correct, e.z0, beta)),
    "oreo": (draw_paths, lambda e, policy, beta, level: oreo_loss(
        policy[0], e.reference, policy[1], e.path, e.parent, e.outcome, beta)),
}


# ---------------------------------------------------------------- one model, any number of GPUs


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def meet():
    if dist.is_initialized():
        dist.barrier()


def share(items):
    """This rank's (index, item) pairs of `items`."""
    return list(enumerate(items))[rank()::world()]


def gather(mine):
    """Every rank's list of (index, item) pairs, as one list of items in the order of their indices."""
    parts = [mine]
    if dist.is_initialized():
        parts = [None] * world()
        dist.all_gather_object(parts, mine)
    return [item for _, item in sorted(itertools.chain(*parts), key=lambda pair: pair[0])]


def from_rank_0(item):
    """Rank 0's `item`, on every rank."""
    items = [item]
    if dist.is_initialized():
        dist.broadcast_object_list(items)
    return items[0]


def progress(description, total, unit="question", **how):
    """A progress bar on rank 0; the others work in silence."""
    return tqdm(desc=description, total=total, unit=unit, disable=rank() > 0, **how)


def start_ranks(device):
    """Join the process group that torchrun announces; a lone process on a GPU gets a group of its own, since
    FSDP also provides float32 master weights under bfloat16 compute there. Returns this rank's device."""
    device = mcts.pick_device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    elif device.type == "cuda":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def load_policy(name, device, dtype, offload=False, activation_checkpointing=False, value_head=False):
    """The Policy and its tokenizer on every rank. In a process group the weights are in float32 (float64 if
    dtype says so) and sharded, and compute in dtype; rank 0 alone reads them and hands out the shards, so no
    other rank need hold a full copy. Without a group all is in dtype, by default float32.

    offload: weights, gradients and optimiser live in host memory; activation_checkpointing: recompute each
    decoder block in the backward pass instead of keeping its activations.
    """
    master = "float64" if dtype == "float64" else "float32"
    if not dist.is_initialized():
        lm, tokenizer = mcts.load_model(name, device, dtype or master)
        if activation_checkpointing:
            lm.gradient_checkpointing_enable()
        return Policy(lm, value_head=value_head), tokenizer
    lm, tokenizer = mcts.load_model(name, "meta", master)
    full = mcts.load_model(name, "cpu", master)[0] if rank() == 0 else None
    compute = getattr(torch, dtype) if dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = Policy(lm, compute, value_head)
    how = dict(mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=lm.dtype))
    if offload:
        how["offload_policy"] = CPUOffloadPolicy()
    if activation_checkpointing:
        lm.gradient_checkpointing_enable()
    for block in decoder_blocks(lm):
        fully_shard(block, **how)
    fully_shard(policy, **how)
    policy.to_empty(device="cpu" if offload else device)
    weights = Policy(full, value_head=value_head).state_dict() if full else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, weights, options=options)
    for name, buffer in lm.named_buffers():                         # rotary frequencies are in no state dict
        if full:
            buffer.copy_(full.get_buffer(name))
        dist.broadcast(buffer, src=0)
    return policy.eval(), tokenizer


def decoder_blocks(lm):
    return [module for module in lm.modules() if type(module).__name__ in (lm._no_split_modules or ())]


@contextmanager
def at_own_pace(policy, name, shard_search=False):
    """Let each rank call the policy as often as it likes inside the block; all meet at its end, however late.

    By default every rank holds all weights in the compute type meanwhile, so no collective runs. With
    shard_search (for a model that does not fit) the weights stay sharded and each forward gathers them layer
    by layer: then all ranks must run the same number, so a rank that is done runs idle ones until all are.
    """
    blocks = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    if blocks and shard_search:
        def somebody_works(me):
            working = torch.tensor(float(me))
            dist.all_reduce(working)
            return working > 0
        announce = policy.register_forward_pre_hook(lambda *_: somebody_works(True) and None, prepend=True)
        yield
        announce.remove()
        with torch.no_grad():
            while somebody_works(False):
                policy(input_ids=torch.zeros(1, 1, dtype=torch.long, device=policy.device), use_cache=False)
    else:
        for block in blocks:
            block.set_reshard_after_forward(False, recurse=False)
            block.unshard()
        yield
        wait_for_ranks(name)
    for block in blocks:
        block.set_reshard_after_forward(block is not policy, recurse=False)     # the root is needed at once
        block.reshard()


def wait_for_ranks(name, patience=60):
    """Wait until every rank has come here, however late: a barrier would die at the group's time limit."""
    if world() == 1:
        return
    store, start = dist.distributed_c10d._get_default_store(), time.time()
    times = store.add(f"{name}/{rank()}", 1)                        # this rank has come here under this name
    while waiting := [r for r in range(world()) if store.add(f"{name}/{r}", 0) < times]:
        time.sleep(0.2)
        if rank() == 0 and time.time() - start > patience:
            print(f"{name}: still waiting for rank {', '.join(map(str, waiting))}", file=sys.stderr)
            start = time.time()
    store.add(f"{name}/met", 1)
    while rank() == 0 and store.add(f"{name}/met", 0) < times * world():
        time.sleep(0.01)                    # the store may live in its process, so it leaves last


def memory_plan(config, args, compute=2):
    """GiB that a rank needs at its peaks: {"train": {what: GiB}, "search": {...}}, and all ranks in "host".

    args: the flags of the command line; compute: bytes of a number in the compute type, 2 for bfloat16. No
    weights are read. Training peaks where a backward pass begins, in all but the first micro-batch.
    """
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    blocks = decoder_blocks(lm)
    total, block = (sum(p.numel() for p in m.parameters()) for m in (lm, blocks[0]))
    root, ranks, L, T = total - block * len(blocks), args.ranks, len(blocks), args.micro_tokens
    d, ff, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    D, sharded = getattr(config, "head_dim", None) or d // heads, ranks > 1 or compute == 2
    state = {"weights": 4 * total / ranks, "gradients": 4 * total / ranks, "AdamW": 8 * total / ranks}
    gathered = compute * (root + 2 * block) + (compute + 4) * max(root, block) if sharded else 0
    # What a Llama block keeps for its backward pass: two norms (input in float32, normed, output), the query,
    # keys and values repeated for every query head, attention's output, gate, silu, up and their product.
    kept = T * (compute * 4 * (d + heads * D + ff) + 8 * d)
    logits = min(2**26, T * config.vocab_size) * (12 + compute)     # a chunk, its gradient, their copies
    masks = T * T * (compute + 2)
    if args.activation_checkpointing:                               # the head's backward pass comes first
        activations = L * T * compute * d + max(logits, kept)
    else:
        activations = L * kept + logits
    in_use = compute * (root + 2 * block if args.shard_search else total) if sharded else 0
    slots = (args.slots or (64 if compute == 2 else 16)) * 3 // 2
    kv = 2 * compute * L * config.num_key_value_heads * D           # bytes a token
    per_slot = kv * (1024 + (args.candidates or args.breadth) * args.max_step_tokens)
    plan = {"train": state | {"gathered weights, their gradients": gathered,
                              f"activations of {T} tokens, logits": activations + masks},
            "search": {"weights": state["weights"], "weights in use": in_use,
                       f"KV of {slots} slots of {per_slot / 2**20:.0f} MiB (paths of 1024 tokens)":
                       slots * per_slot},
            "host": {}}
    if args.offload:
        plan["host"] = {what: plan["train"].pop(what) * ranks for what in state}
        del plan["search"]["weights"]
    return {phase: {what: size / 2**30 for what, size in parts.items()} for phase, parts in plan.items()}


def print_plan(args):
    """Print the memory plan as configured, and with which of the flags that save memory it fits."""
    try:
        config = AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise InputError(f"no model configuration at {args.model!r} ({reason(error)})") from None
    for phase, parts in memory_plan(config, args).items():
        for what, size in parts.items():
            print(f"{phase:8}{size:10.1f} GiB  {what}")
    print(f"\nof {args.gpu_memory:g} GiB a GPU, on {args.ranks} GPUs (10 % left for library and fragments):")
    for chosen in itertools.product((False, True), repeat=3):
        flags = dict(zip(("activation_checkpointing", "offload", "shard_search"), chosen))
        plan = memory_plan(config, argparse.Namespace(**vars(args) | flags))
        train, search, host = (sum(parts.values()) for parts in plan.values())
        fits = "fits" if max(train, search) <= 0.9 * args.gpu_memory else "does not fit"
        print(f"  {fits:13} training {train:7.1f}, search {search:7.1f}, host {host:7.1f}  ",
              *(f"--{name.replace('_', '-')}" for name, on in flags.items() if on))


# ---------------------------------------------------------------- what a run leaves on disk


def reason(error, line=0):
    """One line of an error's message, by default the first."""
    return (str(error).strip() or type(error).__name__).splitlines()[line]


class Stopped(BaseException):
    """A signal asked the run to end; `number` says which, since checkpoints wrap what is raised in them."""
    number = 0


def stop(number, frame):
    Stopped.number = number
    raise Stopped


def put(path, write):
    """Let write(new) make a file or folder under a temporary name; it gets its own name when complete. All
    ranks call this; they meet before and after the renaming."""
    new = path.with_name(path.name + ".new")
    if rank() == 0 and new.is_dir():
        shutil.rmtree(new)                                          # left by a run that was killed
    meet()
    try:
        write(new)
    except (Exception, CheckpointException) as error:               # the latter is no Exception
        if Stopped.number:
            raise Stopped from None
        raise InputError(f"cannot write {path} ({reason(error, -1)}); free some space, and the same command "
                         "goes on from what is saved") from None
    meet()
    if rank() == 0:
        old = path.with_name(path.name + ".old")
        if path.exists():
            path.rename(old)
        new.rename(path)
        if old.is_dir():
            shutil.rmtree(old)
    meet()


def save_state(folder, policy, optimizer, step):
    """Master weights, optimiser and step, each rank its shards: what training goes on from."""
    model, moments = get_state_dict(policy, optimizer)
    state = {"model": model, "optimizer": moments, "step": step}
    put(folder, lambda new: dcp.save(state, checkpoint_id=new))


def load_state(folder, policy, optimizer=None):
    """Load what save_state saved, on any number of ranks; without an optimiser, the weights only."""
    model, moments = get_state_dict(policy, optimizer or [])
    state = {"model": model, "step": 0} | ({"optimizer": moments} if optimizer else {})
    try:
        dcp.load(state, checkpoint_id=folder)
    except (Exception, CheckpointException) as error:
        if Stopped.number:
            raise Stopped from None
        raise InputError(f"the training state {folder} cannot be read ({reason(error)}); delete it to train "
                         "this round again") from None
    set_state_dict(policy, optimizer or [], model_state_dict=model, optim_state_dict=moments)
    return state["step"]


def save_model(policy, tokenizer, folder):
    """Write a Hugging Face folder that from_pretrained or vLLM loads, in the compute type. All ranks call
    this; rank 0 gathers and writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)         # empty but on rank 0

    def write(new):
        if rank() == 0:
            for name in list(weights):
                weight = weights.pop(name)
                if name.startswith("lm."):                          # not the value head
                    weights[name.removeprefix("lm.")] = weight.to(policy.compute)
            policy.lm.save_pretrained(new, state_dict=weights)
            tokenizer.save_pretrained(new)
            own, policy.config.dtype = policy.config.dtype, policy.compute
            policy.config.save_pretrained(new)              # again: it had named the master weights' type
            policy.config.dtype = own
    put(folder, write)


class Run:
    """A run folder: config.json, log.jsonl, and round1/trees.rank0.jsonl, round1/model/, and so on.

    The same command continues it: finished trees, evaluations and rounds are not done again. Raises
    InputError if the folder holds a run with other settings or is not writable. Rank 0 alone writes the log.
    """
    FREE = {"out", "rounds", "device", "slots", "kv_budget", "micro_tokens", "offload", "shard_search",
            "activation_checkpointing", "plan", "ranks", "gpu_memory"}      # may change: results do not

    def __init__(self, folder, settings):
        self.folder, self.round, self.step, self.events = Path(folder), 0, 0, []
        self.given, self.tokenizer, problem = settings.get("trees"), None, None
        if rank() == 0:
            try:
                self._open(json.loads(json.dumps({k: v for k, v in settings.items() if k not in self.FREE})))
            except OSError as error:
                problem = f"cannot write to the run folder {folder}: {error.strerror}; choose another --out"
            except json.JSONDecodeError:
                problem = (f"config.json or log.jsonl in {folder} is not JSON any more; restore it, or "
                           "choose another --out")
            except InputError as error:
                problem = str(error)
        problem = from_rank_0(problem)
        if problem:
            raise InputError(problem)

    def _open(self, settings):
        config, log = self.folder / "config.json", self.folder / "log.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is at work in {self.folder}; wait for it, or choose "
                             "another --out") from None
        if config.exists():
            old = json.loads(config.read_text())
            differ = [f"{name} was {old.get(name)!r} and is {settings.get(name)!r}"
                      for name in sorted({*old, *settings}) if old.get(name) != settings.get(name)]
            if differ:
                raise InputError(f"{self.folder} holds a run with other settings ({'; '.join(differ)}); "
                                 "repeat those, or choose another --out")
        elif any(path.name != ".lock" for path in self.folder.iterdir()):
            raise InputError(f"{self.folder} is not empty and holds no run; choose another --out")
        else:
            config.with_suffix(".new").write_text(json.dumps(settings, indent=1) + "\n")
            config.with_suffix(".new").rename(config)
        if log.exists():
            drop_torn_line(log)
            self.events = [json.loads(line) for line in open(log, encoding="utf-8")]
        self.lines = open(log, "a", encoding="utf-8")

    def log(self, event, since=None, **fields):
        """Write one line; `since`, the time at which the event began, becomes its seconds."""
        if rank() == 0:
            now, where = time.time(), {"event": event, "round": self.round, "step": self.step}
            seconds = {} if since is None else {"seconds": round(now - since, 1)}
            entry = where | {"time": round(now, 3)} | fields | seconds
            self.lines.write(json.dumps(entry) + "\n")
            self.lines.flush()
            self.events.append(entry)

    def not_evaluated(self, names):
        """Those tasks that have no result of the current round, as rank 0 knows, which has read the log."""
        known = [e["task"] for e in self.events if e["event"] == "eval" and e["round"] == self.round]
        return from_rank_0([name for name in names if name not in known])

    def file(self, name, r=None):
        """A path in the folder of round r (default: the current one), which is made."""
        path = self.folder / f"round{self.round if r is None else r}" / name
        path.parent.mkdir(exist_ok=True)
        return path

    def trees(self):
        """All trees of the current round, or those given with --trees, one at a time."""
        for path in self.given or sorted(self.file("").glob("trees.rank*.jsonl")):
            for tree in mcts.read_trees(path):
                if tree.config.get("tokenizer", self.tokenizer) != self.tokenizer:
                    raise InputError(f"the trees in {path} were searched with another tokenizer or chat "
                                     "template; give the model and tokenizer that searched them")
                yield tree


def drop_torn_line(path):
    """Cut a last line that was not written to its end."""
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        print(f"{path}: dropped an unfinished last line", file=sys.stderr)
        os.truncate(path, whole)


# ---------------------------------------------------------------- rounds


WORKED = [("A shelf holds 4 rows of 9 books. 7 books are lent out. How many are left?",
           "There are 4 * 9 = 36 books on the shelf.\n\n7 are lent out, so 36 - 7 = 29 are left.\n\n"
           "Final Answer: 29"),
          ("What is the sum of the solutions of x^2 - 5x + 6 = 0?",
           "The equation factors as (x - 2)(x - 3) = 0.\n\nIts solutions are 2 and 3, and 2 + 3 = 5.\n\n"
           "Final Answer: 5"),
          ("Which of these floats on water?\nA) a stone\nB) a cork\nC) a coin",
           "What is less dense than water floats on it.\n\n"
           "Stone and metal are denser than water, cork is less dense.\n\nFinal Answer: B")]


def demonstration(tokenizer, problem, response):
    """The Example of one correct response (token ids) to imitate: a tree of one path of one node."""
    prompt = mcts.build_prompt(tokenizer, problem["question"])
    tree = mcts.Tree(problem["question"], problem["answer"], prompt)
    tree.add(mcts.Node(0, response, reward=1, terminal=True, visits=1))
    return make_example(tree)


def imitate(policy, examples, **settings):
    """One epoch of rft_loss."""
    train(policy, examples, lambda e, logprobs: rft_loss(logprobs, e.path), epochs=1, **settings)


def bootstrap(run, policy, tokenizer, problems, args):
    """Format bootstrapping (App. B): sample with worked examples in the prompt, keep the correct responses of
    several steps with a `Final Answer:`, and imitate them without the examples for one epoch; so the base
    learns to write steps."""
    start, mine = time.time(), share(problems)
    prompts = [mcts.build_prompt(tokenizer, p["question"], WORKED) for _, p in mine]
    with at_own_pace(policy, "bootstrap", args.shard_search), progress("bootstrap: sample", len(mine)) as bar:
        drawn = mcts.sample(policy, tokenizer, prompts, n=args.bootstrap_samples, seed=args.seed,
                            max_new_tokens=args.max_new_tokens, progress=bar.update)

    def well_formed(s):
        return s.end in ("eos", "answer") and mcts.MARKER in s.text and "\n\n" in s.text
    kept = [(i, {s.text: s.tokens for s in samples if well_formed(s) and tasks.grade(s.text, p["answer"])})
            for (i, p), samples in zip(mine, drawn)]
    examples = [demonstration(tokenizer, p, tokens)
                for p, responses in zip(problems, gather(kept)) for tokens in responses.values()]
    if not examples:
        save_state(run.file("state"), policy, torch.optim.AdamW(policy.parameters()), 0)
    else:
        imitate(policy, examples, lr=args.bootstrap_lr, questions_per_step=8 * args.questions_per_step,
                micro_tokens=args.micro_tokens, seed=args.seed, description="bootstrap: train",
                state=run.file("state"))
    run.log("bootstrap", start, questions=len(problems), responses=len(examples))
    save_model(policy, tokenizer, run.file("model"))


def search_round(run, policy, tokenizer, problems, args):
    """Search those of `problems` that have no tree yet, each rank its share."""
    start = time.time()
    if rank() == 0:
        for path in run.file("").glob("trees.rank*.jsonl"):
            drop_torn_line(path)
    meet()
    done = {tree.question for tree in run.trees()}
    todo = [p for p in problems if p["question"] not in done]
    meet()                                                          # all have read before one writes
    mine = todo[rank()::world()]
    settings = mcts.search_settings(args) | {"seed": args.seed + run.round}
    if todo:
        with (open(run.file(f"trees.rank{rank()}.jsonl"), "a", encoding="utf-8") as out,
              at_own_pace(policy, f"search of round {run.round}", args.shard_search),
              progress(f"round {run.round}: search", len(mine) * args.iterations, "iteration") as bar):
            for tree in mcts.search(policy, tokenizer, mine, tasks.reward, progress=bar.update, **settings):
                out.write(tree.to_json() + "\n")
                out.flush()
        mixed, values = [], []
        for tree in run.trees():
            mixed.append({n.reward for n in tree.nodes if n.terminal} == {1, -1})
            values.append(tree.nodes[0].value)
        run.log("search", start, trees=len(values), mixed=float(np.mean(mixed)),
                root_value=float(np.mean(values)))


def train_round(run, policy, tokenizer, args):
    """Train on the round's trees by the objective of the run and save the model."""
    start, seed, (choose, loss) = time.time(), args.seed + run.round, OBJECTIVES[args.objective]
    examples = round_examples(run, args, choose, args.keep_unsolved)
    if not examples:
        raise InputError(f"no question of round {run.round} has a correct solution to train on; search more "
                         "questions or more iterations, or start from a stronger model")
    if args.objective == "kto":
        add_foreign(examples, seed)
    settings = dict(epochs=args.epochs, questions_per_step=args.questions_per_step,
                    micro_tokens=args.micro_tokens, seed=seed)
    fixed, names = run.file("reference.pt"), ("reference", "foreign_reference", "value")
    if fixed.exists():                                              # the run was stopped in training
        for example, numbers in zip(examples, torch.load(fixed)):
            vars(example).update(numbers)
    else:
        add_reference(policy, examples, args.micro_tokens, args.shard_search)
        if args.targets == "value-model":
            value_targets(policy, examples, round_examples(run, args, any_paths, keep_unsolved=True),
                          args.value_lr, shard_search=args.shard_search, log=partial(log_step, run, "value"),
                          description=f"round {run.round}: value model", **settings)
        numbers = [{name: getattr(e, name) for name in names} for e in examples]
        put(fixed, lambda new: rank() == 0 and torch.save(numbers, new))

    train(policy, examples, lambda e, out: loss(e, out, args.beta, args.level), lr=args.lr, beta=args.beta,
          value_lr=args.value_lr if args.objective == "oreo" else None, state=run.file("state"),
          log=partial(log_step, run, "train"), description=f"round {run.round}: train", **settings)
    run.log("trained", start, questions=len(examples), paths=sum(len(e.path) for e in examples))
    save_model(policy, tokenizer, run.file("model"))
    if rank() == 0:                                                 # the next round starts from this one
        shutil.rmtree(run.file("state", run.round - 1), ignore_errors=True)


def round_examples(run, args, choose, keep_unsolved):
    """The examples of the round's trees, by question: not in the order in which the searches ended."""
    made = [(tree.question, make_example(tree, args.paths, args.seed + run.round, keep_unsolved, choose))
            for tree in run.trees()]
    return [e for _, e in sorted(made, key=lambda pair: pair[0]) if e]


def log_step(run, event, step, **fields):
    run.step = step
    run.log(event, **fields)


def evaluate_round(run, policy, tokenizer, eval_sets, args):
    """Evaluate on `eval_sets`, each rank its share of the questions."""
    for task, problems in eval_sets.items():
        start, mine, name = time.time(), share(problems), f"round {run.round}: evaluate on {task}"
        with at_own_pace(policy, name, args.shard_search), progress(name, len(mine)) as bar:
            responses = tasks.respond(
                policy, tokenizer, [p for _, p in mine], trials=args.trials, temperature=args.temperature,
                max_new_tokens=args.max_new_tokens, seed=args.seed, progress=bar.update)
        result = tasks.summarise(gather([(i, r) for (i, _), r in zip(mine, responses)]), args.trials)
        run.log("eval", start, task=task, **{k: result[k] for k in ("accuracy", "sem", "n", "unanswered")})


def run_rounds(run, policy, tokenizer, problems, eval_sets, args):
    """The whole of DVO: make the base write steps and evaluate it; then for each round search, train, save,
    evaluate. Whatever an earlier start of the same run has finished is not done again."""
    held = -1 if args.bootstrap else 0                              # the round whose weights the policy holds
    for run.round in range(args.rounds + 1):
        run.step, new = 0, (run.round > 0 or args.bootstrap) and not run.file("model").exists()
        evals = {task: eval_sets[task] for task in run.not_evaluated(eval_sets)}
        needed = run.round - 1 if new else run.round if evals else held
        if needed != held:
            load_state(run.file("state", needed), policy)
            held = needed
        if new and run.round == 0:
            bootstrap(run, policy, tokenizer, problems[:args.bootstrap_questions], args)
        elif new:
            if not run.given:
                first, n = (run.round - 1) * args.questions_per_round, len(problems)
                questions = [problems[i % n] for i in range(first, first + min(n, args.questions_per_round))]
                search_round(run, policy, tokenizer, questions, args)
            train_round(run, policy, tokenizer, args)
        held = run.round if new else held
        evaluate_round(run, policy, tokenizer, evals, args)


def report(run, eval_sets, rounds):
    """Print accuracy, spread and seconds of the base and of every round."""
    print(f"\n{'':10}{''.join(f'{task[:22]:>24}' for task in eval_sets)}   seconds: search, train, evaluate")
    for r in range(rounds + 1):
        cells = ""
        for task in eval_sets:
            e = next(e for e in run.events if e["event"] == "eval" and e["round"] == r and e["task"] == task)
            cells += f"{100 * e['accuracy']:>15.1f} ± {100 * e['sem']:.1f} %".rjust(24)
        seconds = [sum(e["seconds"] for e in run.events if e["event"] in kinds and e["round"] == r)
                   for kinds in (("search",), ("trained", "bootstrap"), ("eval",))]
        print(f"{f'round {r}' if r else 'base':10}{cells}   {'  '.join(f'{s:8.1f}' for s in seconds)}")


# ---------------------------------------------------------------- the demo's model


def arithmetic_tokenizer():
    """A token for each number and each piece of text between two, such as `.\\n\\n`; decoding is exact."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<pad>", "<eos>", ".", ". ", ".\n\n", "Start with ", f"{mcts.MARKER} ", " = "]
    pieces += [f"{word} " for word in tasks.OPERATIONS]
    pieces += [f" {sign} " for sign, _ in tasks.OPERATIONS.values()]
    pieces += [str(i) for i in range(tasks.LARGEST + 1)]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|\.\s*|[^\d.]+"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>",
                                   chat_template="{{ messages[-1]['content'] }}\n\n")   # needs no instruction


def make_base(folder, seed, skip=0.25, low=3, high=6):
    """Train the demo's base model from random weights on worked solutions of chains of `low` to `high`
    operations and save it in `folder`.

    A 0.2M-parameter Llama that first sees solutions that write out every operation and then such as skip
    some, until 99 % of its single operations are right: then what is left to learn is not arithmetic but
    which steps to take.
    """
    torch.manual_seed(seed)
    tokenizer = arithmetic_tokenizer()
    policy = Policy(LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256, initializer_range=0.08, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)))
    probes = [mcts.build_prompt(tokenizer, p["question"])
              for p in tasks.arithmetic(300, f"probe {seed}", low, high)]
    parts = [(10000, 0, 3e-3), (12000, skip, 2e-3)] + 4 * [(4000, skip, 1e-3)]
    for part, (n, often, lr) in enumerate(parts):                   # demonstrations, skipping, rate
        draw, examples = tasks.random.Random(seed), []
        for p in tasks.arithmetic(n, f"base {seed} {part}", low, high):
            solution = tokenizer(tasks.demonstrate(p["question"], draw, often)).input_ids
            examples.append(demonstration(tokenizer, p, solution + [tokenizer.eos_token_id]))
        imitate(policy, examples, lr=lr, questions_per_step=16, micro_tokens=2**14, seed=seed,
                description="base: train from random weights")
        samples = mcts.sample(policy, tokenizer, probes, max_new_tokens=96, seed=seed, temperature=0.7)
        right, done = map(sum, zip(*(tasks.single_operations(s.text) for [s] in samples)))
        if part > 0 and right >= 0.99 * done:
            break
    print(f"base: {100 * right / max(1, done):.1f} % of its single operations are right")
    save_model(policy, tokenizer, folder)


DEMO = dict(bootstrap=False, data="arithmetic", eval_data=["arithmetic"], eval_limit=300, iterations=40,
            questions_per_round=200, questions_per_step=4, max_step_tokens=32, max_new_tokens=96, lr=1e-4,
            value_lr=1e-3, slots=64)


def show_tree(trees):
    """Draw a tree that holds both outcomes; then a correct and a wrong solution with the steps' credits."""
    mixed = [t for t in trees if {n.reward for n in t.nodes if n.terminal and n.valid} == {1, -1}]
    if not mixed:
        return print("no tree of this round holds both outcomes")
    tree = min(mixed, key=lambda t: abs(sum(n.visits > 0 for n in t.nodes) - 16))
    print("\nA searched tree (on each edge its credit):\n", *mcts.draw(tree), sep="\n")
    for name, outcome in ("correct", 1), ("wrong", -1):
        end = max((i for i, n in enumerate(tree.nodes) if n.terminal and n.valid and n.reward == outcome),
                  key=lambda i: tree.nodes[i].logprob)
        print(f"\nA {name} solution and the DVO credit of each step:\n")
        for i in tree.path(end):
            credit = tree.credit(i)
            print("  " + mcts.paint(f"{credit:+.2f}", credit) + "  " + " ".join(tree.nodes[i].text.split()))


# ---------------------------------------------------------------- command line


def parse_arguments():
    """The parsed command line. Raises InputError for flags that do not go together."""
    parser = argparse.ArgumentParser(
        description="Direct Value Optimization. "
                    "Without --model: the demo, on any machine, nothing to download.")
    add = parser.add_argument_group("model and data").add_argument
    add("--model", help="Hugging Face folder or hub name; paper: Llama-3-8B-Instruct")
    add("--data", default="metamath",
        help="training questions: task name or JSON Lines file with question and answer (default, paper: "
             "metamath)")
    add("--trees", nargs="+", metavar="FILE",
        help="train one round on these trees of the model instead of searching")
    add("--eval-data", nargs="*", default=["gsm8k", "math", "agieval-math", "obqa", "csqa", "arc", "sciq"],
        help="task names or files to evaluate on; none: no evaluation (default, paper: all seven)")
    add("--eval-limit", type=int, help="evaluate on the first N questions of each")
    add("--out", help="run folder; the same command continues it (default: runs/NAME-OF-MODEL)")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "bfloat16", "float64"),
        help="default: float32 on a CPU, else bfloat16")
    add("--device", help="default: the first GPU, else the CPU")
    add = parser.add_argument_group("format bootstrapping (App. B)").add_argument
    add("--bootstrap", action=argparse.BooleanOptionalAction, default=True,
        help="imitate correct few-shot responses before the first round")
    add("--bootstrap-questions", type=int, default=500, metavar="N", help="that are sampled (default: 500)")
    add("--bootstrap-samples", type=int, default=64, metavar="N", help="a question; paper: 64")
    add("--bootstrap-lr", type=float, default=2e-5, metavar="RATE", help="paper: 2e-5, one epoch")
    mcts.add_search_flags(parser)
    add = parser.add_argument_group("training (Sec. 4.3)").add_argument
    add("--objective", choices=OBJECTIVES, default="dvo", help="(default: dvo)")
    add("--level", choices=("step", "response"), default="step",
        help="of the dvo objective; paper: step, and response in Sec. 6.5 (default: step)")
    add("--targets", choices=("search", "value-model"), default="search",
        help="of the dvo objective: V of the search, or of a value model trained on its trees, as in "
             "Sec. 4.4.2 (default: search)")
    add("--value-lr", type=float, default=1e-5, metavar="RATE",
        help="of the value model, and of OREO's value head (default: 1e-5)")
    add("--beta", type=float, default=0.1, help="paper: 0.1")
    add("--rounds", type=int, default=3, help="paper: 3")
    add("--questions-per-round", type=int, default=10000, help="paper: 10000")
    add("--paths", type=int, default=4, help="correct, and incorrect, paths a question; paper: 4")
    add("--keep-unsolved", action="store_true", help="train on questions without a correct path too")
    add("--lr", type=float, default=5e-7, help="paper: 5e-7, cosine, warmup 0.1")
    add("--epochs", type=int, default=3, help="paper: 3")
    add("--questions-per-step", type=int, default=16, help="an optimiser step; paper: 16 of 8 paths = 128")
    add("--micro-tokens", type=int, default=4096, help="packed tokens in one forward, at most")
    add = parser.add_argument_group("memory").add_argument
    add("--plan", action="store_true", help="print what the run needs instead of running it")
    add("--ranks", type=int, default=8, help="GPUs that --plan assumes (default: 8)")
    add("--gpu-memory", type=float, default=80, metavar="GIB", help="of each (default: 80)")
    add("--activation-checkpointing", action="store_true",
        help="recompute decoder blocks in the backward pass")
    add("--offload", action="store_true", help="keep weights, gradients and optimiser in host memory")
    add("--shard-search", action="store_true",
        help="keep the weights sharded during search: slower, for models that do not fit on one GPU")
    add = parser.add_argument_group("evaluation (Sec. 5)").add_argument
    add("--trials", type=int, default=3, help="paper: 3")
    add("--temperature", type=float, default=0.7, help="paper: 0.7")
    add("--max-new-tokens", type=int, default=1024, help="a response cut at this length is wrong")
    args, _ = parser.parse_known_args()
    if not args.model:
        parser.set_defaults(**DEMO)
    if args.trees:
        parser.set_defaults(rounds=1, bootstrap=False)
    args = parser.parse_args()
    if args.trees and (args.rounds > 1 or args.bootstrap or not args.model):
        raise InputError("--trees needs --model, and goes with one round and without --bootstrap")
    for name, usual in ("level", "step"), ("targets", "search"):
        if args.objective != "dvo" and getattr(args, name) != usual:
            raise InputError(f"--{name} {getattr(args, name)} goes with --objective dvo only")
    counts = ("rounds", "questions_per_round", "bootstrap_questions", "bootstrap_samples", "paths", "epochs",
              "questions_per_step", "micro_tokens", "trials", "max_new_tokens")
    least = dict.fromkeys(counts, 1) | dict(temperature=0, beta=1e-9, lr=0, value_lr=0)
    mcts.check_range(**{name: (getattr(args, name), value) for name, value in least.items()})
    return args


SAVED = "what is finished is saved, and the same command goes on from there"


def main():
    args, start = parse_arguments(), time.time()
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, stop)
    try:
        run_command_line(args, start)
    except OSError as error:                                        # a full disk, most likely
        raise InputError(f"{error}; {SAVED}") from None
    except Stopped:
        if rank() == 0:
            print(f"\ndvo.py: stopped; {SAVED}", file=sys.stderr)
        os._exit(128 + Stopped.number)                              # without waiting for the other ranks


def run_command_line(args, start):
    """Do what `args` ask for: print the memory plan, or carry a run, the demo too, to its report."""
    if args.plan and not args.model:
        raise InputError("--plan needs --model, a folder or hub name with a config.json")
    if args.plan:
        return print_plan(args)
    device, demo = start_ranks(args.device), not args.model
    problems = [] if args.trees else tasks.load_problems(args.data, split="train")
    eval_sets = {task: tasks.load_problems(task, split="test")[:args.eval_limit] for task in args.eval_data}
    out = args.out or (tempfile.mkdtemp(prefix="dvo-demo-") if demo else f"runs/{Path(args.model).name}")
    run = Run(out, vars(args))
    if demo:
        args.model = run.folder / "base"
        if not args.model.exists():
            make_base(args.model, args.seed)
            run.log("trained", start)
    policy, tokenizer = load_policy(
        args.model, device, args.dtype, args.offload, args.activation_checkpointing,
        value_head=args.objective == "oreo" or args.targets == "value-model")
    run.tokenizer = mcts.fingerprint(tokenizer)
    run_rounds(run, policy, tokenizer, problems, eval_sets, args)
    if rank() == 0:
        if demo:
            run.round = 1
            show_tree(list(run.trees()))
        report(run, eval_sets, args.rounds)
        print(f"\n{time.time() - start:.0f} s in all; everything is in {out}")
    if world() > 1:
        wait_for_ranks("end")
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)                     # gloo's threads, ended by destructors, now and then abort the process


if __name__ == "__main__":
    mcts.run_command(main)
