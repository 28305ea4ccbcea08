# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Direct Value Optimization (Zhang et al. 2025, arXiv 2502.13723): reasoning, learnt without preferences.

    python dvo.py                                       # the demo: two minutes on a laptop, no download
    python dvo.py --model M --data train.jsonl --eval-data test.jsonl --out RUN
    python dvo.py --model RUN/round0/model --trees RUN/round1/trees.*.jsonl --objective kto --out RUN2
    torchrun --nproc_per_node=8 dvo.py --model meta-llama/Meta-Llama-3-8B-Instruct    # the paper's run

A round: search a tree of reasoning steps for each question (mcts.py), so that every state s gets a value
V(s), the mean outcome of the solutions found below it; then train the policy pi by plain mean squared error
until, for every step a_t of the solutions drawn from the tree,

    beta * log( pi(a_t|s_t) / pi_ref(a_t|s_t) )  =  r(s_t, a_t) + V(s_{t+1}) - V(s_t)            (Eq. 10)

pi_ref being the policy at the start of the round. The right side is the step's *credit*: how much better off
the step left the solver. The file reads in this order: losses; pack (many paths, one sequence) and policy;
critic; examples; training; many GPUs; what a run leaves on disk; the stages of a run; the demo; the command.
All of it meets in `train_round`.
"""
import argparse
import contextlib
import functools
import glob
import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
import zlib
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import eval as tasks                            # and files of records, progress bars, errors
from eval import InputError, told

if __name__ == "__main__":
    tasks.watch_imports()

import mcts                                     # before torch, which it tells how to take a GPU's memory
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase,
    PreTrainedTokenizerFast)


# ---------------------------------------------------------------- losses: functions of step log-probs


def dvo_loss(policy: Tensor, reference: Tensor, credit: Tensor, path: Tensor, beta: float = 0.1,
             level: str = "step") -> Tensor:
    """Direct Value Optimization: (P,) loss of each path, un-reduced.

    policy, reference: (N,) log pi(a|s) and log pi_ref(a|s) of N steps, each summed over its tokens. credit:
    (N,) r + V(s') - V(s), in [-2, 2] by the search. path: (P, N), 1 where a step lies on a path, else 0.
    level: "step" (Eq. 10) or "response" (Sec. 6.5: the same on whole paths).

    Where the paper has half the sum over a path's steps, this is, at the step level, their mean: a long path
    counts no more than a short one. Raises InputError for another level and for shapes that do not fit.

    >>> policy, path = sum_steps(torch.tensor([[-4.0, -0.5, -1.0, -0.5], [-4.0, -2.0, -1.0, -9.0]]),
    ...                          step=torch.tensor([[-1, 0, 0, 1], [-1, 0, 0, -1]]))
    >>> reference = policy - 2                              # log-ratios of 2: beta * 2 = 0.2
    >>> dvo_loss(policy, reference, torch.tensor([0.5, -0.5, -1.0, 0.0]), path)
    tensor([0.2900, 1.4400])
    """
    expect_shape(path.shape[1:], policy=policy, reference=reference, credit=credit)
    log_ratio = policy - reference
    if level == "step":
        squared_error = (beta * log_ratio - credit) ** 2            # Eq. 10
        return mean_over_steps(path, squared_error)
    if level == "response":
        return (beta * (path @ log_ratio) - path @ credit) ** 2     # Sec. 6.5: credits sum to r - V(s_0)
    raise InputError(f"the level of dvo_loss is 'step' or 'response', not {level!r}")


def sum_steps(logprobs: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """From plain rows of tokens, without any tree, to what the losses take: policy (B * S,), the log-prob of
    each step, where S is the most steps of a row; and path (B, B * S), 1 where a step belongs to a row.

    logprobs: (B, T) log-prob of each token, given those before it in its row. step: (B, T) the number of the
    token's step in its row: 0, 1, ...; -1 for prompt and padding. Step s of row b comes at b * S + s, and so
    should its credit. Raises InputError for different shapes. (This file itself packs trees, see below.)

    >>> logprobs = torch.tensor([[-4.0, -0.5, -1.0], [-4.0, -2.0, -9.0]])
    >>> policy, path = sum_steps(logprobs, step=torch.tensor([[-1, 0, 1], [-1, 0, -1]]))
    >>> policy.tolist(), path.tolist()
    ([-0.5, -1.0, -2.0, 0.0], [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    """
    if logprobs.shape != step.shape:
        raise InputError(f"logprobs is {tuple(logprobs.shape)} and step {tuple(step.shape)}, but every token has "
                         "both; the first token of a row has no log-prob, so leave its step out, too")
    S = int(step.max()) + 1
    is_of = step[..., None] == torch.arange(S, device=step.device)  # (B, T, S) each token of its step
    policy = torch.where(is_of, logprobs[..., None], 0.0).sum(1)    # (B, S)
    path = torch.block_diag(*is_of.any(1))
    return policy.flatten(), path.to(policy)


def mean_over_steps(path: Tensor, per_step: Tensor) -> Tensor:
    """(P,) mean over the steps of each path of per_step, (N,) or (P, N); 0 for a path without steps."""
    return (path * per_step).sum(1) / path.sum(1).clamp(min=1)


def expect_shape(shape: torch.Size, **tensors: Tensor) -> None:
    """Raise InputError for the first tensor of another shape: it would be broadcast without a word."""
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise InputError(f"{name} is {tuple(tensor.shape)} but must be {tuple(shape)}, as the paths say")


def rft_loss(policy: Tensor, path: Tensor) -> Tensor:
    """Rejection sampling fine-tuning (Sec. 5): (P,) negative log-likelihood of each (correct) path.

    >>> policy, path = sum_steps(torch.tensor([[-4.0, -0.5, -1.0]]), step=torch.tensor([[-1, 0, 1]]))
    >>> rft_loss(policy, path)
    tensor([1.5000])
    """
    expect_shape(path.shape[1:], policy=policy)
    return -(path @ policy)


def dpo_loss(policy: Tensor, reference: Tensor, chosen: Tensor, rejected: Tensor,
             beta: float = 0.1) -> Tensor:
    """Direct preference optimisation (Eq. 2; arXiv 2305.18290, Eq. 7): (P,) loss of each pair of paths.

    chosen, rejected: (P, N), 1 where a step lies on the better, on the worse path of the pair. With one step
    in each, taken in the same state, this is Step-DPO (App. C; arXiv 2406.18629, Eq. 2).

    >>> policy, path = sum_steps(torch.tensor([[-4.0, -0.5], [-4.0, -2.0]]), torch.tensor([[-1, 0], [-1, 0]]))
    >>> dpo_loss(policy, torch.tensor([-2.5, -1.0]), chosen=path[:1], rejected=path[1:], beta=1.0)
    tensor([0.0486])
    """
    expect_shape(chosen.shape[1:], policy=policy, reference=reference)
    expect_shape(chosen.shape, rejected=rejected)
    margin = (chosen - rejected) @ (policy - reference)
    return -F.logsigmoid(beta * margin)                             # Eq. 2


step_dpo_loss = dpo_loss                # on single steps


def kto_loss(policy: Tensor, reference: Tensor, path: Tensor, correct: Tensor, z0: float, beta: float = 0.1,
             lambda_correct: float = 1.33, lambda_incorrect: float = 1.0) -> Tensor:
    """Kahneman-Tversky optimisation (arXiv 2402.01306, Eq. 8; weights as in App. C): (P,) loss of each path.

    correct: (P,) bool. z0: the reference point, an estimate of KL(pi || pi_ref) in nats, at least 0, without
    gradient (see reference_point). The loss of a path lies between 0 and its lambda.

    >>> policy, path = sum_steps(torch.tensor([[-4.0, -0.5], [-4.0, -2.0]]), torch.tensor([[-1, 0], [-1, 0]]))
    >>> kto_loss(policy, policy - 1, path, torch.tensor([True, False]), z0=1.0)
    tensor([0.6650, 0.5000])
    """
    expect_shape(path.shape[1:], policy=policy, reference=reference)
    expect_shape(path.shape[:1], correct=correct)
    z0 = torch.as_tensor(z0, dtype=policy.dtype).detach()
    expect_shape(torch.Size(), z0=z0)
    gain = beta * (path @ (policy - reference) - z0)                # of the policy over its reference
    weight = torch.where(correct, lambda_correct, lambda_incorrect).to(gain)
    return weight * torch.sigmoid(torch.where(correct, -gain, gain))    # lambda - lambda * sigmoid(+-gain)


def oreo_loss(policy: Tensor, reference: Tensor, value: Tensor, path: Tensor, parent: Tensor, outcome: Tensor,
              beta: float = 0.1, alpha: float = 0.01) -> Tensor:
    """Offline reasoning optimisation at the step level (App. D; arXiv 2412.16145): (P,) loss of each path,
    for policy and critic together.

    value: (N,) V of the state *after* each step, by the critic. parent: (N,) the step before, so value[parent]
    is V(s_t), of the state in which a step is taken; parents come first. outcome: (P,) R, +1 or -1. alpha:
    weight of the regulariser.

    Both parts ask for the soft Bellman equation V(s_t) = R - beta * sum_{i >= t} log_ratio_i, one by V(s_t),
    the other by the log-ratio of step t alone. OREO's regulariser is the KL of the two distributions over the
    vocabulary; half the squared log-ratio of the sampled step estimates it here, where only that is known.

    >>> policy = torch.tensor([0.0, -0.5, -1.0])        # of the question, which is no step, and of two steps
    >>> value, parent = torch.tensor([0.5, 0.9, 1.0]), torch.tensor([0, 0, 1])
    >>> path = torch.tensor([[0.0, 1.0, 1.0]])
    >>> oreo_loss(policy, policy, value, path, parent, outcome=torch.tensor([1.0]))
    tensor([0.2600])
    """
    expect_shape(path.shape[1:], policy=policy, reference=reference, value=value, parent=parent)
    expect_shape(path.shape[:1], outcome=outcome)
    log_ratio = path * (policy - reference)                         # (P, N), 0 off the path
    ahead = log_ratio.detach().flip(1).cumsum(1).flip(1)            # sum_{i >= t}, since parents come first
    gradient_of_t = log_ratio - log_ratio.detach()                  # the number 0, with the gradient of step t
    V = value[parent]                                               # (N,) V(s_t)
    R = outcome[:, None]
    value_error = V - R + beta * ahead                              # the same number as the next
    policy_error = V.detach() - R + beta * (ahead + gradient_of_t)
    per_step = value_error ** 2 + policy_error ** 2 + alpha * log_ratio ** 2 / 2
    return mean_over_steps(path, per_step)


def value_loss(value: Tensor, path: Tensor, parent: Tensor, outcome: Tensor) -> Tensor:
    """Outcome value model (Sec. 4.4.2): (P,) mean over the states s_t of each path of (V(s_t) - R)^2.
    Arguments as in oreo_loss.

    >>> value, parent = torch.tensor([0.5, 0.9, 1.0]), torch.tensor([0, 0, 1])
    >>> value_loss(value, torch.tensor([[0.0, 1.0, 1.0]]), parent, torch.tensor([1.0]))
    tensor([0.1300])
    """
    expect_shape(path.shape[1:], value=value, parent=parent)
    expect_shape(path.shape[:1], outcome=outcome)
    squared_error = (value[parent] - outcome[:, None]) ** 2         # (P, N)
    return mean_over_steps(path, squared_error)


def grpo_loss(policy: Tensor, reference: Tensor, advantage: Tensor, tokens: Tensor, path: Tensor,
              clip: float = 0.2) -> Tensor:
    """Clipped policy gradient with GSPO's length-normalised ratio (arXiv 2507.18071, Eq. 7) at the step
    level: (P,) loss of each path.

    reference: (N,) by the policy that drew the steps. advantage: (N,) of each step; or (P, N), where it also
    depends on the path. tokens: (N,) of each step. clip: how far the ratio may move from 1 before the
    gradient stops; GSPO clips whole responses at 4e-4. GRPO's advantage is the outcome minus the mean of the
    group; VinePPO's is the step's credit. No KL term.

    >>> logprobs, step = torch.tensor([[-4.0, -0.5, -1.0, -0.5]]), torch.tensor([[-1, 0, 0, 1]])
    >>> policy, path = sum_steps(logprobs, step)
    >>> tokens, _ = sum_steps(torch.ones_like(logprobs), step)
    >>> grpo_loss(policy, policy.detach(), torch.tensor([1.0, -0.5]), tokens, path)
    tensor([-0.2500])
    """
    expect_shape(path.shape[1:], policy=policy, reference=reference, tokens=tokens)
    expect_shape(path.shape[-advantage.dim():], advantage=advantage)        # (N,) or (P, N)
    ratio = torch.exp((policy - reference) / tokens.clamp(min=1))   # (N,)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantage, clipped * advantage)    # (N,) or (P, N)
    return -mean_over_steps(path, gain)


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

    def mask(self) -> np.ndarray:
        """(T, T) bool, which tokens each token sees: all that its predecessor sees, and itself."""
        T = len(self.tokens)
        mask = np.eye(T, dtype=bool)
        for t in range(1, T):
            mask[t, :t] = mask[self.before[t], :t]
        return mask


def pack(tree: mcts.Tree, paths: list[list[int]]) -> Pack:
    """Pack `paths`, each a list of node indices from the first step down (tree.path(i)), into one sequence.

    >>> tree = mcts.Tree("q", "a", prompt=[5, 6])
    >>> a, b = tree.add(mcts.Node(0, [7, 8])), tree.add(mcts.Node(0, [9]))
    >>> p = pack(tree, [tree.path(a), tree.path(b)])
    >>> p.tokens.tolist(), p.position.tolist(), p.before.tolist(), p.node.tolist()
    ([5, 6, 7, 8, 9], [0, 1, 2, 3, 2], [-1, 0, 1, 2, 1], [0, 0, 1, 1, 2])
    """
    n = len(tree.prompt)
    tokens = list(tree.prompt)
    position = list(range(n))
    before = list(range(-1, n - 1))
    node = [0] * n
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
    columns = np.array([tokens, position, before, node], dtype=np.int32)
    return Pack(*columns, num_nodes=len(tree.nodes))


@dataclass
class Batch:
    """B packs as rows, right-padded to T tokens."""
    tokens: Tensor            # (B, T)
    position: Tensor          # (B, T)
    mask: Tensor              # (B, T, T) bool, which tokens each token sees


def padded_length(pack):
    """Tokens of a pack, rounded up to a multiple of 64, so that GPU kernels meet few shapes."""
    return 64 * math.ceil(len(pack.tokens) / 64)


def collate(packs: list[Pack], device: torch.device) -> Batch:
    """The Batch of `packs`, on `device`."""
    B = len(packs)
    T = max(map(padded_length, packs))
    tokens, position = np.zeros((2, B, T), dtype=np.int64)
    mask = np.zeros((B, T, T), dtype=bool)
    mask |= np.eye(T, dtype=bool)                                   # padding sees itself: no NaN
    for b, p in enumerate(packs):
        t = len(p.tokens)
        tokens[b, :t] = p.tokens
        position[b, :t] = p.position
        mask[b, :t, :t] = p.mask()
    columns = [torch.from_numpy(column).to(device) for column in (tokens, position, mask)]
    return Batch(*columns)


def hidden_states(module, packs):
    """(T, D) what the backbone of a policy or critic makes of the tokens, and the padding, of each pack."""
    batch = collate(packs, module.device)
    attention = mcts.tree_attention(batch.mask, batch.position)
    return mcts.hidden_states(module.lm, batch.tokens, batch.position, attention)


def sum_by_node(packs, places, values):
    """`values`, one for each of the places in the packs in turn, added up at the nodes they belong to: a
    (num_nodes,) vector for each pack."""
    found = []
    parts = values.split([*map(len, places)])
    for p, at, part in zip(packs, places, parts):
        node = torch.from_numpy(p.node[at]).to(values.device)
        found.append(values.new_zeros(p.num_nodes).index_add(0, node, part))
    return found


class Policy(nn.Module):
    """A causal LM to shard, search with and train. FSDP gathers its parameters while its `forward` runs, so
    they are used in there only.

    policy(packs=[...]) -> one (num_nodes,) vector of step log-probs a pack, in float32 (float64 for a float64
    LM); policy(input_ids=...) -> the language model's own output.
    """

    def __init__(self, lm, compute=None, device=None, offload=False, recompute=False):
        super().__init__()
        self.lm = lm
        self.config = lm.config                                     # which mcts asks for, as of any model
        self.generation_config = lm.generation_config
        self.compute = compute or lm.dtype                          # the type it computes in and is saved in
        self.device = device or lm.device                           # where it computes, wherever weights are
        self.offload = offload
        self.recompute = recompute
        if recompute:
            recompute_blocks(lm)

    def forward(self, packs: list[Pack] | None = None, **inputs):
        """Step log-probs of packs; without packs the LM's own output: FSDP serves this method alone."""
        if packs is None:
            return self.lm(**inputs)
        longest = 1 + max(p.position.max() for p in packs)
        if longest > mcts.context_length(self):
            raise InputError(f"a solution has {longest} tokens with its prompt, more than the model's "
                             f"context of {mcts.context_length(self)}: leave it out")
        steps = [np.flatnonzero(p.node) for p in packs]             # where the tokens of steps are
        hidden = hidden_states(self, packs)
        before = [p.before[at] for p, at in zip(packs, steps)]
        predictors = torch.cat([h[at] for h, at in zip(hidden, before)])        # (R, D)
        targets = np.concatenate([p.tokens[at] for p, at in zip(packs, steps)])
        targets = torch.from_numpy(targets).to(self.device, torch.int64)
        logits_of = mcts.logits_of(self.lm)

        def token_logprobs(hidden, target):
            logits = logits_of(hidden)                              # (r, V)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)

        vocabulary = self.lm.config.get_text_config().vocab_size
        rows = max(1, 2**26 // vocabulary)                          # 256 MiB of logits
        parts = zip(predictors.split(rows), targets.split(rows))
        # Computed again in the backward pass, so that the (R, V) logits never exist at once
        logprobs = [checkpoint(token_logprobs, h, t, use_reentrant=False) for h, t in parts]
        return sum_by_node(packs, steps, torch.cat(logprobs))


class Critic(nn.Module):
    """An outcome value model (Sec. 4.4.2; OREO's value network): the backbone of a policy, copied, with a
    scalar head that starts at 0. critic(packs=[...]) -> one (num_nodes,) vector a pack: V of the state that
    each step leads to, 0 for nodes outside."""

    def __init__(self, lm, policy):
        super().__init__()
        self.lm = lm
        self.device = policy.device
        width = lm.get_output_embeddings().weight.shape[1]
        lm.set_output_embeddings(nn.Identity())                     # nobody asks it for words
        self.head = nn.Linear(width, 1, device=lm.device, dtype=lm.dtype)
        if policy.recompute:
            recompute_blocks(lm)

    def forward(self, packs: list[Pack]) -> list[Tensor]:
        ends = [np.flatnonzero(np.diff(p.node, append=-1)) for p in packs]      # last tokens, of the root too
        hidden = hidden_states(self, packs)
        read = torch.cat([h[at] for h, at in zip(hidden, ends)])    # (M, D)
        value = self.head(read)[:, 0]
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        return sum_by_node(packs, ends, value)                      # one at each node


def step_logprobs(model: nn.Module, pack: Pack) -> Tensor:
    """(num_nodes,) log pi(a|s) of every step in `pack`, summed over its tokens, EOS included; 0 for nodes
    outside. Differentiable. Raises InputError for a Policy or causal LM that cannot be packed exactly."""
    mcts.check_model(model)
    policy = model if isinstance(model, Policy) else Policy(model)
    policy.served = model.served                                    # what the check found: it is not done again
    return policy(packs=[pack])[0]


# ---------------------------------------------------------------- from trees to training examples


@dataclass
class Example:
    """What one question contributes: packed paths or steps and, per node of its tree, what losses ask for."""
    pack: Pack                # with what comes before a single step
    path: Tensor              # (P, num_nodes) 1 where a node lies on the path (Step-DPO: is the step)
    correct: Tensor           # (P,) bool; of pairs: the first half is better, the second their worse ones
    units: int                # losses it gives: paths or pairs
    parent: Tensor            # (num_nodes,) index; 0 for the root
    tokens: Tensor            # (num_nodes,) of each step
    reward: Tensor            # (num_nodes,) r; 0 but on terminals
    value: Tensor             # (num_nodes,) V of the search, or of a value model; 0 where a solution ended
    reference: Tensor         # (num_nodes,) log pi_ref: at first as stored by the search, see add_reference

    @property
    def credit(self) -> Tensor:
        """(num_nodes,) r + V(s') - V(s) of every step (Eq. 10), 0 at the root; r - V(s_0) along a path."""
        return mcts.credit(self.reward, self.value, self.value[self.parent])

    @property
    def outcome(self) -> Tensor:
        """(P,) +1 or -1."""
        return 2.0 * self.correct - 1.0

    def take_values(self, value: Tensor) -> None:
        """Replace the values of the search by those of a value model (Sec. 4.4.2)."""
        self.value = torch.where(self.reward == 0, value, 0.0)      # r is not 0 where a solution ended

    def like(self, vector: Tensor) -> "Example":
        """The same on the device of `vector`, and its numbers in that precision."""
        moved = dict(vars(self))
        for name, column in moved.items():
            if isinstance(column, Tensor):
                moved[name] = column.to(vector if column.is_floating_point() else vector.device)
        return Example(**moved)


def draw_paths(tree, n, seed):
    """Up to n correct and up to n incorrect valid paths of `tree`, drawn without replacement, weighted by the
    sum of visits along the path (as in the authors' code). Seed, question and tree decide the draw."""
    rng = generator(seed, tree.question)
    drawn = []
    for outcome in 1, -1:
        ends = [i for i, node in enumerate(tree.nodes) if node.valid and node.reward == outcome]
        paths = [tree.path(i) for i in ends]
        if paths:
            visits = [sum(tree.nodes[i].visits for i in path) for path in paths]
            chance = np.array(visits) / sum(visits)
            size = min(n, len(paths))
            order = rng.choice(len(paths), size, replace=False, p=chance)
            paths = [paths[k] for k in order]
        drawn.append(paths)
    return drawn


def generator(seed, *names):
    """Numpy's random numbers that belong to `seed`, of either sign, and `names`."""
    text = " ".join(map(str, names))
    key = zlib.crc32(text.encode())
    return np.random.default_rng([seed % 2**64, key])


def correct_paths(tree, n, seed):
    """RFT trains on correct paths."""
    return draw_paths(tree, n, seed)[0], []


def path_pairs(tree, n, seed):
    """DPO: up to n pairs of a correct and an incorrect path, such that all drawn paths take part."""
    right, wrong = draw_paths(tree, n, seed)
    pairs = max(len(right), len(wrong)) if right and wrong else 0
    chosen = [right[k % len(right)] for k in range(pairs)]
    rejected = [wrong[k % len(wrong)] for k in range(pairs)]
    return chosen, rejected


def sibling_pairs(tree, n, seed):
    """Step-DPO: in each state the steps of the largest and of the smallest value among those whose value is
    the mean of two outcomes at least; of those pairs the n with the largest gap. (Its authors take the first
    wrong step of a solution, which an annotator names.)"""

    def value(i):
        return tree.nodes[i].value

    pairs = []
    for node in tree.nodes:
        steps = [i for i in node.children if tree.nodes[i].visits >= 2]     # so none that is terminal
        if steps:
            better = max(steps, key=value)
            worse = min(steps, key=value)
            gap = value(better) - value(worse)
            if gap > 0:
                pairs.append((gap, [better], [worse]))
    largest = sorted(pairs, key=itemgetter(0), reverse=True)[:n]
    return [better for _, better, _ in largest], [worse for _, _, worse in largest]


def any_paths(tree, n, seed):
    """The value model: 2 n paths drawn evenly from all that ended, failures of form too: V is the mean of
    them all."""
    ends = [i for i, node in enumerate(tree.nodes) if node.terminal]
    drawn = generator(seed, tree.question).permutation(ends)[:2 * n].tolist()
    right = [tree.path(i) for i in drawn if tree.nodes[i].reward > 0]
    wrong = [tree.path(i) for i in drawn if tree.nodes[i].reward < 0]
    return right, wrong


def make_example(tree: mcts.Tree, n: int = 4, seed: int = 0, keep_unsolved: bool = False,
                 choose: Callable = draw_paths) -> Example | None:
    """The Example of `tree`, or None if it offers nothing to train on: no correct path (as in the authors'
    code), or with keep_unsolved none at all. choose(tree, n, seed) -> the better and the worse paths, lists
    of node indices. What path_pairs and sibling_pairs choose counts as pairs, and nothing else does."""
    better, worse = choose(tree, n, seed)
    paths = better + worse
    if not paths or not (better or keep_unsolved):
        return None
    nodes = tree.nodes
    path = torch.zeros(len(paths), len(nodes))
    for row, on_path in zip(path, paths):
        row[on_path] = 1
    is_paired = choose in (path_pairs, sibling_pairs)
    whole = [tree.path(on_path[-1]) for on_path in paths]           # a single step comes with its prefix

    def column(numbers):
        return torch.tensor(numbers, dtype=torch.float32)

    return Example(
        pack=pack(tree, whole),
        path=path,
        correct=torch.arange(len(paths)) < len(better),
        units=len(better) if is_paired else len(paths),
        parent=torch.tensor([max(0, node.parent) for node in nodes]),
        tokens=column([len(node.tokens) for node in nodes]),
        reward=column([node.reward for node in nodes]),
        value=column([0.0 if node.terminal else node.value for node in nodes]),    # a tree shows r there
        reference=column([node.logprob for node in nodes]))


# What each objective trains on
OBJECTIVES = {"dvo": draw_paths, "rft": correct_paths, "dpo": path_pairs, "step-dpo": sibling_pairs,
              "kto": draw_paths, "oreo": draw_paths, "grpo": draw_paths, "vineppo": draw_paths}
EXPORTS = {"dpo": path_pairs, "kto": draw_paths, "sft": correct_paths}     # and each of TRL's trainers


def objective_loss(objective: str, e: Example, policy: Tensor, value: Tensor | None = None, *,
                   beta: float = 0.1, level: str = "step", z0: float = 0.0, alpha: float = 0.01) -> Tensor:
    """(units,) the loss of one example by one of OBJECTIVES, from `policy`, (num_nodes,) step log-probs.
    level: of dvo. z0: of kto. value, (num_nodes,) of the critic, and alpha: of oreo."""
    both = policy, e.reference
    if objective == "dvo":
        return dvo_loss(*both, e.credit, e.path, beta, level)
    if objective == "rft":
        return rft_loss(policy, e.path)
    if objective in ("dpo", "step-dpo"):
        chosen, rejected = e.path.chunk(2)
        return dpo_loss(*both, chosen, rejected, beta)
    if objective == "kto":
        return kto_loss(*both, e.path, e.correct, z0, beta)
    if objective == "oreo":
        return oreo_loss(*both, value, e.path, e.parent, e.outcome, beta, alpha)
    if objective == "grpo":                                         # the group: the paths of the question
        advantage = e.outcome - e.outcome.mean()                    # (P,)
        of_steps = advantage[:, None].expand_as(e.path)             # (P, num_nodes)
        return grpo_loss(*both, of_steps, e.tokens, e.path)
    if objective == "vineppo":                                      # V by the search instead of rollouts
        return grpo_loss(*both, e.credit, e.tokens, e.path)
    raise InputError(f"the objective is one of {', '.join(OBJECTIVES)}, not {objective!r}")


def critic_loss(e: Example, value: Tensor) -> Tensor:
    """(units,) the loss of one example for an outcome value model."""
    return value_loss(value, e.path, e.parent, e.outcome)


def one_step(prompt: list[int], tokens: list[int]) -> Example:
    """The Example of a whole solution, taken as a single correct step, node 1."""
    tree = mcts.Tree("", "", prompt)
    tree.add(mcts.Node(0, tokens, reward=1, terminal=True, visits=1))
    return make_example(tree)


def mismatched(examples: list[Example], steps: list[list[int]], context: int,
               seed: int) -> list[list[Example]]:
    """For KTO's reference point (arXiv 2402.01306, Sec. 4.1): prompts, each with a path of another question
    of the same optimiser step, of at most `context` tokens; drawn anew for each step. Their reference is
    still to be added."""
    found = []
    for step, chosen in enumerate(steps):
        rng = generator(seed, "mismatched", step)
        askers = rng.permutation(chosen)
        pairs = []
        for i, j in zip(askers, np.roll(askers, 1)):
            if i != j:
                mine, other = examples[i].pack, examples[j].pack
                prompt = mine.tokens[mine.node == 0]
                path = rng.choice(examples[j].path.numpy())         # (num_nodes,)
                lent = other.tokens[path[other.node] > 0]
                pairs.append(one_step(prompt.tolist(), lent.tolist()))
        found.append([e for e in pairs if len(e.pack.tokens) <= context])
    return found


@torch.no_grad()
def reference_point(policy, pairs: list[Example], max_tokens: int) -> float:
    """KTO's z0: the mean log-ratio of mismatched pairs, which know their reference, an estimate of
    KL(pi || pi_ref), at least 0."""
    total = torch.zeros(1, dtype=torch.float64)
    for weight, batch in my_micro_batches(pairs, max_tokens):
        vectors = policy(packs=[pairs[i].pack for i in batch])
        for i, logprobs in zip(batch, vectors):
            log_ratio = logprobs[1].item() - pairs[i].reference[1].item()
            total += weight * log_ratio
    add_over_ranks(total)
    return max(0.0, total.item() / max(1, len(pairs)))


# ---------------------------------------------------------------- training


class Learner:
    """A module with an AdamW and a peak rate of its own; without, it is only saved and loaded."""

    def __init__(self, module, peak=None):
        self.module = module
        self.peak = peak
        self.optimizer = ()                     # as torch.distributed writes it
        if peak is not None:
            self.optimizer = torch.optim.AdamW(module.parameters(), lr=peak, weight_decay=0.0, fused=True)


def schedule(n: int, epochs: int, questions_per_step: int, seed: int) -> list[list[int]]:
    """Which of n examples each optimiser step takes: every epoch all of them, in an order of its own."""
    steps = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed % 2**64, epoch])
        order = rng.permutation(n).tolist()
        for first in range(0, n, questions_per_step):
            steps.append(order[first:first + questions_per_step])
    return steps


# Steps of the warmup at least. Adam's first update moves every weight by the full rate, whatever the gradient:
# without some tens of steps a short training jumps.
SHORTEST_WARMUP = 20


def rate_share(step: int, total: int) -> float:
    """The share of the peak rate in (0, 1] at step 0 ... total - 1: a linear warmup of a tenth of all steps
    (Sec. 5) or more, then a cosine to 0."""
    ramp = max(round(0.1 * total), SHORTEST_WARMUP)
    if step < ramp:
        return (step + 1) / ramp
    progress_after = (step - ramp) / (total - ramp)
    return (1 + math.cos(math.pi * progress_after)) / 2


def train(learners: list[Learner], examples: list[Example], loss_fn: Callable, steps: list[list[int]], *,
          micro_tokens: int, beta: float | None = None, name: str = "train",
          log: Callable = lambda **fields: None, of_step: Callable = lambda step: {},
          state: Path | None = None, save_seconds: float = 600.0) -> None:
    """Minimise the mean of loss_fn(example, *outputs of the learners) -> (units,) over all units (paths or
    pairs) of each optimiser step. steps: which examples each takes, see `schedule`. beta: log implicit
    rewards. of_step(step), called on every rank: what loss_fn gets by name, such as {"z0": 0.1}. state: a
    folder that keeps weights and optimisers every `save_seconds` and at the end, and from which training goes
    on. A step whose gradient is not finite is skipped; the fifth in a row raises InputError."""
    total = len(steps)
    first = load_state(state, learners) if state and from_rank_0(state.exists) else 0
    if 0 < total < SHORTEST_WARMUP:
        say(f"{name}: {total} steps end within the warmup, below the peak rate", file=sys.stderr)
    saved = time.time()
    bad_in_a_row = 0
    for step in progress(name, total, "step", iterable=range(first, total), initial=first):
        start = time.time()
        # 1. What belongs to the step alone, such as KTO's reference point
        loss_of_step = functools.partial(loss_fn, **of_step(step))
        # 2. Forward and backward
        taken = [examples[i] for i in steps[step]]
        found = accumulate(learners, taken, loss_of_step, micro_tokens, beta)
        # 3. Update all learners, or none
        share = rate_share(step, total)
        norm, is_finite = update(learners, share)
        bad_in_a_row = 0 if is_finite else bad_in_a_row + 1
        if bad_in_a_row == 5:
            raise InputError("the gradient was not finite for 5 steps in a row; lower the rate")
        # 4. Log
        tokens = sum(len(e.pack.tokens) for e in taken)
        speed = round(tokens / (time.time() - start))
        log(step=step + 1, **found, lr=share * learners[0].peak, grad_norm=norm,
            skipped=not is_finite, tokens_per_second=speed)
        # 5. Save, by the clock of rank 0
        is_due = from_rank_0(lambda: time.time() - saved > save_seconds)
        if state and (is_due or step + 1 == total):
            save_state(state, learners, step + 1)
            saved = time.time()


def accumulate(learners, taken, loss_fn, micro_tokens, beta):
    """Add the gradient of the mean loss over all units of the examples taken to the learners' parameters;
    return that loss and, with a beta, the mean implicit reward of the paths of each outcome, None where there
    is none."""
    units = sum(e.units for e in taken)
    sums = []                               # (3,) of each example: loss, and rewards of right, of wrong paths
    for weight, batch in my_micro_batches(taken, micro_tokens):
        packs = [taken[i].pack for i in batch]
        outputs = [learner.module(packs=packs) for learner in learners]
        loss = 0.0
        for i, *vectors in zip(batch, *outputs):                    # a vector by each learner
            logprobs = vectors[0]                                   # or values: a critic alone has no beta
            e = taken[i].like(logprobs)
            losses = loss_fn(e, *vectors)
            loss = loss + weight * losses.sum() / units
            log_ratio = logprobs.detach() - e.reference
            reward = (beta or 0.0) * (e.path @ log_ratio)           # (P,)
            is_right = e.correct.to(reward)
            rewards = is_right @ reward, (1 - is_right) @ reward
            mine = torch.stack([losses.sum().detach(), *rewards])
            sums.append(weight * mine.double())
        (loss * world()).backward()                                 # FSDP averages over ranks: undo that
    total = torch.stack(sums).sum(0).cpu()
    add_over_ranks(total)
    loss, right, wrong = total.tolist()
    found = {"loss": loss / units}
    if beta:
        correct = torch.cat([e.correct for e in taken])             # below, TRL's names
        for name, reward, paths in ("chosen", right, correct), ("rejected", wrong, ~correct):
            found[f"rewards/{name}"] = reward / paths.sum().item() if paths.any() else None
    return found


def update(learners, share):
    """An optimiser step of all learners at `share` of their peak rates, gradients scaled to a norm of 1 at
    most; or of none where a gradient is not finite. Returns the first one's norm, and whether it was done."""
    norms = []
    for learner in learners:
        norm = nn.utils.clip_grad_norm_(learner.module.parameters(), 1.0)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm     # the same on every rank
        norms.append(norm.item())
    is_finite = all(map(math.isfinite, norms))
    for learner in learners:
        [group] = learner.optimizer.param_groups
        group["lr"] = share * learner.peak
        if is_finite:
            learner.optimizer.step()
        learner.optimizer.zero_grad()
    return norms[0], is_finite


def micro_batches(examples, max_tokens, first=0, every=1):
    """Indices of examples, the shortest first, in batches of at most max_tokens padded tokens, or of one
    example. first, every: a rank takes, in this order, the `first` and every `every`th after it."""
    lengths = [len(e.pack.tokens) for e in examples]
    batches = []
    for i in np.argsort(lengths, kind="stable").tolist()[first::every]:
        longest = padded_length(examples[i].pack)                   # so far
        if batches and longest * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def my_micro_batches(examples, max_tokens):
    """This rank's share of `examples` as batches (weight, indices), as many on every rank, since all meet in
    every forward: what a rank lacks is the shortest example again, with weight 0 instead of 1."""
    of_rank = [micro_batches(examples, max_tokens, r, world()) for r in range(world())]
    mine = of_rank[rank()]
    idle = max(map(len, of_rank)) - len(mine)
    repeated = [(0.0, of_rank[0][0][:1]) for _ in range(idle)]
    return [(1.0, batch) for batch in mine] + repeated


@torch.no_grad()
def forward_all(module: nn.Module, examples: list[Example], name: str,
                max_tokens: int) -> list[Tensor]:
    """module(packs=...) of each example, on the CPU: each rank does its share."""
    batches = my_micro_batches(examples, max_tokens)
    found = {}
    for weight, batch in progress(name, len(batches), "batch", iterable=batches, leave=False):
        vectors = module(packs=[examples[i].pack for i in batch])
        if weight:
            found |= {i: vector.cpu() for i, vector in zip(batch, vectors)}
    reshard(module)
    parts = [found]
    if dist.is_initialized():
        parts = [None] * world()
        dist.all_gather_object(parts, found)
    found = ChainMap(*parts)
    return [found[i] for i in range(len(examples))]


def add_reference(policy, examples, max_tokens):
    """Fill in log pi_ref of every step: the policy before its first update is the reference of the round, so
    no second model is kept. (What the search stored was computed in other batches, with other roundings.)
    Returns the mean difference from that in the worst example, in nats a token."""
    distances = []
    found = forward_all(policy, examples, "reference", max_tokens)
    for e, reference in zip(examples, found):
        packed = np.unique(e.pack.node)
        difference = reference[packed] - e.reference[packed]
        e.reference = reference
        num_tokens = e.tokens[packed].sum().clamp(min=1)
        distances.append(difference.abs().sum() / num_tokens)
    return torch.stack(distances).max().item() if distances else 0.0    # NaN, if one is


# ---------------------------------------------------------------- one model, any number of GPUs

# FSDP splits every parameter over the ranks. For the forward of a decoder block, which is a meeting of all
# ranks, each gathers the block's parameters, and gives them up after it; in the backward pass again, and there
# the gradients are averaged. So in training all ranks make the same forwards (`my_micro_batches`), and where
# each works at its own pace it holds all parameters meanwhile (`at_own_pace`).


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def meet():
    """All ranks wait for each other."""
    if dist.is_initialized():
        dist.barrier()


def add_over_ranks(values):
    """Sum a tensor of the CPU over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)


def from_rank_0(work):
    """What `work` returns on rank 0, on every rank; or the InputError that it raises there."""
    answer = [None, None]                   # a result, or a problem
    if rank() == 0:
        try:
            answer[0] = work()
        except InputError as error:
            answer[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    result, problem = answer
    if problem:
        raise problem
    return result


def say(text, **how):
    """Print on rank 0."""
    if rank() == 0:
        print(text, **how)


def progress(description, total, unit='question', **how):
    """A progress bar on rank 0; the others work in silence, and so does a bar of nothing."""
    return tasks.progress(description, total, unit, disable=rank() > 0 or total == 0, **how)


def start_ranks(device, dtype):
    """Join the process group that torchrun announces, and return this rank's device. A lone process gets a
    group of its own on a GPU, or for bfloat16: FSDP also keeps float32 master weights there."""
    own = os.environ.get("LOCAL_RANK")
    if own and torch.cuda.is_available() and device in (None, "cuda"):
        device = f"cuda:{own}"
    device = mcts.pick_device(device)
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(device)
    backend = "cuda:nccl,cpu:gloo" if is_gpu else "gloo"
    tasks.ranks()                                                   # raises InputError for a stray RANK
    if "WORLD_SIZE" in os.environ:
        with told("join the group of ranks", "start with torchrun, or unset RANK and WORLD_SIZE", ValueError):
            dist.init_process_group(backend)
    elif is_gpu or dtype == "bfloat16":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def load_policy(name: str, device: torch.device, dtype: str | None = None, *, offload: bool = False,
                activation_checkpointing: bool = False) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The Policy and its tokenizer on every rank. In a process group the master weights are float32 (float64
    if dtype says so) and sharded, and what computes is dtype, by default bfloat16 on a GPU; without a group
    there is one copy, of float32 (default) or float64. offload, in a group: weights, gradients and optimiser
    live in host memory. Raises InputError for what cannot be loaded, searched or trained exactly."""
    master = "float64" if dtype == "float64" else "float32"
    if not dist.is_initialized():
        lm, tokenizer = mcts.load_model(name, device, master)
        policy = Policy(lm, recompute=activation_checkpointing)
    else:
        default = "bfloat16" if device.type == "cuda" else "float32"
        lm, tokenizer = in_turn(lambda: mcts.load_model(name, torch.device("meta"), master))
        policy = Policy(lm, getattr(torch, dtype or default), device, offload, activation_checkpointing)
        shard(policy, policy)
        read_pretrained(policy, name)
    policy.eval()                                                   # for good: no dropout in training either
    mcts.check_model(policy)
    reshard(policy)
    return policy, tokenizer


def reshard(module):
    """Give up gathered weights: those of the root, embeddings and head, stay after a forward by default."""
    for block in sharded_blocks(module):
        block.reshard()


def sharded_blocks(module):
    return [block for block in module.modules() if isinstance(block, FSDPModule)]


def in_turn(work):
    """What `work` returns, which the first rank of each machine does before the others: it downloads."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = work() if is_first else None
    wait_for_ranks("in turn")
    return result if is_first else work()


def decoder_blocks(lm):
    names = lm._no_split_modules or ()
    return [module for module in lm.modules() if type(module).__name__ in names]


def recompute_blocks(lm):
    """Activation checkpointing: keep a block's input only. Not transformers' own, which is for train mode."""
    for block in decoder_blocks(lm):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def shard(module, policy):
    """Split the parameters of `module`, which are on the meta device, over the ranks, as those of `policy`
    are: it or its critic. They hold no numbers yet."""
    how = {}
    how["mesh"] = dist.device_mesh.init_device_mesh(policy.device.type, (world(),))
    how["mp_policy"] = MixedPrecisionPolicy(policy.compute, policy.lm.dtype)        # compute, reduce
    if policy.offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=policy.device.type == "cuda")
    for block in decoder_blocks(module.lm):
        fully_shard(block, **how)
    fully_shard(module, **how)
    module.to_empty(device="cpu" if policy.offload else policy.device)
    for part in module.modules():                                   # FSDP moves offloaded weights, no buffers
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(policy.device))


def read_pretrained(policy, name):
    """Give a policy the weights in the folder or hub name `name`: rank 0 reads, all get their shards."""
    weights = {}
    if rank() == 0:
        master = str(policy.lm.dtype).removeprefix("torch.")
        full, _ = mcts.load_model(name, "cpu", master)
        weights = {f"lm.{key}": weight for key, weight in full.state_dict().items()}
    wait_for_ranks("weights")                                       # it may take long to download them
    if not dist.is_initialized():
        policy.load_state_dict(weights)
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, weights, options=options)
    for key, buffer in policy.lm.named_buffers():                   # rotary frequencies are in no state dict
        if rank() == 0:
            buffer.copy_(full.get_buffer(key))
        dist.broadcast(buffer, src=0)


def make_critic(policy: Policy) -> Critic:
    """A critic with the policy's present weights, sharded alike, and a head of zeros."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(policy.config, dtype=policy.lm.dtype)
        critic = Critic(lm, policy)
    if dist.is_initialized():
        shard(critic, policy)
    else:
        critic.to_empty(device=policy.device)
    own = dict(policy.named_parameters()) | dict(policy.named_buffers())
    with torch.no_grad():
        for name, tensor in [*critic.named_parameters(), *critic.named_buffers()]:
            tensor.zero_()                                          # the head stays so
            if name in own:
                tensor.copy_(own[name])                             # shard to shard
    return critic.eval()


@contextlib.contextmanager
def at_own_pace(module, name, shard_search=False):
    """Let each rank call `module` as often as it likes inside the block; all meet at its end, however late.
    By default every rank holds all weights in the compute type meanwhile. With shard_search (for a model that
    does not fit) each forward gathers them block by block: a rank that is done runs idle ones until all are.
    """
    blocks = sharded_blocks(module)
    if blocks and shard_search:
        def say_that_i_work(*_):
            somebody_works(True)

        with module.register_forward_pre_hook(say_that_i_work, prepend=True):
            yield
        with torch.no_grad():
            while somebody_works(False):
                module(packs=[one_step([0], [0]).pack])             # an idle forward, the smallest
        reshard(module)
        return
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    try:
        yield
        wait_for_ranks(name)
    finally:
        for block in blocks:                                        # the root keeps its own, as by default
            block.set_reshard_after_forward(block is not module, recurse=False)
        reshard(module)


def somebody_works(me):
    """Whether any rank says that it works. All ranks call this once before each forward, idle ones too."""
    working = torch.tensor(float(me))
    add_over_ranks(working)
    return bool(working > 0)


def wait_for_ranks(name, patience=60):
    """Wait until every rank has come here, however late: a barrier would die at the group's time limit."""
    if world() == 1:
        return
    start = time.time()
    with told("wait for the other ranks", "the one that failed first says why", RuntimeError):
        store = dist.distributed_c10d._get_default_store()          # counters that all ranks see
        times = store.add(f"{name}/{rank()}", 1)                    # this rank has come here under this name
        while late := [r for r in range(world()) if store.add(f"{name}/{r}", 0) < times]:
            time.sleep(0.2)
            if rank() == 0 and time.time() - start > patience:
                print(f"{name}: still waiting for rank {', '.join(map(str, late))}", file=sys.stderr)
                start = time.time()
        meet()                              # the store may live in rank 0, which no other asks after this


# ---------------------------------------------------------------- what a run leaves on disk


# dcp says so at each save of a lone process, which is just what is wanted
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def put(path, write):
    """Let write(new) make a file or folder under a temporary name; it gets its own name when complete. All
    ranks call this; they meet before and after the renaming."""
    new = path.with_name(path.name + ".new")
    old = path.with_name(path.name + ".old")
    meet()
    full_disk = Exception, CheckpointException                      # which has many faces
    bugs = AttributeError, LookupError, NameError, TypeError
    with told(f"write {path}", errors=full_disk, unless=bugs):
        write(new)
    wait_for_ranks(path.name)                                       # a large model takes long
    if rank() == 0:
        if path.exists():
            path.rename(old)
        new.rename(path)
        remove(old)
    meet()


def remove(path):
    """Remove a file, a folder, or nothing."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def clean_up(folder):
    """Undo what a kill in the middle of `put` has left."""
    for new in folder.rglob("*.new"):
        remove(new)
    for old in folder.rglob("*.old"):
        path = old.with_suffix("")
        if path.exists():
            remove(old)
        else:
            old.rename(path)


def state_of(learners):
    """Weights and optimiser state of each learner, by names that load on any number of ranks."""
    state = {}
    for i, learner in enumerate(learners):
        state[f"model{i}"], state[f"optimizer{i}"] = get_state_dict(learner.module, learner.optimizer)
    return state


def save_state(folder, learners, step):
    """Master weights, optimisers and step, each rank its shards: what training goes on from."""
    state = state_of(learners) | {"step": step}
    put(folder, lambda new: dcp.save(state, checkpoint_id=new))


def load_state(folder, learners):
    """Load what save_state saved, or the policy alone, on any number of ranks, and return the step."""
    state = state_of(learners) | {"step": 0}
    with told(f"read the training state {folder}", "restore it, or start anew with another --out",
              (OSError, RuntimeError, ValueError, CheckpointException)):
        dcp.load(state, checkpoint_id=folder)
    for i, learner in enumerate(learners):
        model, optimizer = state[f"model{i}"], state[f"optimizer{i}"]
        set_state_dict(learner.module, learner.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    return state["step"]


def save_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder that from_pretrained or vLLM loads, in the compute type."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)         # empty but on rank 0

    def write(new):
        if rank() > 0:
            return
        for name in list(weights):
            weight = weights.pop(name)
            weights[name.removeprefix("lm.")] = weight.to(policy.compute)
        policy.lm.save_pretrained(new, state_dict=weights)
        tokenizer.save_pretrained(new)
        policy.config.dtype = policy.compute                        # not that of the master weights
        policy.config.save_pretrained(new)
        for file in new.glob("*.safetensors"):                      # which are for their owner alone
            file.chmod((new / "config.json").stat().st_mode)

    put(folder, write)


class Run:
    """A run folder, which the same command continues: config.json, log.jsonl (which repeats the steps done since
    the last saved state), and of each round trees, responses, STAGE.json of every stage that is done, state/
    and model/. Raises InputError if it holds a run with other settings or is not writable."""
    FREE = {"out", "rounds", "device", "slots", "kv_budget", "micro_tokens", "offload", "shard_search",
            "activation_checkpointing", "save_minutes"}     # may change: results agree but for rounding

    def __init__(self, folder, args):
        self.folder = Path(folder)
        self.args = args
        self.round = 0
        self.unread = None                      # the state of what an earlier process trained, if to be loaded
        self.policy = None                      # these until `main` has loaded or found them
        self.tokenizer = None
        self.question = None                    # an example for the model's card
        self.lines = None                       # log.jsonl, open on rank 0
        from_rank_0(self._open)

    def _open(self):
        """Make the folder if it is new, keep others out, and compare the settings. Rank 0 does this."""
        given = vars(self.args).items()
        fixed = {name: value for name, value in given if name not in self.FREE}
        settings = json.loads(json.dumps(fixed, default=vars))      # of the Format its fields
        config = self.folder / "config.json"
        new = config.with_name("config.json.new")
        old = settings
        with told(f"read {config}", "restore it, or choose another --out", (OSError, ValueError)):
            if config.exists():
                old = json.loads(config.read_text())
        with told(f"write to the run folder {self.folder}", "choose another --out"):
            self.folder.mkdir(parents=True, exist_ok=True)
            own = config, new, self.folder / "log.jsonl"
            others = [path for path in self.folder.rglob("*") if path.is_file() and path not in own]
            is_run = config.exists() and isinstance(old, dict) and "objective" in old
            if not is_run and (others or config.exists()):
                raise InputError(f"{self.folder} is not empty and holds no run; choose another --out")
            self.lines = tasks.open_lines(self.folder / "log.jsonl")    # locked: one run at a time
            clean_up(self.folder)
            if not others:                                          # a run that has not begun
                old = settings
                new.write_text(json.dumps(settings, indent=1) + "\n")
                new.rename(config)
        differ = []
        for name in sorted({*old, *settings}):
            was, now = old.get(name), settings.get(name)
            if tasks.resolved(was) != tasks.resolved(now):
                differ.append(f"{name} was {was!r} and is {now!r}")
        if differ:
            raise InputError(f"{self.folder} holds a run with other settings ({'; '.join(differ)}); repeat "
                             "those, or choose another --out")

    def log(self, event, **fields):
        """Write one line."""
        if rank() == 0:
            when = {"event": event, "round": self.round, "time": round(time.time(), 3)}
            for name, value in fields.items():
                if isinstance(value, float) and not math.isfinite(value):
                    fields[name] = None                             # JSON has no NaN
            tasks.write_line(self.lines, when | fields)

    def training(self, event, label, state):
        """What every training of a run is called with: its event in the log, its label and its state."""
        return dict(
            name=label,
            log=functools.partial(self.log, event),
            state=self.file(state),
            save_seconds=60 * self.args.save_minutes,
            micro_tokens=self.args.micro_tokens)

    def file(self, name, of_round=None):
        """A path in the folder of a round (default: the current one), which is made."""
        path = self.folder / f"round{self.round if of_round is None else of_round}" / name
        path.parent.mkdir(exist_ok=True)
        return path

    def result(self, stage, of_round=None):
        """What a stage found, empty if it is not done."""
        path = self.file(f"{stage}.json", of_round)
        remedy = "restore it, or, in the newest round, delete it to do that stage again"
        with told(f"read {path}", remedy, (OSError, ValueError)):
            return json.loads(path.read_text()) if path.exists() else {}

    def files(self, name):
        """What ranks have written as NAME.rank*.jsonl in the current round."""
        return sorted(self.file("").glob(f"{glob.escape(name)}.rank*.jsonl"))

    def records(self, name):
        """All records of those files, one at a time."""
        return itertools.chain.from_iterable(map(tasks.read_lines, self.files(name)))

    def share_out(self, name, problems, unit, units, work):
        """See that NAME.rank*.jsonl hold a record of each of `problems`: every rank takes its share of those
        that are not there yet and keeps each of work(share, progress) as it comes. units: of each problem, for
        the bar. All ranks call this."""
        if rank() == 0:
            for path in self.files(name):
                tasks.open_lines(path).close()                      # drops a line that was torn
        meet()
        done = {record["question"] for record in self.records(name)}
        meet()                                                      # all have read before one writes
        todo = [problem for problem in problems if problem["question"] not in done]
        mine = todo[rank()::world()]
        label = f"round {self.round}: {name}"
        lines = tasks.open_lines(self.file(f"{name}.rank{rank()}.jsonl"))
        with (lines, at_own_pace(self.policy, label, self.args.shard_search),
              progress(label, len(mine) * units, unit, unit_scale=True) as bar):
            for record in work(mine, bar.update):
                tasks.write_line(lines, record)


# ---------------------------------------------------------------- the stages of a run


def run_stages(run, problems, eval_sets):
    """Round 0: bootstrapping if asked for, and an evaluation. Then search, training and evaluation of each
    round. Whatever is done already is passed over."""
    args = run.args
    for run.round in range(args.rounds + 1):                        # where `file`, `log` and others look
        if run.round == 0 and args.bootstrap:
            stage(run, "bootstrap", bootstrap, problems[:args.bootstrap_questions])
        if run.round > 0 and args.trees:
            say(f"the trees given: {mcts.explain(mcts.describe(trees_of_round(run)))}")
        elif run.round > 0:
            stage(run, "search", search_round, questions_of_round(run.round, problems, args))
        if run.round > 0:
            stage(run, "trained", train_round)
        for task, questions in eval_sets.items():
            name = Path(task).stem                                  # of a file of questions, too
            stage(run, f"eval-{name}", evaluate_round, name, questions)


def stage(run, name, work, *given):
    """A part of a run: done when its file is there, NAME.json in the folder of its round, which holds what
    work(run, *given) found. It starts from the newest weights; a training leaves newer ones."""
    path = run.file(f"{name}.json")
    trains = work in (bootstrap, train_round)
    if from_rank_0(path.exists):
        if trains:
            run.unread = run.file("state")
    else:
        hold_newest(run)
        start = time.time()
        found = work(run, *given)
        found["seconds"] = round(time.time() - start, 1)
        run.log(name, **found)
        text = json.dumps(found, indent=1) + "\n"
        put(path, lambda new: rank() == 0 and new.write_text(text))
        if rank() == 0:
            write_card(run)
        if run.policy.device.type == "cuda":
            torch.cuda.empty_cache()                                # the next stage needs blocks of other sizes
    if trains:
        before = run.folder / f"round{run.round - 1}"               # later rounds start from this one's state
        for spent in before / "state", run.file("critic"), *run.file("").glob("state-*"):
            if rank() == 0:
                remove(spent)                                       # now, or what a kill has left


def hold_newest(run):
    """Give the policy the newest weights, unless it holds them: it starts as the base."""
    if run.unread:
        load_state(run.unread, [Learner(run.policy)])
        run.unread = None


def questions_of_round(r, problems, args):
    """Drawn by seed without replacement, over the rounds too, until all have been drawn."""
    order = generator(args.seed, "questions").permutation(len(problems))
    n = min(len(problems), args.questions_per_round)
    first = (r - 1) * args.questions_per_round
    drawn = np.take(order, range(first, first + n), mode="wrap")
    return [problems[i] for i in drawn]


def sample_responses(run, name, problems, shots=None):
    """Responses to each of `problems`, each rank its share, judged and kept in NAME.rank*.jsonl as they come;
    the records of all. shots: for bootstrapping, with as many worked examples in the prompt, maybe none, and
    tokens kept. The seed is the same in all rounds: so their noise is, and cancels in differences."""
    args = run.args
    n, temperature = args.trials, args.temperature
    if shots is not None:
        n, temperature = args.bootstrap_samples, args.bootstrap_temperature
    worked = WORKED[:shots or 0]
    kv_budget = mcts.search_settings(args)["kv_budget"]             # in bytes

    def respond(mine, update):
        prompts = [mcts.build_prompt(run.tokenizer, p["question"], worked, args.format) for p in mine]
        for i, samples in mcts.stream(
                run.policy, run.tokenizer, prompts, n=n, temperature=temperature, seed=args.seed,
                max_new_tokens=args.max_new_tokens, kv_budget=kv_budget, format=args.format, progress=update):
            record = tasks.judge(mine[i], samples, args.format.marker)
            if shots is not None:
                record["samples"] = [s.tokens for s in samples]
            yield record

    run.share_out(name, problems, "token", n * args.max_new_tokens, respond)
    records = {record["question"]: record for record in run.records(name)}
    return [records[p["question"]] for p in problems]


# Format bootstrapping (App. B): the base learns to write steps from its own correct responses

WORKED = [
    ("A shelf holds 4 rows of 9 books. 7 of the books are lent out, and then 3 come back. How many books are "
     "on the shelf now?",
     "First I find how many books the full shelf holds: 4 rows of 9 books are 4 * 9 = 36 books.\n\n"
     "Then 7 of them are lent out, which leaves 36 - 7 = 29 books.\n\n"
     "Then 3 books come back, so there are 29 + 3 = 32 books on the shelf.\n\n"
     "Final Answer: 32"),
    ("What is the sum of the solutions of x^2 - 5x + 6 = 0?",
     "I look for two numbers whose product is 6 and whose sum is 5. These are 2 and 3.\n\n"
     "So the equation factors as (x - 2)(x - 3) = 0.\n\n"
     "A product is zero if one of its factors is, so the solutions are x = 2 and x = 3.\n\n"
     "Their sum is 2 + 3 = 5.\n\n"
     "Final Answer: 5"),
    ("Which of these floats on water?\nA) a stone\nB) a cork\nC) a coin",
     "An object floats on water if it is less dense than water, so I compare the three materials.\n\n"
     "A stone is made of minerals, and a coin is made of metal. Both are denser than water and sink.\n\n"
     "A cork is full of tiny pockets of air, which makes it less dense than water, so it floats.\n\n"
     "Final Answer: B")]


def bootstrap(run, problems):
    """Imitate the base's own responses; keep that if it makes responses to questions held back, a fifth,
    right and well-formed more often. A model without a chat template needs worked examples to see the form;
    one with a template has a better way of its own."""
    args = run.args
    shots = args.bootstrap_shots
    if shots is None:
        shots = 0 if run.tokenizer.chat_template else len(WORKED)
    sampled = sample_responses(run, "samples", problems, shots)
    n = math.ceil(len(problems) / 5)
    before = measure_form(run, "before", problems[:n])
    unseen = demonstrations(run, sampled[:n])
    imitated = imitate_own(run, demonstrations(run, sampled[n:]), unseen)
    after = measure_form(run, "after", problems[:n]) if imitated["rate"] else before
    is_better = after["both"] > before["both"]
    rate = imitated["rate"] or "none of the rates tried"
    say(f"\nbootstrap: {imitated['responses']} responses to imitate, at a rate of {rate}; "
        f"{before['responses']} responses to questions held back:")
    for name, shares in ("before", before), ("after", after):
        say(f"  {name:7}right {shares['right']:.1%}, well-formed {shares['well_formed']:.1%}, both "
            f"{shares['both']:.1%}, {shares['tokens_per_step']:.0f} tokens a step")
    if not is_better:
        say("no gain: the rounds start from the base as it was given")
        read_pretrained(run.policy, args.model)
    save_state(run.file("state"), [Learner(run.policy)], step=0)
    save_model(run.policy, run.tokenizer, run.file("model"))
    return {"questions": len(problems), "worked_examples": shots, "before": before, "imitated": imitated,
            "after": after, "kept": is_better}


def measure_form(run, name, problems):
    """Of zero-shot responses the shares that are right, well-formed, and both; and tokens a step."""
    records = sample_responses(run, name, problems)
    responses = [response for record in records for response in record["responses"]]
    format = run.args.format
    right = [r["correct"] for r in responses]
    well_formed = [has_steps(r, format) for r in responses]
    n = max(1, len(responses))
    texts = [r["response"].strip() for r in responses]
    steps = sum(1 + text.count(format.step_end) for text in texts)
    tokens = sum(r["tokens"] for r in responses)
    return {
        "right": sum(right) / n,
        "well_formed": sum(well_formed) / n,
        "both": sum(map(min, right, well_formed)) / n,
        "tokens_per_step": tokens / max(1, steps),
        "responses": len(responses)}


def has_steps(response, format):
    """Whether a response has several steps, announces its answer, and ended by itself."""
    text = response["response"]
    return response["end"] != "cut" and format.step_end in text.strip() and format.announces(text)


def demonstrations(run, records, most=4):
    """The Examples of up to `most` correct, well-formed responses of each record, drawn evenly, so that short
    and long ones keep their shares and easy questions do not set the style; after the prompt without worked
    examples. One that ended with its answer's blank line goes on to EOS: elsewhere the model must stop by
    itself."""
    tokenizer = run.tokenizer
    context = mcts.context_length(run.policy)
    found = []
    for record in sorted(records, key=itemgetter("question")):
        prompt = mcts.build_prompt(tokenizer, record["question"], format=run.args.format)
        good = []
        for tokens, response in zip(record["samples"], record["responses"]):
            if response["correct"] and has_steps(response, run.args.format):
                is_full = len(prompt) + len(tokens) >= context
                if response["end"] == "answer" and tokenizer.eos_token_id is not None and not is_full:
                    tokens = [*tokens, tokenizer.eos_token_id]
                good.append(tokens)
        rng = generator(run.args.seed, record["question"])
        for i in rng.permutation(len(good))[:most]:
            found.append(one_step(prompt, good[i]))
    return found


def imitate(policy, examples, lr, batch, seed, **how):
    """One epoch of rft_loss, `batch` examples a step."""
    loss_fn = functools.partial(objective_loss, "rft")
    steps = schedule(len(examples), 1, batch, seed)
    train([Learner(policy, lr)], examples, loss_fn, steps, **how)


def imitate_own(run, examples, unseen):
    """Imitate at the rate given, or at a fourth or a sixteenth of it: the first that makes responses to
    questions held back likelier. The paper's rate is for thousands of examples; a few may not bear it."""
    args = run.args
    before = nats_per_token(run, unseen)
    found = {"responses": len(examples), "held_back": len(unseen), "nll": before,
             "tried": {}, "rate": None}
    batch = min(8 * args.questions_per_step, max(4, len(examples) // 40))   # so that there are steps to take
    for k in range(3 if examples and unseen else 0):
        if k:
            read_pretrained(run.policy, args.model)
        rate = args.bootstrap_lr / 4**k
        how = run.training("imitate", f"bootstrap: train at {rate:g}", f"state-{rate:g}")
        imitate(run.policy, examples, rate, batch, args.seed, **how)
        after = nats_per_token(run, unseen)
        found["tried"][f"{rate:g}"] = after
        if after < before:
            found["rate"] = rate
            break
    return found


def nats_per_token(run, examples):
    """Negative log-likelihood of imitated responses; 0 without any."""
    vectors = forward_all(run.policy, examples, "held back", run.args.micro_tokens)
    logprob = sum(vector.sum().item() for vector in vectors)
    tokens = sum(e.tokens.sum().item() for e in examples)
    return -logprob / max(1.0, tokens)


# Search, training and evaluation of a round


def search_round(run, problems):
    """Search those of `problems` that have no tree yet, each rank its share; then say what was found."""
    args = run.args
    settings = mcts.search_settings(args)
    settings["seed"] = args.seed + run.round
    settings["format"] = args.format

    def grow(mine, update):
        found = mcts.search(run.policy, run.tokenizer, mine, tasks.reward, progress=update, **settings)
        return (tree.record() for tree in found)

    run.share_out("trees", problems, "iteration", args.iterations, grow)
    found = mcts.describe(trees_of_round(run))
    say(f"round {run.round}: {mcts.explain(found)}")
    return found


def trees_of_round(run):
    """All trees of the current round, or those given with --trees, one at a time."""
    return own_trees(run.args.trees or run.files("trees"), run.tokenizer)


def own_trees(paths, tokenizer):
    """The trees of some files. Raises InputError if another tokenizer was used to search them."""
    own = mcts.fingerprint(tokenizer)
    for path in paths:
        for tree in mcts.read_trees(path):
            if tree.config.get("tokenizer", own) != own:
                raise InputError(f"the trees in {path} were searched with another tokenizer or chat "
                                 "template; give the model and tokenizer that searched them")
            yield tree


def train_round(run):
    """Train on the round's trees by the objective of the run and save the model. A run that was stopped in
    here computes the reference again, by the weights of the round before, and then goes on from its state."""
    args, policy = run.args, run.policy
    examples = examples_of_round(run, OBJECTIVES[args.objective], args.keep_unsolved)
    if not examples:
        about = mcts.explain(mcts.describe(trees_of_round(run)))
        raise InputError(f"nothing to train on in round {run.round}: {about}. Training needs a correct "
                         "solution (any with --keep-unsolved), dpo also a wrong one, step-dpo siblings of "
                         "different value: search more, or take questions of another difficulty")
    if args.targets == "value-model":
        value_by_model(run, examples)
    distance = add_reference(policy, examples, args.micro_tokens)
    if not distance < 0.05:                                         # bfloat16 alone makes 0.003; nor if NaN
        raise InputError("these trees, or some, were not sampled from this model: its log-probs differ by up to "
                         f"{distance:.2f} nats a token; give the model that searched them (those of round k: "
                         "the model of round k - 1)")
    seed = args.seed + run.round
    steps = schedule(len(examples), args.epochs, args.questions_per_step, seed)
    learners = [Learner(policy, args.lr)]
    if args.objective == "oreo":
        learners.append(Learner(make_critic(policy), args.value_lr))
    pairs = []
    if args.objective == "kto":
        pairs = mismatched(examples, steps, mcts.context_length(policy), seed)
        add_reference(policy, sum(pairs, []), args.micro_tokens)

    def of_step(step):
        return {"z0": reference_point(policy, pairs[step], args.micro_tokens)} if pairs else {}

    correct = torch.cat([e.correct for e in examples])              # of each path
    found = {"questions": len(examples), "paths": len(correct)}
    found["correct"] = correct.sum().item()
    say(f"round {run.round}: train on {found['paths']} paths or steps ({found['correct']} correct or better) of "
        f"{found['questions']} questions")
    loss_fn = functools.partial(objective_loss, args.objective, beta=args.beta, level=args.level)
    how = run.training("train", f"round {run.round}: train", "state")
    train(learners, examples, loss_fn, steps, beta=args.beta, of_step=of_step, **how)
    save_model(policy, run.tokenizer, run.file("model"))
    return found


def value_by_model(run, examples):
    """Train an outcome value model on the round's trees and give the examples its values."""
    args = run.args
    valued = examples_of_round(run, any_paths, keep_unsolved=True)
    critic = make_critic(run.policy)
    steps = schedule(len(valued), args.epochs, args.questions_per_step, args.seed + run.round)
    how = run.training("value", f"round {run.round}: value model", "critic")
    train([Learner(critic, args.value_lr)], valued, critic_loss, steps, **how)
    values = forward_all(critic, examples, "values", args.micro_tokens)
    for e, value in zip(examples, values):
        e.take_values(value)


def examples_of_round(run, choose, keep_unsolved):
    """The examples of the round's trees, by question: not in the order in which the searches ended."""
    args = run.args
    found = []
    for tree in trees_of_round(run):
        example = make_example(tree, args.paths, args.seed + run.round, keep_unsolved, choose)
        if example:
            found.append((tree.question, example))
    return [example for _, example in sorted(found, key=itemgetter(0))]


def evaluate_round(run, task, problems):
    """Evaluate the round's policy on one task; show a right and a wrong response."""
    records = sample_responses(run, f"responses-{task}", problems)
    shown = set()
    for record in records:
        for response in record["responses"]:
            word = "right" if response["correct"] else "wrong"
            if word not in shown:
                shown.add(word)
                text = f"{record['question']}\n\n{response['response'].strip()}"
                say(f"\nround {run.round}, {task}: a {word} response (the answer is {record['answer']})\n")
                say(textwrap.indent(text, "    "))
    result = tasks.summarise(records, run.args.trials)
    del result["trials"]
    return result | {"task": task}


def write_card(run):
    """Bring the README of the round's model up to date: where it comes from, its numbers, how it is asked."""
    args = run.args
    path = run.file("model") / "README.md"
    if not path.parent.exists():
        return
    how = f"round {run.round} of --objective {args.objective}"
    if run.round == 0:
        how = "format bootstrapping" + ("" if run.result("bootstrap").get("kept") else ", which did not help")
    found = [run.result(f"eval-{Path(task).stem}") for task in args.eval_data]
    rows = "".join(f"| {e['task']} | {e['accuracy']:.1%} of {e['n']} |\n" for e in found if e)
    rows = rows or "| not evaluated | |\n"
    ids = mcts.build_prompt(run.tokenizer, "QUESTION", format=args.format)
    prompt = run.tokenizer.decode(ids)
    card = f"""\
# {args.model} after {how}

Made by the reference implementation of Direct Value Optimization (arXiv 2502.13723); the settings are in
config.json of the run's folder.

| zero-shot, {args.trials} trials at temperature {args.temperature:g} | accuracy |
|---|---|
{rows}
Ask it as it was trained (for a server of chats: the system turn is the instruction below). A response is over
at the first blank line after its final answer, if it has not ended before: here it is ended there.

```python
from transformers import pipeline

prompt = {prompt!r}
solve = pipeline("text-generation", model=".")  # this folder
asked = prompt.replace("QUESTION", {run.question!r})
found = solve(asked, add_special_tokens=False, max_new_tokens={args.max_new_tokens}, do_sample=True,
              temperature={args.temperature:g}, top_k=0, return_full_text=False)
print(found[0]["generated_text"])
```
"""
    with told(f"write {path}"):
        path.write_text(card, encoding="utf-8")


def report(run):
    """Print accuracy and spread of the base, bootstrapped or not, and of every round."""
    names = [Path(task).stem for task in run.args.eval_data]
    if not names:
        return
    say(f"\n{'':12}" + "".join(f"{name:>24}" for name in names))
    first = "bootstrapped" if run.result("bootstrap", 0).get("kept") else "base"
    for r in range(run.args.rounds + 1):
        row = f"{f'round {r}' if r else first:12}"
        for name in names:
            e = run.result(f"eval-{name}", r)
            spread = "-" if e["sem"] is None else f"{100 * e['sem']:.1f}"
            row += f"{100 * e['accuracy']:.1f} ± {spread} %".rjust(24)
        say(row)


# Rows for other trainers


def export(trees, kind: str, tokenizer: PreTrainedTokenizerBase, n: int, seed: int, format: mcts.Format,
           keep_unsolved: bool = False):
    """Rows of TRL's trainers, conversational: "dpo" (prompt, chosen, rejected), "kto" (prompt, completion,
    label) or "sft" (prompt, completion), of the paths that the same objective trains on here. Each solution
    is decoded as a whole, never joined from its steps."""
    text_of = mcts.decoder(tokenizer)
    for tree in trees:
        prompt = [{"role": "system", "content": format.instruction},
                  {"role": "user", "content": tree.question}]
        if tokenizer.chat_template is not None:                     # which may want that in other turns
            prompt, _ = mcts.chat(tokenizer, format.instruction, [tree.question])

        def turn(path):
            tokens = [token for i in path for token in tree.nodes[i].tokens]
            return [{"role": "assistant", "content": text_of(tokens).strip()}]

        right, wrong = EXPORTS[kind](tree, n, seed)
        if kind == "dpo":
            for better, worse in zip(right, wrong):
                yield {"prompt": prompt, "chosen": turn(better), "rejected": turn(worse)}
        elif right or keep_unsolved:
            for path in right + wrong:
                label = {"label": path in right} if kind == "kto" else {}
                yield {"prompt": prompt, "completion": turn(path)} | label


# ---------------------------------------------------------------- the demo's model


def random_model(folder, seed):
    """Write a Llama of 0.2M random weights, and its tokenizer: a token for the whole instruction, for each
    number and for each piece of text between two, such as `.\\n\\n`; decoding is exact."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<pad>", "<eos>", ".", ". ", ".\n\n", "Start with ", f"{tasks.MARKER} ", " = "]
    pieces += [f"{word} " for word in tasks.OPERATIONS]
    pieces += [f" {sign} " for sign, _ in tasks.OPERATIONS.values()]
    pieces += [str(i) for i in range(tasks.LARGEST + 1)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|\.\s*|[^\d.]+"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>",
        chat_template="{% for turn in messages %}{{ turn['content'] }}{% endfor %}\n\n")
    tokenizer.add_tokens(mcts.Format().instruction)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256, initializer_range=0.08, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_base(folder, seed, device, skip=0.25, low=3, high=6):
    """Train the demo's base model from random weights on worked solutions of chains of `low` to `high`
    operations, none of them a question of the demo's own data, and save it in `folder`. It first sees all
    operations written out, then some skipped, until 99 % of its single operations are right: what is left to
    learn is not arithmetic but which steps to take.
    """
    start = folder.with_name("random")
    put(start, lambda new: rank() == 0 and random_model(new, seed))
    policy, tokenizer = load_policy(str(start), device, "float32")
    taken = {p["question"] for split in ("train", "test")
             for p in tasks.load_problems("arithmetic", split=split)}
    probes = [mcts.build_prompt(tokenizer, p["question"])
              for p in tasks.arithmetic(300, f"probe {seed}", low, high)]
    parts = [(10000, 0.0, 3e-3), (12000, skip, 2e-3)]               # demonstrations, skipping, rate
    parts += 4 * [(4000, skip, 1e-3)]
    for part, (n, often, lr) in enumerate(parts):
        draw = random.Random(seed)
        examples = []
        for p in tasks.arithmetic(n, f"base {seed} {part}", low, high):
            if p["question"] not in taken:
                solution = tokenizer(tasks.demonstrate(p["question"], draw, often)).input_ids
                prompt = mcts.build_prompt(tokenizer, p["question"])
                examples.append(one_step(prompt, solution + [tokenizer.eos_token_id]))
        name = f"base: part {part + 1} of {len(parts)} at most"
        imitate(policy, examples, lr, 16, seed, micro_tokens=2**14, name=name)
        with at_own_pace(policy, "probe"):                          # by each rank: it is little
            samples = mcts.sample(policy, tokenizer, probes, max_new_tokens=96, seed=seed, temperature=0.7)
        counts = [tasks.single_operations(s.text) for [s] in samples]
        right, done = np.sum(counts, 0)
        share = from_rank_0(lambda: right / max(1, done))
        if part > 0 and share >= 0.99:
            break
    say(f"base: {share:.1%} of its single operations are right")
    save_model(policy, tokenizer, folder)


DEMO = dict(
    data=["arithmetic"], eval_data=["arithmetic"], eval_limit=300, bootstrap=False,
    questions_per_round=200, iterations=40, slots=64, max_step_tokens=32,
    questions_per_step=4, lr=1e-4, value_lr=1e-3, max_new_tokens=96)


def show_what_was_learnt(run):
    """Draw a tree of the last round that holds both outcomes; then its likeliest correct and wrong solution
    with the credit of each step, and what the trained policy made of it: beta * log_ratio. All ranks call
    this."""
    both = {"right", "wrong"}
    mixed = [tree for tree in trees_of_round(run) if both <= tree.endings().keys()]
    if not mixed:
        say("no tree of this round holds both outcomes")
        return

    def distance_from_a_picture(tree):
        visited = sum(node.visits > 0 for node in tree.nodes)
        return abs(visited - 16), tree.question                     # so many lines are read with ease

    tree = min(mixed, key=distance_from_a_picture)

    def logprob(path):
        return sum(tree.nodes[i].logprob for i in path)

    paths = {}
    ended = [i for i, node in enumerate(tree.nodes) if node.terminal]
    for kind in "right", "wrong":
        ends = [i for i in ended if tree.ending(i) == kind]
        paths[kind] = max(map(tree.path, ends), key=logprob)
    packed = pack(tree, [*paths.values()])
    with torch.no_grad():
        logprobs = step_logprobs(run.policy, packed).tolist()
    say(f"A tree of round {run.round}: on each edge its credit; + right, - wrong, x a failure of form. Only "
        "final answers are judged, so a lucky solution may hold a wrong step.\n")
    say("\n".join(mcts.picture(tree)))
    for kind, path in paths.items():
        say(f"\nA {kind} solution: of each step its credit, and beta * log_ratio, which was learnt:\n")
        for i in path:
            credit = tree.credit(i)
            learnt = run.args.beta * (logprobs[i] - tree.nodes[i].logprob)      # sampled by the reference
            numbers = "  ".join(mcts.paint(f"{number:+.2f}", number) for number in (credit, learnt))
            say(f"  {numbers}  {' '.join(tree.nodes[i].text.split())}")


# ---------------------------------------------------------------- the command


MATHS = ["gsm8k", "math", "agieval-math"]
COMMONSENSE = ["obqa", "csqa", "arc", "sciq"]


def make_parser():
    """All flags; what depends on others comes in parse_arguments."""
    parser = argparse.ArgumentParser(
        description="Direct Value Optimization. Without --model: the demo, nothing to download.")
    add = parser.add_argument_group("model and data").add_argument
    add("--model", help="Hugging Face folder or hub name; paper: Llama-3-8B-Instruct")
    add("--data", nargs="+", metavar="NAME",
        help="training questions: tasks, or JSON Lines files with question and answer (default: metamath)")
    add("--trees", nargs="+", metavar="FILE", help="train one round on these trees instead of searching")
    add("--eval-data", nargs="*", metavar="NAME",
        help=f"tasks or files to evaluate on (default: {', '.join(MATHS)} after mathematics, "
             f"{', '.join(COMMONSENSE)} after those, none after your own files)")
    add("--eval-limit", type=int, metavar="N", help="evaluate on the first N questions of each")
    add("--out", help="run folder; the same command continues it (default: runs/NAME-OF-MODEL)")
    add("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    add("--dtype", choices=("float32", "bfloat16", "float64"),
        help="what computes (default: float32 on a CPU, else bfloat16); master weights are float32")
    add("--device", help="default: the first GPU, else the CPU")
    add("--export", choices=EXPORTS, help="only write --trees to --out, as rows for TRL")
    mcts.add_search_flags(parser)
    add_bootstrap_flags(parser.add_argument_group("format bootstrapping (App. B)"))
    add_training_flags(parser.add_argument_group("training (Sec. 4.3)"))
    group = parser.add_argument_group("evaluation (Sec. 5)")
    add_number(group, "trials", 3, "responses to each question; paper: 3")
    add_number(group, "temperature", 0.7, "paper: 0.7")
    add_number(group, "max-new-tokens", 1024, "a response is cut at this length")
    return parser


def add_number(group, flag, default, text):
    group.add_argument(f"--{flag}", type=type(default), default=default, metavar="N",
                       help=f"{text} (default: {default:g})")


def add_bootstrap_flags(group):
    add = group.add_argument
    add("--bootstrap", action=argparse.BooleanOptionalAction, default=True,
        help="imitate the model's own correct, well-formed responses first, if that helps (default: yes)")
    add("--bootstrap-shots", type=int, choices=range(len(WORKED) + 1), metavar="N",
        help="worked examples in the prompt (default: 0 with a chat template, else 3; paper: few-shot)")
    add_number(group, "bootstrap-questions", 500, "that are sampled, a fifth of them held back; paper: 10000")
    add_number(group, "bootstrap-samples", 64, "a question; paper: 64")
    add_number(group, "bootstrap-temperature", 0.7, "of those samples")
    add_number(group, "bootstrap-lr", 2e-5, "or a fourth or sixteenth, if responses held back bear no more")


def add_training_flags(group):
    """The flags of objectives, rates and memory."""
    add = group.add_argument
    add("--objective", choices=OBJECTIVES, default="dvo", help="(default: dvo)")
    add("--level", choices=("step", "response"), default="step",
        help="of the dvo objective; response: Sec. 6.5 (default: step)")
    add("--targets", choices=("search", "value-model"), default="search",
        help="of the dvo objective: V of the search or of a value model, Sec. 4.4.2 (default: search)")
    add("--keep-unsolved", action="store_true", help="train on questions without a correct path too")
    add_number(group, "beta", 0.1, "of Eq. 10; paper: 0.1")
    add_number(group, "rounds", 3, "0: bootstrapping alone; paper: 3")
    add_number(group, "questions-per-round", 10000, "drawn by seed; paper: 10000")
    add_number(group, "paths", 4, "correct, and incorrect, paths a question; paper: 4")
    add_number(group, "lr", 5e-7, "after a warmup of a tenth of the steps, 20 at least; paper: 5e-7")
    add_number(group, "value-lr", 1e-5, "of the critic: the value model, or OREO's")
    add_number(group, "epochs", 3, "paper: 3")
    add_number(group, "questions-per-step", 16, "an optimiser step; paper: 16 of 8 paths = 128")
    add_number(group, "micro-tokens", 4096, "packed tokens in one forward, at most")
    add_number(group, "save-minutes", 10.0, "between two saved states of a training")
    add("--activation-checkpointing", action="store_true", help="compute blocks again in the backward pass")
    add("--offload", action="store_true", help="keep weights, gradients and optimiser in host memory")
    add("--shard-search", action="store_true", help="slowly sample from what does not fit on one GPU")


def parse_arguments():
    """The parsed command line. Raises InputError for flags that do not go together."""
    parser = make_parser()
    args, _ = parser.parse_known_args()                             # other defaults depend on these two
    if args.trees:
        parser.set_defaults(rounds=1, bootstrap=False)
    if not args.model:
        parser.set_defaults(**DEMO)
    args = parser.parse_args()
    check_arguments(args)
    args.data = args.data or ([] if args.trees else ["metamath"])
    args.format = mcts.Format()                                     # of every prompt; change it here
    if args.eval_data is None:
        args.eval_data = [] if args.trees else default_evaluation(args.data)
    return args


def check_arguments(args):
    """Raise InputError for flags that do not go together or are out of range."""
    if args.export and not (args.trees and args.out):
        raise InputError("--export needs --trees, the files to read, and --out, the file to write")
    own = DEMO["data"]
    is_demo = not args.trees and args.data == own and args.eval_data in (own, [])
    if not (args.model or args.export or is_demo):
        raise InputError("give --model too: without it this is the demo, whose model knows chains of "
                         "arithmetic only")
    if args.trees and (args.rounds != 1 or args.bootstrap):
        raise InputError("--trees goes with one round and without --bootstrap")
    for name, usual in ("level", "step"), ("targets", "search"):
        if args.objective != "dvo" and getattr(args, name) != usual:
            raise InputError(f"--{name} {getattr(args, name)} goes with --objective dvo only")
    names = [Path(task).stem for task in args.eval_data or []]
    if len(set(names)) < len(names):
        raise InputError("two of --eval-data have the same name; their results would have one file")
    mcts.check_search(mcts.search_settings(args))
    for name, value in vars(args).items():
        least = {int: 1, float: 0}.get(type(value))                 # of counts, of other numbers, not of bools
        if least is not None and name not in ("seed", "bootstrap_shots", "rounds"):
            tasks.check_range(**{name: (value, least)})
    tasks.check_range(beta=(args.beta, 1e-9), rounds=(args.rounds, 0))


def default_evaluation(data):
    """The paper's test sets for training data of a kind; none for files of one's own."""
    if set(data) & set(COMMONSENSE):
        return COMMONSENSE
    if data == ["arithmetic"]:
        return data
    return MATHS if set(data) <= set(tasks.TASKS) else []


def load_data(args):
    """The training questions, of the trees if there are some, and the test questions by task."""
    eval_sets = {}
    for task in args.eval_data:
        eval_sets[task] = tasks.load_problems(task, split="test", limit=args.eval_limit)
    if args.trees:
        trees = itertools.chain(*map(mcts.read_trees, args.trees))
        problems = [{"question": tree.question} for tree in trees]
    else:
        problems = tasks.load_problems(args.data, split="train", seed=args.seed)
    trained_on = {p["question"] for p in problems}
    tested = itertools.chain(*eval_sets.values())
    both = sum(p["question"] in trained_on for p in tested)
    if both:
        say(f"{both} test questions are training questions: their accuracy is no test", file=sys.stderr)
    return problems, eval_sets


def export_command(args):
    """Write the trees as rows for TRL. The tokenizer is --model's, or that of the run with the trees."""
    if os.path.realpath(args.out) in map(os.path.realpath, args.trees):
        raise InputError(f"--out {args.out} is one of --trees: choose another file for the rows")
    there = next(tasks.read_lines(args.out), {"completion": "none yet"})
    if not isinstance(there, dict) or there.keys().isdisjoint({"chosen", "completion"}):
        raise InputError(f"--out {args.out} holds something else than exported rows: choose another file")
    beside = Path(args.trees[0]).parent / "model"
    if not args.model and not beside.exists():
        raise InputError(f"there is no model beside {args.trees[0]}: give the --model that searched them")
    tokenizer = mcts.load("tokenizer", AutoTokenizer.from_pretrained, args.model or str(beside))
    trees = list(own_trees(args.trees, tokenizer))
    seed = args.seed + 1                                            # as in the one round of --trees
    rows = export(trees, args.export, tokenizer, args.paths, seed, args.format, args.keep_unsolved)
    rows = list(rows)
    if not rows:
        raise InputError(f"no row to export: {mcts.explain(mcts.describe(trees))}; sft needs a correct "
                         "solution, dpo also a wrong one")
    with told(f"write {args.out}"), open(args.out, "wb", buffering=0) as out:
        for row in rows:
            tasks.write_line(out, row)
    print(f"wrote {len(rows)} rows to {args.out}")


def main():
    """The command: export, or a run from where it stands to its report; the demo is a run."""
    args, start = parse_arguments(), time.time()
    if args.export:
        return export_command(args)
    is_demo = not args.model
    device = start_ranks(args.device, args.dtype)
    problems, eval_sets = in_turn(lambda: load_data(args))          # one rank of each machine downloads
    out = args.out or f"runs/{Path(tasks.resolved(args.model or 'demo')).name}"
    if is_demo and not args.out:
        out = from_rank_0(lambda: tempfile.mkdtemp(prefix="dvo-demo-"))
    run = Run(out, args)
    say(f"Everything goes to {out}; stopped, the same command with --out {out} goes on from there.")
    if is_demo:
        args.model = str(run.folder / "base")
        if not from_rank_0(Path(args.model).exists):
            make_base(Path(args.model), args.seed, device)
    run.policy, run.tokenizer = load_policy(
        args.model, device, args.dtype, offload=args.offload,
        activation_checkpointing=args.activation_checkpointing)
    run.question = problems[0]["question"] if problems else "What is 12 * 7 - 4?"
    run_stages(run, problems, eval_sets)
    if is_demo and from_rank_0(run.file("state", args.rounds).exists):      # not of a round before the last
        hold_newest(run)
        show_what_was_learnt(run)
    report(run)
    more = "" if args.trees else f" One round more: the same with --out {out} --rounds {args.rounds + 1}"
    say(f"\n{time.time() - start:.0f} s in all.{more}")
    if world() > 1:     # all is written; gloo's threads, ended by destructors, now and then abort a rank
        wait_for_ranks("end")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    tasks.run_command(main)
