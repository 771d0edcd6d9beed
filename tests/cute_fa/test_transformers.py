"""Models of Transformers on these kernels, against the same models with eager attention."""

import importlib.util
import sys
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

if importlib.util.find_spec("transformers") is None:
    pytest.skip("no transformers", allow_module_level=True)  # a file that cannot be imported stops all others

from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask

import cute_fa
from cute_fa.integrations import transformers as integration
from cute_fa.integrations.transformers import Padding, PagedCache, register
from cute_fa.semantics.errors import ArgumentError, LengthError, NoBackwardError, ShapeError, UnsupportedArgumentError
from tests.testing.simulated import unwritten_is_nan

VOCABULARY, LAYERS, STEPS, PAGE_SIZE, CHUNK = 96, 2, 9, 8, 10
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "eos_token_id": None,
}

EXAMPLE = Path(__file__).parents[2] / "examples" / "generate_llama.py"

register()


def make(model_class, config_class, **changes):
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **changes}, attn_implementation="eager")
    return model_class(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def llama():
    return make(LlamaForCausalLM, LlamaConfig)


def with_attention(model, name: str):
    model.set_attn_implementation(name)
    return model


def generate(model, prompts, mask=None, **options):
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts) if mask is None else mask,
        do_sample=False,
        max_new_tokens=STEPS,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def margins(logits) -> torch.Tensor:
    """(batch): by how much the best token beats the next, in the closest of all steps."""
    best = torch.stack(logits).float().topk(2, -1).values
    return (best[..., 0] - best[..., 1]).amin(0)


@cache
def decided(model, length: int) -> torch.Tensor:
    """(2, length), of random prompts whose continuation is varied those that rounding is least likely to change."""
    prompts = torch.randint(1, VOCABULARY, (128, length), generator=torch.Generator().manual_seed(0))
    result = generate(with_attention(model, "eager"), prompts)
    varied = torch.tensor([len(row.unique()) >= STEPS - 2 for row in result.sequences[:, length:]])
    return prompts[margins(result.logits).where(varied, torch.tensor(0.0)).topk(2).indices]


def paged(model, batch: int, max_length: int) -> PagedCache:
    """A cache whose pages are in no order."""
    cache = PagedCache(model.config, batch, max_length, page_size=PAGE_SIZE, device="cpu")
    shuffled = torch.randperm(cache.page_table.numel(), generator=torch.Generator().manual_seed(1))
    cache.page_table.copy_(shuffled.view_as(cache.page_table))
    return cache


@pytest.mark.sampled
@pytest.mark.parametrize(("arch", "lengths"), [("sm_80", (21, 6)), ("sm_90a", (21, 21)), ("sm_100a", (21, 6))], ids=str)
def test_generates_eagers_tokens_from_a_paged_cache(llama, arch, lengths):
    """Prefill in chunks, of which the first is padding alone in the shorter sequence, then decoding."""
    longest = max(lengths)
    rows = [decided(llama, length)[b] for b, length in enumerate(lengths)]
    prompts = torch.stack([pad(row, (longest - len(row), 0)) for row in rows])
    mask = (prompts != 0).long()
    eager = generate(with_attention(llama, "eager"), prompts, mask)
    cache = paged(llama, 2, longest + STEPS)
    with cute_fa.simulate(arch) as simulation:
        ours = generate(
            with_attention(llama, "cute_fa"), prompts, mask, past_key_values=cache, prefill_chunk_size=CHUNK
        )
    forwards = -(-longest // CHUNK) + STEPS - 1
    names = [launch.name for launch in simulation.launches]
    assert sum("AppendKernel" in name for name in names) == forwards * LAYERS
    assert sum("AppendKernel" not in name for name in names) >= forwards * LAYERS
    difference = (torch.stack(ours.logits) - torch.stack(eager.logits)).abs().max()
    assert margins(eager.logits).min() > 3 * difference  # twice would do
    assert torch.equal(ours.sequences, eager.sequences)
    check_pages(cache, eager.past_key_values, lengths)


def check_pages(cache: PagedCache, kept: DynamicCache, lengths) -> None:
    """The pages hold what a cache of Transformers holds, without the padding."""
    for layer, theirs in zip(cache.layers, kept.layers, strict=True):
        assert layer.seqlens.tolist() == [0, *(length + STEPS - 1 for length in lengths)]
        for b, used in enumerate(layer.seqlens[1:].tolist()):
            for pages, rows in ((layer.pages.k, theirs.keys), (layer.pages.v, theirs.values)):
                found = pages[cache.page_table[b].long()].flatten(0, 1)[:used]
                torch.testing.assert_close(found, rows[b, :, -used:].transpose(0, 1), atol=0.05, rtol=0.02)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def logits_of(model, name: str, inputs, **options) -> torch.Tensor:
    with torch.no_grad():
        return with_attention(model, name)(inputs, **options).logits.float()


def exact(model):
    """The same weights in fp32, with eager attention."""
    return with_attention(deepcopy(model).float(), "eager")


def as_good(found: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether ``found`` is as near to fp32 as eager attention is in bf16."""
    error, of_eager = ((result - exact).norm() for result in (found, eager))
    return bool(error < 1.2 * of_eager + 1e-3 * exact.norm())


def test_windows_and_softcap_of_gemma():
    """One layer with a window of 12 tokens and one without; prompt and decoding through pages."""
    model = make(
        Gemma2ForCausalLM, Gemma2Config, sliding_window=12, attn_logit_softcapping=2.0, query_pre_attn_scalar=1
    )
    inputs, cache = tokens(2, 31), paged(model, 2, 31)
    eager = logits_of(model, "eager", inputs)
    with cute_fa.simulate("sm_80") as simulation:
        parts = [logits_of(model, "cute_fa", part, past_key_values=cache) for part in inputs.split([30, 1], 1)]
    assert len(simulation.launches) >= 2 * 2 * LAYERS
    assert as_good(torch.cat(parts, 1), eager, logits_of(exact(model), "eager", inputs))


def test_sinks_of_gpt_oss():
    model = make(
        *(GptOssForCausalLM, GptOssConfig),
        layer_types=["sliding_attention"] * LAYERS,
        sliding_window=12,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_scaling={"rope_type": "default", "rope_theta": 10000.0},
    )
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, 2.0)
    inputs = tokens(1, 31)
    eager = logits_of(model, "eager", inputs)
    with cute_fa.simulate("sm_80") as simulation:
        found = logits_of(model, "cute_fa", inputs)
    assert len(simulation.launches) == LAYERS
    assert as_good(found, eager, logits_of(exact(model), "eager", inputs))


def gradients(model, name: str, inputs, labels, **options) -> dict[str, torch.Tensor]:
    return gradients_of(with_attention(model, name), inputs, labels, **options)


def gradients_of(model, inputs, labels, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(inputs, labels=labels, use_cache=False, **options).loss.backward()
    return {name.removeprefix("_orig_mod."): p.grad.float().clone() for name, p in model.named_parameters()}


LEFT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
PADDED = torch.ones(3, 24, dtype=torch.long)
PADDED[0, 20:], PADDED[1, :9] = 0, 0


def test_gradients_with_padding():
    """Right, left and none: behind the first sequence lies the padding of both."""
    model = make(LlamaForCausalLM, LlamaConfig, num_hidden_layers=1)
    inputs = tokens(3, 24)
    labels = inputs.where(PADDED.bool(), -100)
    labels[1, 9] = -100  # what the last padding would predict
    eager = gradients(model, "eager", inputs, labels, attention_mask=PADDED)
    with cute_fa.simulate("sm_80") as simulation, unwritten_is_nan():
        ours = gradients(model, "cute_fa", inputs, labels, attention_mask=PADDED)
    assert len(simulation.launches) >= 3
    for name, gradient in gradients(exact(model), "eager", inputs, labels, attention_mask=PADDED).items():
        assert as_good(ours[name], eager[name], gradient), name


def test_padding_of_many_tiles_gets_zeros():
    """A row without padding, then one of a single token."""
    q, k, v = (torch.ones(2, heads, 150, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    v[1, :, 149] = 3
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[1, :149] = False
    with cute_fa.simulate("sm_80"), unwritten_is_nan():
        found, _ = integration.attention(None, q, k, v, Padding(mask))
    assert (found[0] == 1).all() and (found[1, :149] == 0).all() and (found[1, 149] == 3).all()


def test_bidirectional_attention_with_padding():
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = BertConfig(**sizes, num_attention_heads=2, initializer_range=0.1, attn_implementation="eager")
    model = BertModel(config, add_pooling_layer=False).to(torch.bfloat16).eval()

    def hidden(model, name: str) -> torch.Tensor:
        with torch.no_grad():
            states = with_attention(model, name)(tokens(3, 24), attention_mask=PADDED).last_hidden_state
        return states[PADDED.bool()].float()

    with cute_fa.simulate("sm_90a") as simulation:
        found = hidden(model, "cute_fa")
    assert len(simulation.launches) == LAYERS
    assert as_good(found, hidden(model, "eager"), hidden(exact(model), "eager"))


def test_cross_attention_with_padding():
    """All queries count, the keys that the mask names."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, length, 64, dtype=torch.bfloat16) for length in (7, 24, 24))
    with cute_fa.simulate("sm_90a"):
        found, _ = integration.attention(None, q, k, v, Padding(PADDED.bool()), is_causal=False)
    eager, of_fp32 = (
        scaled_dot_product_attention(*(t.to(dtype) for t in (q, k, v)), PADDED.bool()[:, None, None]).transpose(1, 2)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert as_good(found, eager, of_fp32)


def test_padding_token_by_token(llama):
    """A single token that is padding is no part of the cache."""
    inputs, mask, cache = tokens(2, 3), torch.tensor([[0, 1, 1], [1, 1, 1]]), paged(llama, 2, 8)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": places}
    eager, of_fp32 = (logits_of(model, "eager", inputs, **given) for model in (llama, exact(llama)))
    with cute_fa.simulate("sm_80"):
        parts = [
            logits_of(
                *(llama, "cute_fa", inputs[:, t : t + 1]),
                attention_mask=mask[:, : t + 1],
                position_ids=places[:, t : t + 1],
                past_key_values=cache,
            )
            for t in range(3)
        ]
    assert as_good(*(logits[mask.bool()] for logits in (torch.cat(parts, 1), eager, of_fp32)))
    assert cache.layers[1].seqlens.tolist() == [0, 2, 3]


def test_sequences_packed_in_a_row(llama):
    lengths = [13, 1, 17]
    inputs = tokens(1, sum(lengths))
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 17, "max_length_k": 17}
    eager, of_fp32 = (
        torch.cat([logits_of(model, "eager", part) for part in inputs.split(lengths, 1)], 1)
        for model in (llama, exact(llama))
    )
    with cute_fa.simulate("sm_80"):
        found = logits_of(llama, "cute_fa", inputs, position_ids=places, use_cache=False, **packed)
    assert as_good(found, eager, of_fp32)


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(with_attention(model, "cute_fa"), fullgraph=True, backend="aot_eager")


PLACES = torch.cat([torch.arange(13), torch.arange(11)])[None]
OFFSETS = torch.tensor([0, 13, 24], dtype=torch.int32)
IN_ONE_ROW = {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": 13, "max_length_k": 13}
# What is right, and what of the same shapes is not.
WHOLE = {"position_ids": torch.arange(24)[None]}, {"position_ids": PLACES}
PADDING = {"attention_mask": PADDED}, {"attention_mask": PADDED.index_fill(1, torch.tensor([3]), 0)}
REFUSED = "position_ids that start again within a row: give cu_seq_lens_q|attention_mask with holes"


@pytest.mark.parametrize(("right", "wrong"), [WHOLE, PADDING], ids=["whole", "padded"])
def test_compiled(llama, right, wrong):
    """What the same model gives that is not compiled, in code of which no value of an input is a part."""
    inputs, counts = tokens(3, 24), right.get("attention_mask", torch.ones(3, 24)).bool()
    with cute_fa.simulate("sm_80") as simulation, torch.no_grad():
        expected = logits_of(llama, "cute_fa", inputs, use_cache=False, **right)
        run = compiled(llama)
        found = run(inputs, use_cache=False, **right).logits.float()
        assert len(simulation.launches) == 2 * LAYERS
        with pytest.raises(RuntimeError, match=REFUSED):
            run(inputs, use_cache=False, **wrong)
    torch.testing.assert_close(found[counts], expected[counts], atol=0, rtol=0)


def test_compiled_with_sequences_packed_in_a_row(llama):
    inputs = tokens(1, 24)
    with cute_fa.simulate("sm_80"), torch.no_grad():
        expected = torch.cat([logits_of(llama, "cute_fa", part) for part in inputs.split([13, 11], 1)], 1)
        found = compiled(llama)(inputs, position_ids=PLACES, use_cache=False, **IN_ONE_ROW).logits.float()
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("right", "wrong", "checkpoints"),
    [(*WHOLE, False), (*WHOLE, True), (*PADDING, True)],
    ids=["whole", "layers", "padded-layers"],
)
def test_compiled_gradients(right, wrong, checkpoints):
    """Also with checkpointed layers, which may write to nothing that is not theirs."""
    model = make(LlamaForCausalLM, LlamaConfig, num_hidden_layers=1)
    inputs = tokens(3, 24)
    labels = inputs.where(right.get("attention_mask", torch.ones(3, 24)).bool(), -100)
    labels[1, 9] = -100  # what the last padding would predict
    of_eager, of_fp32 = (gradients(m, "eager", inputs, labels, **right) for m in (model, exact(model)))
    if checkpoints:
        model.train().activation_checkpointing_enable()
    with cute_fa.simulate("sm_80"):
        expected = gradients(model, "cute_fa", inputs, labels, **right)
        run = compiled(model)
        found = gradients_of(run, inputs, labels, **right)
        with pytest.raises(RuntimeError, match=REFUSED):
            gradients_of(run, inputs, labels, **wrong)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    for name, gradient in of_fp32.items():
        assert as_good(found[name], of_eager[name], gradient), name


def test_compiled_decoding_with_padding():
    """Whether the mask leaves a key of another cache out is asked in each run."""
    llama = make(LlamaForCausalLM, LlamaConfig, num_hidden_layers=1)
    caches = [DynamicCache(config=llama.config) for _ in range(3)]
    inputs = tokens(2, 4)
    for kept in caches:
        logits_of(llama, "eager", inputs[:, :3], past_key_values=kept)
    with cute_fa.simulate("sm_80"), torch.no_grad():
        expected = logits_of(llama, "cute_fa", inputs[:, 3:], past_key_values=caches[0])
        run = compiled(llama)
        found = run(inputs[:, 3:], past_key_values=caches[1], attention_mask=torch.ones(2, 4)).logits.float()
        with pytest.raises(RuntimeError, match="padding with a cache other than"):
            run(inputs[:, 3:], past_key_values=caches[2], attention_mask=LEFT)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("traced", [False, True])
def test_blocks_that_see_ahead(llama, traced):
    """Images in Gemma 3: their tokens see each other. A text alone has none and is causal."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    with_attention(llama, "cute_fa")

    def attend(blocks):
        mask = create_causal_mask(
            llama.config, torch.empty(2, 9, 1), None, None, torch.arange(9)[None], block_sequence_ids=blocks
        )
        return integration.attention(None, q, k, v, mask)[0]

    torch._dynamo.reset()
    run = torch.compile(attend, fullgraph=True, backend="aot_eager") if traced else attend
    text = torch.full((2, 9), -1)
    image = text.clone()
    image[1, 4:7] = 0
    with cute_fa.simulate("sm_80"):
        expected = cute_fa.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
        torch.testing.assert_close(run(text), expected, atol=0, rtol=0)
        with pytest.raises(RuntimeError if traced else ArgumentError, match="a model's own mask pattern"):
            run(image)


def test_example(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("generate_llama", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["generate_llama.py", "--arch", "sm_80", "--new-tokens", "2"])
    example.main()  # raises SystemExit if the tokens differ
    eager, ours, pages = capsys.readouterr().out.splitlines()
    assert eager.split()[1:] == ours.split()[1:]
    assert "tokens in the pages: [20, 12]" in pages


@pytest.mark.gpu
def test_decode_step_in_a_cuda_graph():
    """A captured step moves on by one token with each replay, in the cache and in the angles of RoPE."""
    model = make(LlamaForCausalLM, LlamaConfig).cuda()
    inputs, prompt = tokens(2, 21 + STEPS).cuda(), 21
    eager, of_fp32 = (logits_of(m, "eager", inputs)[:, prompt:] for m in (model, exact(model)))
    cache = PagedCache(model.config, 2, prompt + STEPS, page_size=PAGE_SIZE)
    logits_of(model, "cute_fa", inputs[:, :prompt], past_key_values=cache)
    token, place = inputs[:, prompt : prompt + 1].clone(), torch.full((2, 1), prompt, device="cuda")

    def step() -> torch.Tensor:
        logits = logits_of(model, "cute_fa", token, position_ids=place, past_key_values=cache)
        place.add_(1)
        return logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles and allocates what a capture may not
    torch.cuda.current_stream().wait_stream(stream)
    cache.crop(-1)
    place.fill_(prompt)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    found = []
    for t in range(prompt, prompt + STEPS):
        token.copy_(inputs[:, t : t + 1])
        graph.replay()
        found.append(logits.clone())
    assert as_good(torch.cat(found, 1), eager, of_fp32)
    assert cache.layers[0].seqlens.tolist() == [0, prompt + STEPS, prompt + STEPS]


@pytest.fixture
def nothing_runs(monkeypatch):
    """Kernels may not be reached."""
    for name in ("flash_attn_func", "flash_attn_varlen_func", "append_kv"):
        monkeypatch.setattr(integration, name, None)


HOLE = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, ArgumentError, r"\(2, 1, 4, 4\) for each query"),
        ({"attention_mask": LEFT[:, 1:]}, ShapeError, r"attention_mask \(2, 3\): keys 0 to 4"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": False}, ArgumentError, "position_ids .* again"),
        ({"past_key_values": "static"}, ArgumentError, "StaticCache"),
        ({"past_key_values": "paged 1"}, ShapeError, "2 sequences: the PagedCache has 1"),
        ({"past_key_values": "paged 2", "attn": "sdpa"}, ArgumentError, 'attn_implementation="cute_fa"'),
        ({"past_key_values": "paged 2", "attn": "eager"}, ArgumentError, 'attn_implementation="cute_fa"'),
        ({"past_key_values": "paged 2", "cu_seq_lens_q": torch.zeros(2)}, ArgumentError, "cu_seq_lens_q with a Paged"),
        ({"cu_seq_lens_q": torch.zeros(2)}, ArgumentError, "cu_seq_lens_q, batch 2"),
        ({"position_bias": torch.zeros(1)}, UnsupportedArgumentError, "position_bias"),
    ],
)
def test_what_is_refused(llama, nothing_runs, options, error, message):
    options = dict(options)
    cache = options.get("past_key_values", "")
    if cache == "static":
        options["past_key_values"] = StaticCache(llama.config, max_cache_len=16)
    elif cache:
        options["past_key_values"] = paged(llama, int(cache[-1]), 16)
    with pytest.raises(error, match=message), cute_fa.simulate("sm_80"):
        logits_of(llama, options.pop("attn", "cute_fa"), tokens(2, 4), **options)


def test_masks_with_holes_are_refused(llama):
    with pytest.raises(ArgumentError, match="attention_mask with holes"), cute_fa.simulate("sm_80"):
        logits_of(llama, "cute_fa", tokens(2, 4), attention_mask=HOLE)


def test_another_cache_works_without_padding_alone(llama):
    """What is padding shows in decoding; before, the keys are those of the queries."""
    inputs = tokens(2, 4)
    eager, of_fp32 = (logits_of(model, "eager", inputs)[:, 3:] for model in (llama, exact(llama)))
    for mask in (torch.ones(2, 4), LEFT):
        cache = DynamicCache(config=llama.config)
        logits_of(llama, "eager", inputs[:, :3], past_key_values=cache)
        refused = (
            pytest.raises(ArgumentError, match="padding with a cache other than") if mask is LEFT else nullcontext()
        )
        with refused, cute_fa.simulate("sm_80"):
            found = logits_of(llama, "cute_fa", inputs[:, 3:], attention_mask=mask, past_key_values=cache)
    assert as_good(found, eager, of_fp32)


def test_dropout_is_refused(nothing_runs):
    model = make(LlamaForCausalLM, LlamaConfig, attention_dropout=0.1).train()
    with pytest.raises(UnsupportedArgumentError, match=r"dropout=0\.1"):
        with_attention(model, "cute_fa")(tokens(2, 4))


def test_a_paged_cache_is_for_inference_and_has_an_end(llama, nothing_runs):
    with_attention(llama, "cute_fa")
    with pytest.raises(NoBackwardError, match="a PagedCache has no gradient"):
        llama(tokens(2, 4), past_key_values=paged(llama, 2, 16))
    with pytest.raises(LengthError, match="0 tokens and 17 more: the PagedCache holds 16"):
        llama(tokens(2, 17), past_key_values=paged(llama, 2, 16))
    with pytest.raises(UnsupportedArgumentError, match="num_beams=2"):
        paged(llama, 2, 16).reorder_cache(torch.tensor([0, 1]))
    with pytest.raises(UnsupportedArgumentError, match="layer_types='linear_attention'"):
        PagedCache(LlamaConfig(**SIZES, layer_types=["full_attention", "linear_attention"]), 2, 16, device="cpu")


def test_registering_twice_changes_nothing():
    register()
    assert AttentionInterface()["cute_fa"] is integration.attention
