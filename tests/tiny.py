# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Tiny models and a tiny tokenizer for the tests: no download, milliseconds each, the same for the same seed.

A random model almost never writes a blank line, an answer or an EOS, and its attention hardly matters. Here
they do: the weights of `model` are large enough that a wrong key or value shows in the logits, and each token
of `CHANCES` gets its share, so that a search finds inner steps, right and wrong answers, EOS, and cuts.
"""
import json
import math
import pathlib
import sys

import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, trainers

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))          # mcts, eval, dvo: wherever pytest starts
torch.set_num_threads(1)                                            # more only wait for each other here

import eval as tasks
import mcts

SENTENCES = ["Add 3 to 4.\n\nThat makes 7.\n\nFinal Answer: 7\n\n",
             "Take 5 from 12.\n\nWe get 7.\n\nFinal Answer: 7\n\n",
             "First, add.\nThen (as asked) double it.\n\nFinal Answer:\n\n14\n\n",
             "So the sum is 10.\n\n\n\nDone\n",
             "Multiply by 2.\n\nNow it is 8; \n\n 8 is even!\n\nFinal Answer: 8 \n\n",
             "A tab\tand a café, naïve.\r\n\r\n"]
# As Llama 3 and Qwen split text: punctuation takes the newlines after it along, so BPE can merge ".\n\n".
PIECES = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
END, TURN = "<|end|>", "<|turn|>"                                   # two EOS tokens, as Llama 3 has
SPARE = 5                                                           # rows of the logits beyond the tokenizer

# Weight of each token in the output of `model`; the rest of the vocabulary shares what is left.
CHANCES = {".\n\n": 8, "\n\n": 3, "\n": 6, "Final Answer:": 4, " 7": 6, " 8": 3, " add": 4, " So": 2, ".": 3,
           END: 1, TURN: 0.5}


def tokenizer(chat=True):
    """A byte-level BPE tokenizer of 365 tokens. It merges ".\\n\\n" and "\\n\\n", keeps "\\n", and has the
    marker as one token besides its pieces. chat: with a template that is the bare question."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(SENTENCES * 2, trainers.BpeTrainer(
        vocab_size=360, special_tokens=[END, TURN], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    fast.add_tokens([" add", " So", " 7", " 8", "Final Answer:"])
    if chat:
        fast.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    return fast


def model(kind="llama", dtype=torch.float32, seed=0, chances=CHANCES, **settings):
    """A causal LM of a few thousand weights. kind: a model type of transformers; settings: of its config. Two
    query heads share a key head, the logits are wider than the tokenizer, and there are two EOS tokens."""
    tok = tokenizer()
    config = transformers.AutoConfig.for_model(kind, **{**dict(
        vocab_size=len(tok) + SPARE, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        initializer_range=0.2, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        pad_token_id=None), **settings})
    torch.manual_seed(seed)
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.generation_config = transformers.GenerationConfig(eos_token_id=tok.convert_tokens_to_ids([END, TURN]))
    if chances:
        share_out(lm, tok, chances)
    return lm.to(dtype).eval()


@torch.no_grad()
def share_out(lm, tok, chances):
    """Set the output head of `lm` so that it writes each token of `chances` about that often.

    The head has no bias, so the first channel becomes one: every embedding is 4 there, no layer writes to it,
    and after the last norm it is always positive. The other channels, still random, depend on the text.
    """
    lm.get_input_embeddings().weight[:, 0] = 4
    for name, weight in lm.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0
    head = lm.get_output_embeddings().weight
    head[:, 0] = -2.5 - math.log(len(head) / (len(tok) + SPARE)) / 2    # all others: about exp(-2.5 * 2) each
    for text, weight in chances.items():
        head[tok.convert_tokens_to_ids(tok.tokenize(text)), 0] = torch.tensor(float(weight)).log() / 2


def save(folder, seed=0, chat=True):
    """Write `model` and `tokenizer` as a folder that can be loaded."""
    model(seed=seed).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)


def weights(lm):
    """All weights of a model as one vector."""
    return torch.cat([weight.detach().flatten() for weight in lm.parameters()])


def saved_weights(folder):
    """Those of the model in a folder."""
    return weights(transformers.AutoModelForCausalLM.from_pretrained(folder))


def search(lm, questions, answer="7", **settings):
    """The trees of a short search for questions with one answer."""
    problems = [{"question": question, "answer": answer} for question in questions]
    short = dict(breadth=4, depth=4, max_step_tokens=12, slots=4)
    return list(mcts.search(lm, tokenizer(), problems, tasks.reward, **short | settings))


def write_trees(path, trees):
    path.write_text("".join(tree.to_json() + "\n" for tree in trees), encoding="utf-8")


def read(path):
    """The records of a JSON Lines file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def run(main, monkeypatch, *arguments):
    """Run main() in this process, as the command that it is in its file."""
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
    tasks.run_command(main)


def tree(*steps, question="q", prompt=(1, 2, 3)):
    """A tree by hand. steps, numbered from 1: "0" is taken in state 0 and goes on; "1 right", "1 wrong" and
    "1 invalid", taken after step 1, end a solution. The one token of step i is 10 + i."""
    grown = mcts.Tree(question, "a", list(prompt))
    for step in steps:
        parent, _, end = step.partition(" ")
        node = mcts.Node(int(parent), [10 + len(grown.nodes)])
        i = grown.add(node)
        if end:
            node.terminal = True
            node.valid = end != "invalid"
            node.reward = 1 if end == "right" else -1
            mcts.backup(grown, i)
    return grown
