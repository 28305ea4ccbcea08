# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Whatever the architecture: what search, sampling and packed trees compute are the numbers of the model's
own forward, also beyond its windows; or the model is refused with the true reason.

    python -m pytest -q tests/test_models.py        # twenty kinds
    python tests/test_models.py --all               # every causal LM of the installed transformers: a table
    python tests/test_models.py llama gemma3_text   # these
"""
import copy
import json
import math
import sys
import warnings

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tiny
import mcts
from mcts import InputError

WINDOW = 16
TOK = tiny.tokenizer()
FORMAT = mcts.Format(instruction="")
QUESTIONS = ["Add 3.",
             "Take 5 from 12. Then double it.",
             "First, add 3 to 4. Is the sum even (as asked)? " * 2]
SIZES = """
    vocab_size 370, hidden_size 32, intermediate_size 48, num_hidden_layers 2, num_attention_heads 4,
    num_key_value_heads 2, head_dim 8, max_position_embeddings 256, initializer_range 0.2, n_embd 32,
    n_layer 2, n_head 4, n_positions 256, n_ctx 256, n_inner 48, d_model 32, n_heads 4, n_layers 2,
    num_layers 2, num_heads 4, max_seq_len 256, ffn_dim 48, word_embed_proj_dim 32, attention_heads 4,
    decoder_layers 2, decoder_ffn_dim 48, decoder_attention_heads 4, encoder_layers 1, encoder_ffn_dim 48,
    encoder_attention_heads 4, expansion_ratio 2, embedding_size 32, num_experts 4, num_local_experts 4,
    n_routed_experts 4, num_experts_per_tok 2, moe_intermediate_size 24, n_group 1, topk_group 1,
    shared_expert_intermediate_size 24, first_k_dense_replace 1, n_shared_experts 1, moe_num_experts 4,
    moe_k 2, moe_topk 2, moe_num_shared_experts 1, moe_layer_start_index 1, num_experts_per_token 2,
    num_expert_group 1, expert_ffn_hidden_size 24, ffn_hidden_size 48, q_lora_rank 16, kv_lora_rank 16,
    qk_nope_head_dim 8, qk_rope_head_dim 4, v_head_dim 6, query_pre_attn_scalar 8,
    hidden_size_per_layer_input 8, vocab_size_per_layer_input 370, mamba_n_heads 4, mamba_d_head 16,
    mamba_d_state 8, mamba_n_groups 1, mamba_chunk_size 16, state_size 8, conv_kernel 4, lru_width 32,
    linear_num_value_heads 4, linear_num_key_heads 2, linear_key_head_dim 8, linear_value_head_dim 8,
    dropout 0.0, attention_dropout 0.0, activation_dropout 0.0, resid_pdrop 0.0, embd_pdrop 0.0,
    attn_pdrop 0.0, hidden_dropout 0.0, hidden_dropout_prob 0.0, attention_probs_dropout_prob 0.0,
    shared_intermediate_size 24, index_n_heads 2, index_head_dim 8, intermediate_size_mlp 48,
    dense_intermediate_size 48, bos_token_id null, eos_token_id null, pad_token_id null"""
SIZES = dict(size.split() for size in SIZES.split(","))
SIZES = {name: json.loads(size) for name, size in SIZES.items()}
WINDOWS = """sliding_window window_size local_attention attention_chunk_size index_topk floor_scale
    keep_window_size attention_window_size""".split()
# Kinds that need more to be built, or to show what they are.
MIXED = dict(layer_types=["sliding_attention", "full_attention"])
CHUNKED = dict(layer_types=["chunked_attention", "full_attention"])
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
LATENT = dict(head_dim=4, num_key_value_heads=4)                    # keys and values of different width
LATENT_KINDS = """deepseek_v2 deepseek_v3 deepseek_v32 minicpm3 longcat_flash youtu axk1 axk2 glm4_moe_lite
    glm_moe_dsa""".split()
MORE = {"granite": dict(logits_scaling=8.0),
        "cohere": dict(logit_scale=0.0625),
        "gemma3_text": MIXED,
        "gemma4_text": MIXED,
        "olmo3": MIXED,
        "cohere2": MIXED | dict(logit_scale=0.25),
        "phi3": dict(original_max_position_embeddings=64, rope_parameters=LONGROPE),
        "llama4_text": CHUNKED,
        **dict.fromkeys(LATENT_KINDS, LATENT)}


def build(kind, dtype=torch.float64, **settings):
    """A tiny random model of `kind`, with windows of WINDOW tokens where it has any."""
    for ids in dict(), dict(bos_token_id=2, eos_token_id=0, pad_token_id=3):    # which some must have
        try:
            lm = tiny_model(kind, dtype, ids | settings)
            plain_logprobs(lm, list(range(5, 30)))
            return lm
        except (TypeError, ValueError) as error:
            failure = error
    raise failure


def tiny_model(kind, dtype, settings):
    cls = type(AutoConfig.for_model(kind))
    known = set(cls().to_dict()) | set(cls.attribute_map)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    windows = {name: WINDOW for name in WINDOWS if name in known}
    config = cls(**(sizes | windows | MORE.get(kind, {}) | settings))
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if sum(p.numel() for p in lm.parameters()) > 4e6:
        raise MemoryError("it has no tiny config here")
    torch.manual_seed(0)
    try:
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa")
    except ValueError:
        lm = AutoModelForCausalLM.from_config(config)
    lm.config._experts_implementation = "eager"
    randomise(lm)
    lm.generation_config = transformers.GenerationConfig(eos_token_id=[0, 1])
    return lm.to(dtype).eval()


@torch.no_grad()
def randomise(lm):
    """Weights so large that a wrong key, value or position shows; what starts at 0 or 1 is shaken, too."""
    generator = torch.Generator().manual_seed(0)
    for p in lm.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(0.2 * noise if p.ndim > 1 else p + 0.1 * noise)


@torch.no_grad()
def plain_logprobs(lm, ids):
    """(T - 1,) log-probs of ids[1:] by one forward of the model's own."""
    ids = torch.tensor([ids])
    logits = lm(input_ids=ids, use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def distance_of_samples(lm):
    """(largest difference of a token's log-prob, longest sequence) of whole responses."""
    prompts = [TOK(question).input_ids for question in QUESTIONS]
    responses = mcts.sample(lm, TOK, prompts, n=3, max_new_tokens=10, slots=2)
    worst, longest = 0.0, 0
    for prompt, samples in zip(prompts, responses):
        for sample in samples:
            expected = plain_logprobs(lm, prompt + sample.tokens)[len(prompt) - 1:]
            difference = expected - torch.tensor(sample.logprobs)
            worst = max(worst, difference.abs().max().item())
            longest = max(longest, len(prompt) + len(sample.tokens))
    return worst, longest


def by_length(text, answer):
    """A reward for nothing."""
    return 1 if len(text) % 2 else -1


def distance_of_trees(lm):
    """The largest difference of a step's log-prob."""
    problems = [dict(question=question, answer="7") for question in QUESTIONS]
    settings = dict(iterations=6, breadth=3, depth=4, max_step_tokens=8, slots=2, format=FORMAT)
    worst = 0.0
    for tree in mcts.search(lm, TOK, problems, by_length, **settings):
        for i, node in enumerate(tree.nodes[1:], 1):
            tokens = [token for j in tree.path(i) for token in tree.nodes[j].tokens]
            expected = plain_logprobs(lm, tree.prompt + tokens)[-len(node.tokens):]
            worst = max(worst, abs(expected.sum().item() - node.logprob))
    return worst


def packed_logprobs(lm, tokens, length):
    """(2 * length,) log-probs of two answers after a prompt, each of `length` tokens, in one row, as training
    computes them."""
    T = torch.arange(3 * length)
    part = T // length                                              # 0: the prompt
    position = torch.where(part == 2, T - length, T)
    seen = (T[:, None] >= T) & ((part == 0) | (part == part[:, None]))
    attention = mcts.tree_attention(seen[None], position[None])
    hidden = mcts.hidden_states(lm, tokens[None], position[None], attention)[0]
    logits = mcts.logits_of(lm)(hidden)
    before = torch.where(T == 2 * length, length - 1, T - 1)        # the token that each is predicted by
    logprobs = logits[before[length:]].log_softmax(-1)
    return logprobs.gather(1, tokens[length:, None])[:, 0]


def padded_logprobs(lm, tokens, length):
    """The same by the model's own forward of a row for each answer."""
    prompt, first, second = tokens.split(length)
    rows = torch.stack((torch.cat((prompt, first)), torch.cat((prompt, second))))
    logits = lm(input_ids=rows, use_cache=False).logits[:, length - 1:-1]
    return logits.log_softmax(-1).gather(2, rows[:, length:, None]).flatten()


def gradient(logprobs, lm):
    """That of the sum of `logprobs`, of all weights in one vector."""
    weights = [p for p in lm.parameters() if p.requires_grad]
    parts = torch.autograd.grad(logprobs.sum(), weights, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def distance_of_pack(lm, length):
    """(log-prob, gradient): largest difference of a token, relative one of the norm."""
    tokens = torch.tensor([11 * i % 361 + 2 for i in range(3 * length)])
    packed = packed_logprobs(lm, tokens, length)
    padded = padded_logprobs(lm, tokens, length)
    expected = gradient(padded, lm)
    difference = gradient(packed, lm) - expected
    return (packed - padded).abs().max().item(), (difference.norm() / expected.norm()).item()


EXACT = """llama qwen2 qwen3 qwen3_moe gpt2 gpt_neox olmo2 mistral gemma3_text olmo3 cohere cohere2 granite
    deepseek_v3 stablelm nemotron gemma4_text""".split()
LIMITED = {"phi3": 64, "llama4_text": WINDOW}                       # to their context here
REFUSED = {"gemma2": "soft cap",
           "gpt_oss": "sinks",
           "bloom": "sdpa",
           "mpt": "sdpa",
           "mamba": "layers|sdpa",
           "qwen3_next": "linear_attention",
           "bert": "both directions",
           "minimax_m3_vl_text": "minimax_m3_sparse",
           "doge": "depends on more|mask"}


@pytest.mark.parametrize("kind", EXACT + list(LIMITED))
def test_exact(kind, monkeypatch):
    """Where lanes are attended to one by one, as on a CPU, and all in one call, as on a GPU."""
    lm = build(kind)
    limit = mcts.context_length(lm)
    assert limit == LIMITED.get(kind, 256)
    monkeypatch.setattr(mcts.Cache, "CALL", -math.inf)
    worst, longest = distance_of_samples(lm)
    assert worst < 1e-6
    assert longest > min(limit, 2 * WINDOW) / 2
    monkeypatch.setattr(mcts.Cache, "CALL", math.inf)
    assert distance_of_trees(lm) < 1e-6
    length = min(WINDOW, limit // 2)
    assert max(distance_of_pack(lm, length)) < 1e-6


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    """Served, they would give plausible trees with wrong log-probs."""
    more = dict(layer_types=["minimax_m3_sparse"] * 2) if kind.startswith("minimax_m3") else {}
    lm = build(kind, torch.float32, **more)
    with pytest.raises(InputError, match=f"^{type(lm).__name__} can be neither .*({REFUSED[kind]})"):
        mcts.check_model(lm)


def report(kind):
    """One line about `kind`."""
    try:
        lm = build(kind)
    except Exception as error:
        return f"not built: {mcts.reason(error)[:70]}"
    try:
        mcts.check_model(lm)
    except InputError as error:
        _, _, why = str(error).partition("trained here: ")
        return "refused: " + why.partition("; take a")[0]
    limit = mcts.context_length(lm)
    samples, longest = distance_of_samples(lm)
    pack, gradient = distance_of_pack(lm, min(20, limit // 2))
    worst = max(samples, distance_of_trees(lm), pack, gradient)
    exact = "exact" if limit == 256 else f"exact up to {limit}"
    verdict = exact if worst <= 1e-5 else "WRONG"
    return f"{verdict}: {samples:.0e} samples of {longest}, {pack:.0e} pack, {gradient:.0e} gradient"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    kinds = sys.argv[1:]
    if kinds == ["--all"]:
        kinds = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for kind in kinds:
        try:
            line = report(kind)
        except Exception as error:
            line = f"CRASH {type(error).__name__}: {mcts.reason(error)}"
        print(f"{kind:28}{line}", flush=True)
