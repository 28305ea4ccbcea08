"""Direct Value Optimization (Zhang et al. 2025, arXiv 2502.13723): better step-by-step reasoning without preference labels.

    python dvo.py                                             # the demo: minutes on a laptop, nothing to download
    python dvo.py --model M --data train.jsonl --eval-data test.jsonl --out RUN
    torchrun --nproc_per_node=8 dvo.py --model meta-llama/Meta-Llama-3-8B-Instruct      # the paper's run

A round: search a tree of reasoning steps for each question (mcts.py), so that every state s gets a value V(s), the mean
outcome of the solutions found below it; then train the policy pi by plain mean squared error until, for every step a_t
of the solutions drawn from the tree,

    beta * log( pi(a_t|s_t) / pi_ref(a_t|s_t) )  =  r(s_t, a_t) + V(s_{t+1}) - V(s_t)            (Eq. 10)

pi_ref being the policy at the start of the round. The right side is the step's *credit*: how much better off the step
left the solver. The file reads in that order: pack (many paths, one sequence), step log-probs, losses, training, rounds,
the command line, the demo.
"""
import argparse
import fcntl
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_model_state_dict, set_state_dict)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import eval as tasks
import mcts
from mcts import InputError

# ---------------------------------------------------------------- many paths, one sequence


@dataclass
class Pack:
    """The union of some paths of one tree as one sequence: every token of every node once, T in all.

    A token sees the tokens on its own path only, and the hidden state that predicts it is that of its predecessor on
    the path (`before`), not of its left neighbour. So the log-probs and their gradient are those of one row a path.
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


def pack(tree, paths):
    """Pack `paths`, each a list of node indices from the first step down (tree.path(i)), into one sequence.

    >>> tree = mcts.Tree("q", "a", prompt=[5, 6])
    >>> a, b = tree.add(mcts.Node(0, [7, 8])), tree.add(mcts.Node(0, [9]))
    >>> p = pack(tree, [tree.path(a), tree.path(b)])
    >>> p.tokens.tolist(), p.position.tolist(), p.before.tolist(), p.node.tolist()
    ([5, 6, 7, 8, 9], [0, 1, 2, 3, 2], [-1, 0, 1, 2, 1], [0, 0, 1, 1, 2])
    """
    tokens, before, node = list(tree.prompt), list(range(-1, len(tree.prompt) - 1)), [0] * len(tree.prompt)
    position, last = list(range(len(tree.prompt))), {0: len(tree.prompt) - 1}
    for i in sorted({i for path in paths for i in path}):
        previous = last[tree.nodes[i].parent]
        for token in tree.nodes[i].tokens:
            tokens.append(token), before.append(previous), node.append(i), position.append(position[previous] + 1)
            previous = len(tokens) - 1
        last[i] = previous
    return Pack(*(np.array(x, dtype=np.int32) for x in (tokens, position, before, node)), len(tree.nodes))


def collate(packs, device):
    """Right-pad packs to a batch: tokens (B, T), positions (B, T), mask (B, 1, T, T); and for each of the R tokens of
    steps: where the hidden state that predicts it is (R,) in the flattened batch, the token (R,), its slot (R,) in the
    packs' concatenated node vectors."""
    B, T = len(packs), max(len(p.tokens) for p in packs)
    tokens, position = np.zeros((2, B, T), dtype=np.int64)
    mask = np.zeros((B, 1, T, T), dtype=bool)
    mask[:, 0] |= np.eye(T, dtype=bool)                             # a padded row sees itself: no NaN
    source, target, slot, first = [], [], [], 0
    for b, p in enumerate(packs):
        t = len(p.tokens)
        tokens[b, :t], position[b, :t], mask[b, 0, :t, :t] = p.tokens, p.position, p.mask()
        step = p.node > 0
        source.append(b * T + p.before[step])
        target.append(p.tokens[step])
        slot.append(first + p.node[step])
        first += p.num_nodes
    indices = (torch.from_numpy(np.concatenate(x).astype(np.int64)) for x in (source, target, slot))
    return [x.to(device) for x in (torch.from_numpy(tokens), torch.from_numpy(position), torch.from_numpy(mask), *indices)]


class Policy(nn.Module):
    """A causal LM as what is sharded and trained: parameters are used inside this forward only, where FSDP gathers them.

    policy(packs=[...]) -> one (num_nodes,) vector of step log-probs a pack, in float32 (float64 for a float64 model);
    policy(input_ids=...) -> the language model's own output.
    """

    def __init__(self, lm):
        super().__init__()
        self.lm, self.config, self.generation_config = lm, lm.config, lm.generation_config

    @property
    def device(self):
        return self.lm.device

    def forward(self, packs=None, **inputs):
        if packs is None:
            return self.lm(**inputs)
        tokens, position, mask, source, target, slot = collate(packs, self.device)
        embed, head = self.lm.get_input_embeddings(), self.lm.get_output_embeddings()
        # an additive mask, since a boolean one is right for sdpa but silently wrong for eager attention
        bias = torch.zeros(mask.shape, dtype=embed.weight.dtype, device=mask.device)
        bias.masked_fill_(~mask, torch.finfo(bias.dtype).min)
        hidden = self.lm.base_model(input_ids=tokens, position_ids=position, attention_mask=bias, use_cache=False)[0]
        hidden = hidden.flatten(0, 1)[source]                       # (B, T, D) -> (R, D)

        def token_logprobs(hidden, target):
            logits = head(hidden)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)

        rows = max(1, 2**26 // head.out_features)                   # the (R, V) logits never exist at once
        chunks = [checkpoint(token_logprobs, h, t, use_reentrant=False) for h, t in
                  zip(hidden.split(rows), target.split(rows))]
        total = sum(p.num_nodes for p in packs)
        steps = torch.cat(chunks).new_zeros(total).index_add(0, slot, torch.cat(chunks))
        return steps.split([p.num_nodes for p in packs])


def step_logprobs(model, pack):
    """(num_nodes,) log pi(a|s) of every step in `pack`, summed over its tokens, EOS included; 0 for nodes outside it.

    `model` is a Policy or a plain causal LM. Differentiable.
    """
    policy = model if isinstance(model, Policy) else Policy(model)
    return policy(packs=[pack])[0]


# ---------------------------------------------------------------- objectives: pure functions of step log-probs


def dvo_loss(policy, reference, credit, path, beta=0.1, level="step"):
    """Direct Value Optimization: (P,) loss of each path (Eq. 10 at the step level, Sec. 6.5 at the response level).

    policy, reference, credit: (num_nodes,) log pi, log pi_ref and r + V(s') - V(s) of every step; path: (P, num_nodes),
    1 where a node lies on the path. The paper's sum over steps and factor 1/2 differ from this mean by constants.

    >>> dvo_loss(torch.tensor([0., 3.]), torch.tensor([0., 1.]), torch.tensor([0., 0.5]), torch.tensor([[0., 1.]]))
    tensor([0.0900])
    """
    log_ratio = policy - reference
    if level == "response":
        return (beta * (path @ log_ratio) - path @ credit) ** 2     # Sec. 6.5: credits sum to r - V(s_0)
    squared_error = (beta * log_ratio - credit) ** 2                # Eq. 10
    return path @ squared_error / path.sum(1)


def rft_loss(policy, path):
    """Rejection sampling fine-tuning (Sec. 5): (P,) negative log-likelihood of each path; give it correct paths only."""
    return -(path @ policy)


# ---------------------------------------------------------------- from trees to training examples


@dataclass
class Example:
    """What one question contributes: its packed paths and, per node of its tree, the targets."""
    pack: Pack
    path: torch.Tensor        # (P, num_nodes) 1 where a node lies on the path
    credit: torch.Tensor      # (num_nodes,) r + V(s') - V(s); 0 at the root
    correct: torch.Tensor     # (P,) bool
    reference: torch.Tensor = None    # (num_nodes,) log pi_ref, filled in before the first update of a round

    def like(self, logprobs):
        """The same on the device and in the precision of `logprobs`."""
        reference = None if self.reference is None else self.reference.to(logprobs)
        return Example(self.pack, self.path.to(logprobs), self.credit.to(logprobs), self.correct.to(logprobs.device),
                       reference)


def draw_paths(tree, per_outcome, seed):
    """Up to `per_outcome` correct and as many incorrect valid terminals of `tree`, without replacement, with weights the
    sum of visits along the path (as in the authors' code). Depends on seed and question only."""
    random = np.random.default_rng([seed, zlib.crc32(tree.question.encode())])
    chosen = []
    for outcome in (1, -1):
        ends = [i for i, n in enumerate(tree.nodes) if n.terminal and n.valid and n.reward == outcome]
        weight = np.array([sum(tree.nodes[j].visits for j in tree.path(i)) for i in ends], dtype=float)
        if ends:
            chosen += random.choice(ends, min(per_outcome, len(ends)), replace=False, p=weight / weight.sum()).tolist()
    return chosen


def make_example(tree, per_outcome=4, seed=0, keep_unsolved=False, correct_only=False):
    """The Example of `tree`, or None if it offers no path to train on (no correct one, as in the authors' code, unless
    keep_unsolved)."""
    ends = draw_paths(tree, per_outcome, seed)
    if correct_only:
        ends = [i for i in ends if tree.nodes[i].reward > 0]
    if not ends or not (keep_unsolved or tree.nodes[ends[0]].reward > 0):
        return None
    path = torch.zeros(len(ends), len(tree.nodes))
    for row, i in zip(path, ends):
        row[tree.path(i)] = 1
    credit = torch.tensor([0.0] + [tree.credit(i) for i in range(1, len(tree.nodes))])
    correct = torch.tensor([tree.nodes[i].reward > 0 for i in ends])
    return Example(pack(tree, [tree.path(i) for i in ends]), path, credit, correct)


# ---------------------------------------------------------------- training


def micro_batches(examples, tokens):
    """Split examples into batches of at most `tokens` padded tokens (always at least one example), by length."""
    batches = []
    for example in sorted(examples, key=lambda e: len(e.pack.tokens)):
        length = len(example.pack.tokens)                           # the longest so far
        if batches and length * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches


@torch.no_grad()
def add_reference(policy, examples, tokens):
    """Fill in log pi_ref of every step: the policy before its first update is the reference of the round. Each rank does
    its share of the examples, at its own pace."""
    with resident(policy), tqdm(total=len(examples[rank()::world()]), desc="reference", unit="question", leave=False,
                                disable=rank() > 0) as bar:
        for batch in micro_batches(examples[rank()::world()], tokens):
            for example, logprobs in zip(batch, policy(packs=[e.pack for e in batch])):
                example.reference = logprobs.cpu()
            bar.update(len(batch))
    mine = [(i, examples[i].reference) for i in range(rank(), len(examples), world())]
    for example, reference in zip(examples, gather(mine)):
        example.reference = reference


def my_micro_batches(examples, tokens):
    """This rank's share of an optimiser step as (weight, micro-batch) pairs, as many on every rank: FSDP's collectives
    must match, so a rank that runs out repeats an example with weight 0."""
    by_length = sorted(examples, key=lambda e: len(e.pack.tokens))
    shares = [micro_batches(by_length[r::world()], tokens) for r in range(world())]
    mine = [(1, batch) for batch in shares[rank()]]
    return mine + [(0, by_length[:1])] * (max(map(len, shares)) - len(mine))


def learning_rate(step, total, peak, warmup):
    """Linear warmup over the first share `warmup` of all steps, then a cosine to 0."""
    ramp = max(1, round(warmup * total))
    cosine = (1 + math.cos(math.pi * max(0, step - ramp) / max(1, total - ramp))) / 2
    return peak * min((step + 1) / ramp, cosine)


def train(policy, examples, loss_fn, *, lr, epochs, questions_per_step, micro_tokens, beta=0.1, warmup=0.1, seed=0,
          description="train", log=lambda **fields: None, state=None, save_every=100):
    """Minimise the mean of loss_fn(example, step log-probs) -> (P,) over all paths of each optimiser step, on all ranks.

    A fresh AdamW, gradient norm clipped at 1. state: a folder that keeps weights and optimiser every `save_every` steps
    and at the end, and from which training goes on if it exists. A step whose gradient is not finite is skipped; after
    five in a row InputError is raised.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    per_epoch, bad = math.ceil(len(examples) / questions_per_step), 0
    total = per_epoch * epochs
    first = load_state(state, policy, optimizer) if state and state.exists() else 0
    policy.train()
    for step in tqdm(range(first, total), desc=description, unit="step", initial=first, total=total, disable=rank() > 0):
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(examples))
        chosen = [examples[i] for i in order[at * questions_per_step:(at + 1) * questions_per_step]]
        paths, sums, start = sum(len(e.path) for e in chosen), torch.zeros(6, dtype=torch.float64), time.time()
        for weight, batch in my_micro_batches(chosen, micro_tokens):
            loss = 0
            for example, logprobs in zip(batch, policy(packs=[e.pack for e in batch])):
                example = example.like(logprobs)
                losses = loss_fn(example, logprobs)
                loss = loss + weight * losses.sum() / paths
                sums += weight * torch.tensor(metrics(example, logprobs, losses, beta))
            (loss * world()).backward()                             # FSDP averages gradients over ranks: undo that
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)      # the same on every rank
        bad = 0 if math.isfinite(norm) else bad + 1
        if bad == 5:
            raise InputError("the gradient was not finite for 5 steps in a row; lower --lr, or look for NaN in the model")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, lr, warmup)
        if not bad:
            optimizer.step()
        optimizer.zero_grad()
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, tokens, chosen_reward, rejected_reward, n_chosen, n_rejected = sums.tolist()
        log(step=step + 1, loss=loss / paths, lr=group["lr"], grad_norm=norm, skipped=bool(bad),
            tokens_per_second=round(tokens / (time.time() - start)),
            **{"rewards/chosen": chosen_reward / n_chosen if n_chosen else None,
               "rewards/rejected": rejected_reward / n_rejected if n_rejected else None})
        if state and ((step + 1) % save_every == 0 or step + 1 == total):
            save_state(state, policy, optimizer, step + 1)
    policy.eval()


def metrics(example, logprobs, losses, beta):
    """Sums over the example's paths: loss, packed tokens, implicit reward of correct and of incorrect ones, and their
    numbers."""
    reference = example.reference if example.reference is not None else logprobs.detach()
    reward, right = beta * (example.path @ (logprobs.detach() - reference)), example.correct
    return [losses.sum().item(), len(example.pack.tokens), reward[right].sum().item(), reward[~right].sum().item(),
            right.sum().item(), (~right).sum().item()]


OBJECTIVES = {
    "dvo": lambda e, logprobs, args: dvo_loss(logprobs, e.reference, e.credit, e.path, args.beta, args.level),
    "rft": lambda e, logprobs, args: rft_loss(logprobs, e.path),
}


# ---------------------------------------------------------------- one model, any number of GPUs


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def start_ranks(device):
    """Join the process group that torchrun announces; a lone process on a GPU gets a group of its own, since FSDP also
    provides float32 master weights under bfloat16 compute there. Returns this rank's device."""
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


def load_policy(name, device, dtype):
    """The Policy and its tokenizer on every rank: in float32 (unless dtype says float64), sharded if there is a process
    group. Rank 0 alone reads the weights and hands out the shards, so no rank but 0 ever holds a full copy."""
    master = "float64" if dtype == "float64" else "float32"
    if not dist.is_initialized():
        lm, tokenizer = mcts.load_model(name, device, dtype or master)
        return Policy(lm), tokenizer
    lm, tokenizer = mcts.load_model(name, "meta", master)
    full = mcts.load_model(name, "cpu", master)[0] if rank() == 0 else None
    compute = getattr(torch, dtype) if dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    precision, policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=lm.dtype), Policy(lm)
    for module in lm.modules():
        if type(module).__name__ in (lm._no_split_modules or ()):
            fully_shard(module, mp_policy=precision)                # every decoder block
    fully_shard(policy, mp_policy=precision)
    policy.to_empty(device=device)
    weights = {f"lm.{name}": weight for name, weight in full.state_dict().items()} if full else {}
    set_model_state_dict(policy, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in lm.named_buffers():                         # rotary frequencies are in no state dict
        if full:
            buffer.copy_(full.get_buffer(name))
        dist.broadcast(buffer, src=0)
    return policy.eval(), tokenizer


@contextmanager
def resident(policy):
    """Inside the block every rank holds all weights in the compute type, so ranks may search and evaluate at their own
    pace: no collective runs. Afterwards the weights are sharded again."""
    blocks = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    yield
    for block in blocks:
        block.set_reshard_after_forward(block is not policy, recurse=False)   # the root is needed again at once
        block.reshard()


def gather(mine):
    """Every rank's list of (index, item) pairs, as one list of items in the order of their indices."""
    parts = [mine]
    if dist.is_initialized():
        parts = [None] * world()
        dist.all_gather_object(parts, mine)
    return [item for _, item in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]


def wait_for_ranks(name, patience=60):
    """Wait until every rank has come here, however long it takes: a bare barrier dies at the group's time limit."""
    if world() == 1:
        return
    store, start = dist.distributed_c10d._get_default_store(), time.time()
    store.set(f"{name}/{rank()}", "done")
    while waiting := [r for r in range(world()) if not store.check([f"{name}/{r}"])]:
        time.sleep(0.2)
        if rank() == 0 and time.time() - start > patience:
            print(f"{name}: still waiting for rank {', '.join(map(str, waiting))}", file=sys.stderr)
            start = time.time()
    dist.barrier()


# ---------------------------------------------------------------- what a run leaves on disk


def replace(path, write):
    """Let write(new) make a file or folder under a temporary name; it gets its own name when complete. All ranks call
    this; they meet before and after the renaming."""
    new = path.with_name(path.name + ".new")
    if rank() == 0 and new.is_dir():
        shutil.rmtree(new)                                          # left by a run that was killed
    meet()
    write(new)
    meet()
    if rank() == 0:
        old = path.with_name(path.name + ".old")
        if path.exists():
            path.rename(old)
        new.rename(path)
        if old.is_dir():
            shutil.rmtree(old)
    meet()


def meet():
    if dist.is_initialized():
        dist.barrier()


def save_state(folder, policy, optimizer, step):
    """Master weights, optimiser and step, each rank its shards: what training goes on from."""
    model, moments = get_state_dict(policy, optimizer)
    replace(folder, lambda new: dcp.save({"model": model, "optimizer": moments, "step": step}, checkpoint_id=new))


def load_state(folder, policy, optimizer=None):
    """Load what save_state saved, in place, on any number of ranks; returns the step. Without an optimiser: the weights."""
    model, moments = get_state_dict(policy, optimizer or [])
    state = {"model": model, "step": 0} | ({"optimizer": moments} if optimizer else {})
    try:
        dcp.load(state, checkpoint_id=folder)
    except (Exception, CheckpointException) as error:               # the latter is no Exception
        raise InputError(f"the training state {folder} cannot be read ({str(error).strip().splitlines()[0]}); delete it to train "
                         "this round again") from None
    set_state_dict(policy, optimizer or [], model_state_dict=model, optim_state_dict=moments)
    return state["step"]


def save_model(policy, tokenizer, folder):
    """Write a Hugging Face folder that from_pretrained or vLLM loads, in the compute type. Rank 0 gathers and writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)         # empty but on rank 0
    dtype = next((m._get_fsdp_state()._mp_policy.param_dtype for m in [policy] if isinstance(m, FSDPModule)), None)
    dtype = dtype or policy.lm.dtype

    def write(new):
        if rank() == 0:
            for name in list(weights):
                weights[name.removeprefix("lm.")] = weights.pop(name).to(dtype)
            own, policy.config.dtype = policy.config.dtype, dtype
            policy.lm.save_pretrained(new, state_dict=weights)
            tokenizer.save_pretrained(new)
            policy.config.dtype = own
    replace(folder, write)


class Run:
    """A run folder: config.json, log.jsonl, and round1/trees.rank0.jsonl, round1/model/, and so on.

    The same command continues it: finished trees, evaluations and rounds are not done again. Raises InputError if the
    folder holds a run with other settings, or cannot be written. Rank 0 alone writes the log.
    """
    FREE = {"out", "rounds", "device", "slots", "kv_budget", "micro_tokens"}    # may change: they do not change results

    def __init__(self, folder, settings):
        self.folder, self.round, self.step, self.events = Path(folder), 0, 0, []
        problem = [None]
        if rank() == 0:
            try:
                self._open(json.loads(json.dumps({k: v for k, v in settings.items() if k not in self.FREE})))
            except OSError as error:
                problem = [f"cannot write to the run folder {folder}: {error.strerror}; choose another --out"]
            except json.JSONDecodeError:
                problem = [f"config.json or log.jsonl in {folder} is not JSON any more; restore it, or choose another --out"]
            except InputError as error:
                problem = [str(error)]
        if dist.is_initialized():
            dist.broadcast_object_list(problem)
        if problem[0]:
            raise InputError(problem[0])

    def _open(self, settings):
        config, log = self.folder / "config.json", self.folder / "log.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is at work in {self.folder}; wait for it, or choose another --out") from None
        if config.exists():
            old = json.loads(config.read_text())
            differ = [f"{name} was {old.get(name)!r} and is {settings.get(name)!r}"
                      for name in sorted({*old, *settings}) if old.get(name) != settings.get(name)]
            if differ:
                raise InputError(f"{self.folder} holds a run with other settings ({'; '.join(differ)}); repeat those, or "
                                 "choose another --out")
        elif any(path.name != ".lock" for path in self.folder.iterdir()):
            raise InputError(f"{self.folder} is not empty and holds no run; choose another --out")
        else:
            config.with_suffix(".new").write_text(json.dumps(settings, indent=1) + "\n")
            config.with_suffix(".new").rename(config)
        if log.exists():
            drop_torn_line(log)
            self.events = [json.loads(line) for line in open(log, encoding="utf-8")]
        self.lines = open(log, "a", encoding="utf-8")

    def log(self, event, **fields):
        if rank() == 0:
            entry = {"event": event, "round": self.round, "step": self.step, "time": round(time.time(), 3), **fields}
            self.lines.write(json.dumps(entry) + "\n")
            self.lines.flush()
            self.events.append(entry)

    def not_evaluated(self, names):
        """Those tasks that have no result of the current round; rank 0, which has read the log, tells the others."""
        known = [e["task"] for e in self.events if e["event"] == "eval" and e["round"] == self.round]
        missing = [[name for name in names if name not in known]]
        if dist.is_initialized():
            dist.broadcast_object_list(missing)
        return missing[0]

    def file(self, name, r=None):
        """A path in the folder of round r (default: the current one), which is made."""
        path = self.folder / f"round{self.round if r is None else r}" / name
        path.parent.mkdir(exist_ok=True)
        return path

    def trees(self):
        """All trees of the current round, one at a time."""
        for path in sorted(self.file("").glob("trees.rank*.jsonl")):
            yield from mcts.read_trees(path)


def drop_torn_line(path):
    """Cut a last line that was not written to its end."""
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        print(f"{path}: dropped an unfinished last line", file=sys.stderr)
        os.truncate(path, whole)


# ---------------------------------------------------------------- rounds


WORKED = [("A shelf holds 4 rows of 9 books. 7 books are lent out. How many are left?",
           "There are 4 * 9 = 36 books on the shelf.\n\n7 are lent out, so 36 - 7 = 29 are left.\n\nFinal Answer: 29"),
          ("What is the sum of the solutions of x^2 - 5x + 6 = 0?",
           "The equation factors as (x - 2)(x - 3) = 0.\n\nIts solutions are 2 and 3, and 2 + 3 = 5.\n\nFinal Answer: 5"),
          ("Which of these floats on water?\nA) a stone\nB) a cork\nC) a coin",
           "What is less dense than water floats on it.\n\nStone and metal are denser than water, cork is less dense.\n\n"
           "Final Answer: B")]


def single_path(question, answer, prompt, response):
    """A tree of one path of one node: a correct response to imitate."""
    tree = mcts.Tree(question, answer, prompt)
    tree.add(mcts.Node(0, response, reward=1, terminal=True, visits=1))
    return make_example(tree)


def bootstrap(run, policy, tokenizer, problems, args):
    """Format bootstrapping (App. B): sample with worked examples in the prompt, keep the correct responses that end by
    `Final Answer:`, and imitate them without the examples for one epoch; so the base learns to write steps."""
    start, mine = time.time(), list(enumerate(problems))[rank()::world()]
    with resident(policy), tqdm(total=len(mine), desc="bootstrap: sample", unit="question", disable=rank() > 0) as bar:
        prompts = [mcts.build_prompt(tokenizer, p["question"], WORKED) for _, p in mine]
        drawn = mcts.sample(policy, tokenizer, prompts, n=args.bootstrap_samples, max_new_tokens=args.max_new_tokens,
                            seed=args.seed, progress=bar.update)
        wait_for_ranks("bootstrap")
    kept = [(i, {s.text: s.tokens for s in samples if s.end in ("eos", "answer") and mcts.MARKER in s.text
                 and "\n\n" in s.text and tasks.grade(s.text, p["answer"])}) for (i, p), samples in zip(mine, drawn)]
    examples = [single_path(p["question"], p["answer"], mcts.build_prompt(tokenizer, p["question"]), tokens)
                for p, responses in zip(problems, gather(kept)) for tokens in responses.values()]
    if examples:
        train(policy, examples, lambda e, logprobs: rft_loss(logprobs, e.path), lr=args.bootstrap_lr, epochs=1,
              questions_per_step=8 * args.questions_per_step, micro_tokens=args.micro_tokens, seed=args.seed,
              description="bootstrap: train", state=run.file("state"))
    run.log("bootstrap", questions=len(problems), responses=len(examples), seconds=round(time.time() - start, 1))
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
    meet()                                                          # all have read before the first one writes
    mine = todo[rank()::world()]
    settings = mcts.search_settings(args) | {"seed": args.seed + run.round}
    if todo:
        with open(run.file(f"trees.rank{rank()}.jsonl"), "a", encoding="utf-8") as out, resident(policy), \
                tqdm(total=len(mine) * args.iterations, desc=f"round {run.round}: search", unit="iteration",
                     disable=rank() > 0) as bar:
            for tree in mcts.search(policy, tokenizer, mine, tasks.reward, progress=bar.update, **settings):
                out.write(tree.to_json() + "\n")
                out.flush()
            wait_for_ranks(f"search of round {run.round}")
        outcomes = [({n.reward for n in tree.nodes if n.terminal}, tree.nodes[0].value) for tree in run.trees()]
        run.log("search", trees=len(outcomes), mixed=float(np.mean([o == {1, -1} for o, _ in outcomes])),
                root_value=float(np.mean([v for _, v in outcomes])), seconds=round(time.time() - start, 1))


def train_round(run, policy, tokenizer, args):
    """Train on the round's trees by the objective of the run and save the model."""
    start, examples = time.time(), []
    for tree in run.trees():
        example = make_example(tree, args.paths, args.seed + run.round, args.keep_unsolved, args.objective == "rft")
        if example:
            examples.append((tree.question, example))
    examples = [example for _, example in sorted(examples, key=lambda pair: pair[0])]   # not in order of completion
    if not examples:
        raise InputError(f"no question of round {run.round} has a correct solution to train on; search more questions or "
                         "more iterations, or start from a stronger model")
    references = run.file("reference.pt")
    if references.exists():                                         # training was under way when the run was stopped
        for example, example_reference in zip(examples, torch.load(references)):
            example.reference = example_reference
    else:
        add_reference(policy, examples, args.micro_tokens)
        replace(references, lambda new: rank() == 0 and torch.save([e.reference for e in examples], new))

    def log(step, **fields):
        run.step = step
        run.log("train", **fields)
    train(policy, examples, lambda e, logprobs: OBJECTIVES[args.objective](e, logprobs, args), lr=args.lr,
          epochs=args.epochs, questions_per_step=args.questions_per_step, micro_tokens=args.micro_tokens, beta=args.beta,
          seed=args.seed + run.round, description=f"round {run.round}: train", log=log, state=run.file("state"))
    run.log("trained", questions=len(examples), paths=sum(len(e.path) for e in examples),
            seconds=round(time.time() - start, 1))
    save_model(policy, tokenizer, run.file("model"))
    if rank() == 0:
        shutil.rmtree(run.file("state", run.round - 1), ignore_errors=True)      # the next round starts from this one


def evaluate_round(run, policy, tokenizer, eval_sets, args):
    """Evaluate on `eval_sets`, each rank its share of the questions."""
    for task, problems in eval_sets.items():
        start, mine = time.time(), list(enumerate(problems))[rank()::world()]
        with resident(policy), tqdm(total=len(mine), desc=f"round {run.round}: evaluate on {task}", unit="question",
                                    disable=rank() > 0) as bar:
            responses = tasks.respond(policy, tokenizer, [p for _, p in mine], trials=args.trials, seed=args.seed,
                                      temperature=args.temperature, max_new_tokens=args.max_new_tokens,
                                      progress=bar.update)
            wait_for_ranks(f"evaluation of round {run.round} on {task}")
        result = tasks.summarise(gather([(i, r) for (i, _), r in zip(mine, responses)]), args.trials)
        run.log("eval", task=task, **{k: result[k] for k in ("accuracy", "sem", "n", "unanswered")},
                seconds=round(time.time() - start, 1))


def run_rounds(run, policy, tokenizer, problems, eval_sets, args):
    """The whole of DVO: make the base write steps and evaluate it; then for each round search, train, save, evaluate.
    Whatever an earlier start of the same run has finished is not done again."""
    held = -1 if args.bootstrap else 0                              # the round whose weights the policy holds now
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
            n, first = min(args.questions_per_round, len(problems)), (run.round - 1) * args.questions_per_round
            search_round(run, policy, tokenizer, [problems[i % len(problems)] for i in range(first, first + n)], args)
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
        seconds = [sum(e["seconds"] for e in run.events if e["event"] == kind and e["round"] == r)
                   for kind in ("search", "trained", "eval")]
        print(f"{f'round {r}' if r else 'base':10}{cells}   {'  '.join(f'{s:8.1f}' for s in seconds)}")


# ---------------------------------------------------------------- the demo's model


def arithmetic_tokenizer():
    """A token for each number and each piece of text between two numbers, `.\\n\\n` included; text comes back as it was."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<pad>", "<eos>", ".", ". ", ".\n\n", "Start with ", f"{mcts.MARKER} ", " = "]
    pieces += [f"{word} " for word in tasks.OPERATIONS] + [f" {sign} " for sign, _ in tasks.OPERATIONS.values()]
    pieces += [str(i) for i in range(tasks.LARGEST + 1)]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|\.\s*|[^\d.]+"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>",
                                   chat_template="{{ messages[-1]['content'] }}\n\n")   # needs no instruction


def demonstration_examples(tokenizer, problems, skip, seed):
    """Worked solutions as training examples: a tree of one path and one node each."""
    draw, examples = tasks.random.Random(seed), []
    for p in problems:
        tree = mcts.Tree(p["question"], p["answer"], mcts.build_prompt(tokenizer, p["question"]))
        solution = tokenizer(tasks.demonstrate(p["question"], draw, skip)).input_ids + [tokenizer.eos_token_id]
        tree.add(mcts.Node(0, solution, reward=1, terminal=True, visits=1))
        examples.append(make_example(tree))
    return examples


def make_base(folder, seed, skip=0.25):
    """Train the demo's base model from random weights on worked solutions and save it in `folder`.

    A 0.2M-parameter Llama that first learns single operations and then sees solutions that skip, until 99 % of its single
    operations are right: then what is left to learn is not arithmetic but which steps to take. (With a weaker base DVO
    gains next to nothing.)
    """
    torch.manual_seed(seed)
    tokenizer = arithmetic_tokenizer()
    policy = Policy(LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.08, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)))
    probes = [mcts.build_prompt(tokenizer, p["question"]) for p in tasks.arithmetic(300, seed=f"probe {seed}")]
    parts = [(10000, 0, 3e-3), (12000, skip, 2e-3)] + 4 * [(4000, skip, 1e-3)]      # demonstrations, skipping, rate
    for part, (n, often, lr) in enumerate(parts):
        problems = tasks.arithmetic(n, seed=f"base {seed} {part}")
        train(policy, demonstration_examples(tokenizer, problems, often, seed),
              lambda e, logprobs: rft_loss(logprobs, e.path), lr=lr, epochs=1, questions_per_step=16, micro_tokens=2**14,
              seed=seed, description="base: train from random weights")
        samples = mcts.sample(policy, tokenizer, probes, max_new_tokens=96, seed=seed, temperature=0.7)
        right, done = map(sum, zip(*(tasks.single_operations(s.text) for [s] in samples)))
        if part > 0 and right >= 0.99 * done:
            break
    print(f"base: {100 * right / max(1, done):.1f} % of its single operations are right")
    save_model(policy, tokenizer, folder)


DEMO = dict(bootstrap=False, data="arithmetic", eval_data=["arithmetic"], eval_limit=300, questions_per_round=200, iterations=40,
            max_step_tokens=32, lr=1e-4, questions_per_step=4, max_new_tokens=96, slots=64)


def show_tree(trees):
    """Draw a tree that holds both outcomes, and one correct and one wrong solution with the credit of each step."""
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
    parser = argparse.ArgumentParser(description="Direct Value Optimization. Without --model: the demo, on any machine, "
                                     "nothing to download.")
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", help="Hugging Face folder or hub name; paper: Llama-3-8B-Instruct")
    group.add_argument("--data", default="metamath", help="training questions: task name or JSON Lines file with question "
                       "and answer (default, paper: metamath)")
    group.add_argument("--eval-data", nargs="*", default=["gsm8k", "math", "agieval-math", "obqa", "csqa", "arc", "sciq"],
                       help="task names or files to evaluate on; none: no evaluation (default, paper: all seven)")
    group.add_argument("--eval-limit", type=int, help="evaluate on the first N questions of each")
    group.add_argument("--out", help="run folder; the same command continues it (default: runs/NAME-OF-MODEL)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), help="default: float32 on a CPU, else bfloat16")
    group.add_argument("--device", help="default: the first GPU, else the CPU")
    group = parser.add_argument_group("format bootstrapping (App. B)")
    group.add_argument("--bootstrap", action=argparse.BooleanOptionalAction, default=True, help="imitate correct few-shot "
                       "responses before the first round")
    group.add_argument("--bootstrap-questions", type=int, default=500, metavar="N", help="that are sampled (default: 500)")
    group.add_argument("--bootstrap-samples", type=int, default=64, metavar="N", help="a question; paper: 64")
    group.add_argument("--bootstrap-lr", type=float, default=2e-5, metavar="RATE", help="paper: 2e-5, one epoch")
    mcts.add_search_flags(parser)
    group = parser.add_argument_group("training (Sec. 4.3)")
    group.add_argument("--objective", choices=OBJECTIVES, default="dvo")
    group.add_argument("--level", choices=("step", "response"), default="step", help="of the dvo objective; paper: step, "
                       "and response in Sec. 6.5 (default: step)")
    group.add_argument("--beta", type=float, default=0.1, help="paper: 0.1")
    group.add_argument("--rounds", type=int, default=3, help="paper: 3")
    group.add_argument("--questions-per-round", type=int, default=10000, help="paper: 10000")
    group.add_argument("--paths", type=int, default=4, help="correct, and incorrect, paths a question; paper: 4")
    group.add_argument("--keep-unsolved", action="store_true", help="train on questions without a correct path too")
    group.add_argument("--lr", type=float, default=5e-7, help="paper: 5e-7, cosine, warmup 0.1")
    group.add_argument("--epochs", type=int, default=3, help="paper: 3")
    group.add_argument("--questions-per-step", type=int, default=16, help="an optimiser step; paper: 16 of 8 paths = 128")
    group.add_argument("--micro-tokens", type=int, default=8192, help="packed tokens in one forward, at most")
    group = parser.add_argument_group("evaluation (Sec. 5)")
    group.add_argument("--trials", type=int, default=3, help="paper: 3")
    group.add_argument("--temperature", type=float, default=0.7, help="paper: 0.7")
    group.add_argument("--max-new-tokens", type=int, default=1024, help="a response cut at this length is wrong")
    args, _ = parser.parse_known_args()
    if not args.model:
        parser.set_defaults(**DEMO)
    args = parser.parse_args()
    for name, least in dict(rounds=1, questions_per_round=1, bootstrap_questions=1, bootstrap_samples=1, paths=1, epochs=1, questions_per_step=1, micro_tokens=1,
                            trials=1, max_new_tokens=1, temperature=0, beta=1e-9, lr=0).items():
        mcts.check_range(**{name: (getattr(args, name), least)})
    return args


class Stopped(BaseException):
    """A signal asked the run to end."""


def stop(number, frame):
    raise Stopped(number)


def main():
    args, start = parse_arguments(), time.time()
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, stop)
    try:
        run_command_line(args, start)
    except Stopped as stopped:
        if rank() == 0:
            print("\ndvo.py: stopped; what is finished is saved, and the same command goes on from there", file=sys.stderr)
        os._exit(128 + stopped.args[0])                             # without waiting for the other ranks


def run_command_line(args, start):
    device, demo = start_ranks(args.device), not args.model
    problems = tasks.load_problems(args.data, split="train")
    eval_sets = {task: tasks.load_problems(task, split="test")[:args.eval_limit] for task in args.eval_data}
    out = args.out or (tempfile.mkdtemp(prefix="dvo-demo-") if demo else f"runs/{Path(args.model).name}")
    run = Run(out, vars(args))
    if demo:
        args.model = run.folder / "base"
        if not args.model.exists():
            make_base(args.model, args.seed)
            run.log("base", seconds=round(time.time() - start, 1))
    policy, tokenizer = load_policy(args.model, device, args.dtype)
    run_rounds(run, policy, tokenizer, problems, eval_sets, args)
    if rank() == 0:
        if demo:
            run.round = 1
            show_tree(list(run.trees()))
        report(run, eval_sets, args.rounds)
        print(f"\n{time.time() - start:.0f} s in all; everything is in {out}")
    if dist.is_initialized():
        meet()
        dist.destroy_process_group()


if __name__ == "__main__":
    mcts.run_command(main)
