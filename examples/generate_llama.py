"""Generates with a small Llama from a paged KV cache, and compares the tokens with those of eager attention.

python examples/generate_llama.py

The weights are random, so the text means nothing; what counts is that both agree. Without a GPU the kernels run
simulated. For a real model, put ``AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)`` in the place of
``small_llama()`` and a tokenizer's ``input_ids`` and ``attention_mask`` in the place of ``left_padded()``.
"""

import argparse
import contextlib

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cute_fa
from cute_fa.integrations.transformers import PagedCache, register

PADDING, VOCABULARY = 0, 96


def small_llama() -> LlamaForCausalLM:
    """Two layers, four query heads and two kv heads of 64, bf16, the same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,
        pad_token_id=PADDING,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def left_padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, as a tokenizer with ``padding_side="left"`` gives them."""
    torch.manual_seed(2)
    rows = [torch.randint(1, VOCABULARY, (length,)) for length in lengths]
    input_ids = torch.stack([torch.nn.functional.pad(row, (max(lengths) - len(row), 0)) for row in rows])
    return {"input_ids": input_ids, "attention_mask": (input_ids != PADDING).long()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=6)
    parser.add_argument("--chunk", type=int, default=8, help="tokens of a chunk of the prefill")
    parser.add_argument("--arch", default="sm_80", help="simulated where there is no GPU")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    model = small_llama().to(device)
    prompts = {name: tensor.to(device) for name, tensor in left_padded([19, 11]).items()}
    how = {"do_sample": False, "max_new_tokens": options.new_tokens}

    model.set_attn_implementation("eager")
    eager = model.generate(**prompts, **how)

    # 1. Make the name known, and choose it.
    register()
    model.set_attn_implementation("cute_fa")
    # 2. Pages for all tokens of both sequences, in every layer. Padding takes no place there, but counts in max_length.
    batch, longest = prompts["input_ids"].shape
    cache = PagedCache(model.config, batch, longest + options.new_tokens, page_size=8, device=device)
    # 3. Every forward appends its tokens to the pages and attends to them there: chunks of the prompt, then one by one.
    with contextlib.nullcontext() if on_gpu else cute_fa.simulate(options.arch):
        ours = model.generate(**prompts, **how, past_key_values=cache, prefill_chunk_size=options.chunk)

    for name, tokens in (("eager", eager), ("cute_fa", ours)):
        print(f"{name:<8}", *(row[longest:].tolist() for row in tokens))
    print(f"tokens in the pages: {cache.layers[0].seqlens[1:].tolist()}, page table: {cache.page_table.tolist()}")
    if not torch.equal(ours, eager):
        # in bf16 two tokens can be equally good, and rounding decides
        raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
