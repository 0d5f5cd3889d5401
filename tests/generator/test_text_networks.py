"""Both networks told a text: where its tokens stand, what sees them; caches, guidance and orders still work."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import StepRandom
from engine.config import RunConfig, TrainConfig
from engine.flops import forward_flops
from engine.products import packed
from engine.shards import Shards, ShardWriter, open_shards
from generator.autoregressive import VIM, Autoregressive, build_network
from generator.autoregressive_task import AutoregressiveTask
from generator.captions import encode_texts
from generator.card import generator_card
from generator.condition import preview_rows
from generator.condition_config import ConditionConfig, TextConfig
from generator.config import (
    AutoregressiveConfig,
    AutoregressiveModelConfig,
    AutoregressiveSampleConfig,
    DenoiserModelConfig,
    OrderConfig,
)
from generator.decoding import choose, decode, guidance_at, seeded_uniforms, stream
from generator.denoiser import DiT
from generator.diffusion import Diffusion, build_denoiser
from generator.order import draw_orders, fold_order
from generator.text import ByteEncoder
from generator.transformer import CrossAttention
from tokenizer.model import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from gpt2 import vim_from_gpt2

MODEL = AutoregressiveModelConfig(preset="tiny", depth=2, width=32, heads=4, dropout=0.0)
VOCAB, LENGTH, GRID, WORDS, L = 11, 8, (2, 4), 20, 5
TEXTS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 3, 0, 0, 0]])
OF_TEXT = ("text.", "gate", "summary.")
BLOCKS = pytest.mark.parametrize("block", ["vim", "modern"])


class Words(nn.Module):
    """A text encoder that only looks up: ids [B, L] -> tokens [B, L, D], which do not know of one another."""

    def __init__(self, width: int = 32, length: int = L) -> None:
        super().__init__()
        self.num_tokens = length
        self.table = nn.Embedding(WORDS, width)
        self.calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.table(ids)


def vim(block: Any = "vim", *, length: int = L, **options: Any) -> VIM:
    """An untrained network with large weights, so that its distributions are far from uniform."""
    torch.manual_seed(0)
    model = dataclasses.replace(MODEL, block=block)
    network = VIM(
        model, vocab_size=VOCAB, length=LENGTH, num_classes=3, grid=GRID, text=Words(length=length), **options
    ).eval()
    for parameter in network.parameters():
        parameter.data.mul_(8 if parameter.ndim == 2 else 1)
    network.text.table.weight.data.div_(8)  # these began at 1, not at 0.02
    torch.nn.init.normal_(network.gate)  # which begins at zero
    return network.requires_grad_(False)


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def order() -> Tensor:
    return torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(2)).argsort(1)


def empty(rows: int) -> Tensor:
    """The ids of no text."""
    return torch.zeros(rows, L, dtype=torch.int64)


def test_a_text_of_one_token_is_a_label(codes: Tensor) -> None:
    labelled = VIM(MODEL, vocab_size=VOCAB, length=LENGTH, num_classes=WORDS - 1).eval()
    told = vim(length=1)
    weights = labelled.state_dict()
    weights["text.table.weight"] = weights.pop("label_embedding.weight")
    as_it_is = {"summary.weight": torch.eye(32), "summary.bias": torch.zeros(32)}
    told.load_state_dict(weights | as_it_is | {"gate": torch.zeros(32)})
    labels = torch.tensor([4, 0, 7])
    assert torch.equal(told(codes, labels[:, None]), labelled(codes, labels))


def test_the_tokens_of_a_text_lead_the_codes_as_a_prompt_does_in_gpt2(codes: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=L - 1 + LENGTH, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False
        )
    ).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.2)
    places = theirs.transformer.wpe.weight.data
    places[: L - 1] = 0  # a text lies nowhere, but for the token that stands where a label would
    ours, weights = vim(), vim_from_gpt2(theirs, LENGTH).state_dict()
    del weights["label_embedding.weight"]
    ours.load_state_dict(weights | {"position_embedding.weight": places[L - 1 :], **_text_weights(ours)})
    tokens = ours.text(TEXTS)
    label = ours.summary(tokens[:, -1:])
    prompt = torch.cat([label + tokens[:, :-1] * ours.gate, label], dim=1)
    inputs = torch.cat([prompt, theirs.transformer.wte(codes[:, :-1])], dim=1)
    with torch.no_grad():
        expected = theirs(inputs_embeds=inputs).logits[:, L - 1 :]
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(codes, TEXTS), expected, atol=1e-5, rtol=1e-5)


def _text_weights(network: VIM) -> dict[str, Tensor]:
    return {name: weight for name, weight in network.state_dict().items() if name.startswith(OF_TEXT)}


def test_a_text_has_no_label_and_a_label_no_text() -> None:
    told, labelled = vim(), VIM(MODEL, vocab_size=VOCAB, length=LENGTH, num_classes=3)
    assert set(labelled.state_dict()) - set(told.state_dict()) == {"label_embedding.weight"}
    assert set(told.state_dict()) - set(labelled.state_dict()) == {
        "text.table.weight", "gate", "summary.weight", "summary.bias",
    }  # fmt: skip
    assert (told.leading, labelled.leading) == (L - 1, 0)


@BLOCKS
def test_leading_tokens_begin_as_the_summary_with_gradients_that_no_depth_blows_up(codes: Tensor, block: str) -> None:
    torch.manual_seed(0)
    deep = dataclasses.replace(MODEL, depth=16, block=block)
    network = VIM(deep, vocab_size=VOCAB, length=LENGTH, num_classes=3, grid=GRID, text=Words())
    prefix = network._told(TEXTS)
    assert torch.equal(prefix, prefix[:, -1:].expand(-1, L, -1)) and prefix.abs().amax() > 0.01
    F.cross_entropy(network(codes, TEXTS).mT, codes).backward()
    squares = [parameter.grad.square().sum() for parameter in network.parameters() if parameter.grad is not None]
    assert 0.01 < sum(squares) ** 0.5 < 100


def test_the_networks_initialisation_leaves_the_encoders_alone() -> None:
    torch.manual_seed(3)
    encoder = ByteEncoder(width=32, length=L, depth=1)
    before = copy.deepcopy(encoder.state_dict())
    VIM(MODEL, vocab_size=VOCAB, length=LENGTH, num_classes=3, text=encoder)
    DiT((3, 4, 6), depth=1, width=32, heads=4, text=encoder)
    assert all(torch.equal(weight, before[name]) for name, weight in encoder.state_dict().items())


@BLOCKS
def test_every_code_sees_every_token_of_the_text_and_the_codes_before_it(codes: Tensor, block: str) -> None:
    network = vim(block)
    before = network(codes, TEXTS)
    assert before.shape == (3, LENGTH, VOCAB)
    for place in range(L):
        changed = TEXTS.clone()
        changed[:, place] += 7
        assert ((network(codes, changed) - before).abs().amax(-1) > 1e-4).all()
    later = codes.clone()
    later[:, 3:] = (later[:, 3:] + 1) % VOCAB
    after = network(later, TEXTS)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:], atol=1e-2)


@BLOCKS
@pytest.mark.parametrize("given", [0, 3])
def test_cached_logits_equal_full_forward_logits(codes: Tensor, block: str, given: int) -> None:
    network, position = vim(block), torch.arange(LENGTH)
    caches = network.caches(3)
    assert caches[0].keys.shape[2] == L - 1 + LENGTH
    cached = [network.advance(codes[:, :given], TEXTS, position[: given + 1], caches)]
    for step in range(given + 1, LENGTH):
        cached.append(network.advance(codes[:, step - 1 : step], None, position[step : step + 1], caches))
    torch.testing.assert_close(torch.stack(cached, dim=1), network(codes, TEXTS)[:, given:], atol=1e-5, rtol=1e-5)


@BLOCKS
def test_cached_logits_of_an_unfolded_network_equal_its_forward(codes: Tensor, block: str) -> None:
    network, position = vim(block, random_order=True), torch.arange(LENGTH)
    caches = network.caches(3)
    cached = [network.advance(codes[:, :0], TEXTS, position[:1], caches)]
    for step in range(1, LENGTH):
        cached.append(network.advance(codes[:, step - 1 : step], None, position[step : step + 1], caches))
    torch.testing.assert_close(torch.stack(cached, dim=1), network(codes, TEXTS))


@BLOCKS
def test_orders_leave_the_text_in_front(codes: Tensor, order: Tensor, block: str) -> None:
    network, raster = vim(block, random_order=True), torch.arange(LENGTH).expand(3, -1)
    torch.testing.assert_close(network(codes, TEXTS, raster), network(codes, TEXTS))
    before = network(codes, TEXTS, order)
    later = torch.zeros_like(codes, dtype=torch.bool).scatter(1, order[:, 3:], True)
    after = network(torch.where(later, (codes + 1) % VOCAB, codes), TEXTS, order)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert ((after - before)[:, 4:].abs().amax(-1) > 1e-3).all()
    assert ((network(codes, TEXTS.roll(1, 0), order) - before).abs().amax(-1) > 1e-3).all()
    folded = vim(block)
    folded.load_state_dict(fold_order(network.state_dict()))
    assert torch.equal(folded(codes, TEXTS), network(codes, TEXTS))


def test_only_codes_are_turned_and_placed(codes: Tensor, order: Tensor) -> None:
    network = vim("modern", random_order=True)
    for target, source in ((torch.arange(LENGTH), torch.arange(LENGTH)), (order, order + 1)):
        x, (cos, sin) = network._begin(codes[:, :-1], TEXTS, target, source)
        assert x.shape == (3, L - 1 + LENGTH, 32) and cos.shape[-2] == L - 1 + LENGTH
        assert (cos[..., : L - 1, :] == 1).all() and (sin[..., : L - 1, :] == 0).all()
        tokens = network.text(TEXTS)
        assert torch.equal(x[:, : L - 1], network.summary(tokens[:, -1:]) + tokens[:, :-1] * network.gate)


@BLOCKS
def test_the_stream_is_that_of_the_codes(codes: Tensor, block: str) -> None:
    network = vim(block)
    first, last = network.hidden(codes, TEXTS)
    assert first.shape == last.shape == (3, LENGTH, 32)
    torch.testing.assert_close(network.head(network.norm(last)), network(codes, TEXTS))


def always_both(
    network: VIM, texts: Tensor, uniforms: Tensor, settings: AutoregressiveSampleConfig, given: int
) -> Tensor:
    """Decode without caches, with both logits for every code; `given` zeros stand for a prefix."""
    codes = torch.zeros(uniforms.shape, dtype=torch.int64)
    for step in range(given, LENGTH):
        conditional, null = (network(codes[:, : step + 1], rows)[:, -1] for rows in (texts, empty(len(texts))))
        logits = null + guidance_at(step / LENGTH, settings) * (conditional - null)
        codes[:, step] = choose(logits, uniforms[:, step], settings)
    return codes


@BLOCKS
@pytest.mark.parametrize("given", [0, 1, 4])
@pytest.mark.parametrize("guidance", [
    {"guidance": 1.0}, {"guidance": 3.0}, {"guidance": 3.0, "guidance_start": 0.25, "guidance_stop": 0.75},
    {"guidance": 3.0, "guidance_schedule": "linear"},
])  # fmt: skip
def test_decoded_codes_equal_those_of_a_loop_that_always_computes_both(
    block: str, given: int, guidance: dict[str, Any]
) -> None:
    settings = AutoregressiveSampleConfig(top_k=8, **guidance)
    network, uniforms = vim(block), seeded_uniforms(range(3), LENGTH)
    prefix = torch.zeros(3, given, dtype=torch.int64) if given else None
    decoded = decode(network, TEXTS, uniforms, settings, null=empty(3), prefix=prefix)
    assert torch.equal(decoded, always_both(network, TEXTS, uniforms, settings, given))
    others = decode(network, TEXTS.roll(1, 0), uniforms, settings, null=empty(3), prefix=prefix)
    assert not torch.equal(others, decoded)


def test_samples_do_not_depend_on_their_neighbours_and_streams_tell_them() -> None:
    network, settings = vim("modern"), AutoregressiveSampleConfig(guidance=2.0, guidance_start=0.25)
    uniforms = seeded_uniforms([5, 6, 7], LENGTH)
    whole = decode(network, TEXTS, uniforms, settings, null=empty(3))
    alone = [decode(network, TEXTS[k : k + 1], uniforms[k : k + 1], settings, null=empty(1)) for k in range(3)]
    assert torch.equal(torch.cat(alone), whole)
    for done, told in stream(network, TEXTS, uniforms, settings, null=empty(3)):
        assert torch.equal(told[:, :done], whole[:, :done])
    assert done == LENGTH


def test_the_text_is_read_once_for_each_kind_of_row() -> None:
    network, uniforms = vim(), seeded_uniforms(range(3), LENGTH)
    for settings, calls in (({}, 1), ({"guidance": 2.0}, 1), ({"guidance": 2.0, "guidance_start": 0.5}, 2)):
        network.text.calls = 0
        decode(network, TEXTS, uniforms, AutoregressiveSampleConfig(**settings), null=empty(3))
        assert network.text.calls == calls


@BLOCKS
def test_packed_layers_decode_the_same_codes(block: str) -> None:
    network, uniforms = vim(block), seeded_uniforms(range(3), LENGTH)
    settings = AutoregressiveSampleConfig(guidance=2.0, guidance_start=0.25)
    twin = packed(network, 3)
    assert twin is not network and twin.leading == L - 1
    assert torch.equal(*(decode(each, TEXTS, uniforms, settings, null=empty(3)) for each in (network, twin)))


@pytest.mark.slow
@BLOCKS
def test_compiled_steps_decode_the_same_codes(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The traced step is run as it was traced: to turn it into machine code takes much longer.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr("generator.decoding.STRETCH", 5)  # windows of 5, 10 and 12 positions
    torch._dynamo.reset()
    network, uniforms = vim(block), seeded_uniforms(range(3), LENGTH)
    settings = AutoregressiveSampleConfig(guidance=2.0, guidance_start=0.25)
    compiled = decode(network, TEXTS, uniforms, dataclasses.replace(settings, compile=True), null=empty(3))
    assert torch.equal(compiled, decode(network, TEXTS, uniforms, settings, null=empty(3)))


def test_bf16_stays_close(codes: Tensor) -> None:
    network = vim("modern")
    expected = network(codes, TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(codes, TEXTS)
    assert (half.argmax(-1) == expected.argmax(-1)).double().mean() > 0.8
    narrow = network.to(torch.bfloat16)
    assert (narrow(codes, TEXTS).argmax(-1) == expected.argmax(-1)).double().mean() > 0.8
    settings = AutoregressiveSampleConfig(guidance=2.0)
    assert decode(narrow, TEXTS, seeded_uniforms(range(3), LENGTH), settings, null=empty(3)).shape == (3, LENGTH)


# The denoiser

SHAPE = (3, 4, 6)
SWITCHES: list[dict[str, bool]] = [{}, {"qk_norm": True}, {"rope": True}, {"qk_norm": True, "rope": True}]
EACH = pytest.mark.parametrize("switches", SWITCHES, ids=["+".join(each) or "none" for each in SWITCHES])


def dit(*, text: bool = True, depth: int = 2, **switches: bool) -> DiT:
    torch.manual_seed(0)
    encoder = Words() if text else None
    return DiT(SHAPE, depth=depth, width=32, heads=4, patch_size=2, num_classes=5, text=encoder, **switches)


def opened(network: DiT) -> DiT:
    """The network with random weights, so that nothing is zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def noisy() -> tuple[Tensor, Tensor]:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.linspace(-9, 9, 3)


def test_cross_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = CrossAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    for parameter in (*ours.parameters(), *theirs.parameters()):
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, text = torch.randn(2, 6, 32), torch.randn(2, L, 32)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    normed = normed * ours.norm.weight + ours.norm.bias
    torch.testing.assert_close(ours(x, text), theirs(normed, text, text)[0], atol=1e-5, rtol=1e-5)


def test_normalised_queries_and_keys_forget_their_length() -> None:
    torch.manual_seed(0)
    x, text = torch.randn(2, 6, 32), torch.randn(2, L, 32)
    for normalised in (False, True):
        layer = CrossAttention(32, 4, qk_norm=normalised)
        before = layer(x, text)
        with torch.no_grad():
            layer.query.weight.mul_(9)
            layer.query.bias.mul_(9)
        assert torch.allclose(layer(x, text), before, atol=1e-4) == normalised


@EACH
def test_a_block_asks_the_text_between_its_two_branches(switches: dict[str, bool]) -> None:
    network = opened(dit(**switches))
    tokens, shared, text = network.embed(*noisy(), TEXTS)
    block, turns = network.blocks[0], network.rotary(1 + torch.arange(6)) if network.rotary else None
    numbers = block.modulation(shared)[:, None].chunk(6, -1)
    expected = tokens + numbers[2] * block.attention(block.norm(tokens) * (1 + numbers[1]) + numbers[0], turns=turns)
    expected = expected + block.cross(expected, text)
    expected = expected + numbers[5] * block.mlp(block.norm(expected) * (1 + numbers[4]) + numbers[3])
    torch.testing.assert_close(next(iter(network.activations(*noisy(), TEXTS))), expected)
    assert torch.equal(text, network.text(TEXTS))


@EACH
def test_a_new_network_is_the_identity_and_predicts_zero(switches: dict[str, bool]) -> None:
    network = dit(**switches)
    tokens, shared, text = network.embed(*noisy(), TEXTS)
    for mixed in network.mix(tokens, shared, text):
        assert torch.equal(mixed, tokens)
    assert not network(*noisy(), TEXTS).any()


def test_only_the_summary_enters_beside_the_level() -> None:
    network = opened(dit(depth=1))
    network.blocks[0].cross.out.weight.data.zero_()
    before = network(*noisy(), TEXTS)
    for place in range(L):
        changed = TEXTS.clone()
        changed[:, place] += 7
        assert torch.equal(network(*noisy(), changed), before) == (place < L - 1)
    x, logsnr = noisy()
    _, shared, text = network.embed(x, logsnr, TEXTS)
    level = network.noise_level(logsnr) + text[:, -1] @ network.summary.weight.T + network.summary.bias
    torch.testing.assert_close(shared, level * level.sigmoid())


@EACH
def test_every_token_is_asked_wherever_it_stands(switches: dict[str, bool]) -> None:
    network = opened(dit(**switches))
    before = network(*noisy(), TEXTS)
    for place in range(L):
        changed = TEXTS.clone()
        changed[:, place] += 7
        assert ((network(*noisy(), changed) - before).abs().amax((1, 2, 3)) > 1e-5).all()
    turned = TEXTS[:, [2, 0, 3, 1, 4]]  # the encoder of this test knows no places, and the network adds none
    torch.testing.assert_close(network(*noisy(), turned), before)


def test_texts_and_labels_have_weights_of_their_own() -> None:
    told, labelled = ({name for name, _ in dit(text=text).named_parameters()} for text in (True, False))
    assert labelled - told == {"labels.weight"}
    own = {"text.table.weight", "summary.weight", "summary.bias"}
    assert all(name in own or ".cross." in name for name in told - labelled) and own < told
    normalised = {name for name, _ in dit(qk_norm=True).named_parameters()}
    assert {f"blocks.0.cross.{side}_norm.weight" for side in ("query", "key")} < normalised


@EACH
def test_gradient_reaches_every_parameter_once_the_gates_are_open(switches: dict[str, bool]) -> None:
    network, (x, logsnr) = dit(**switches), noisy()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(3):  # the first step opens the output, the second the gates and the cross-attention
        network.zero_grad()
        (network(x, logsnr, TEXTS) - x).square().mean().backward()
        silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        optimizer.step()
    assert silent == []


def test_the_text_is_read_once_in_a_forward() -> None:
    network = opened(dit())
    network(*noisy(), TEXTS)
    assert network.text.calls == 1
    assert [tokens.shape for tokens in network.activations(*noisy(), empty(3))] == 2 * [(3, 6, 32)]
    assert network.text.calls == 2


def test_sampling_reads_each_text_once_and_says_the_same() -> None:
    model = {"depth": 1, "width": 32, "heads": 4, "label_dropout": 0.1}
    config = {"model": model, "condition": {"kind": "text", "text": {"length": 8}}}
    card = {
        "config": config,
        "latent_shape": [3, 4, 6],
        "num_classes": 0,
        "class_names": [],
        "tokenizer_fingerprint": "",
    }
    network, read = opened(build_denoiser(DenoiserModelConfig(**model), card)), []
    network.text.register_forward_hook(lambda _, ids, tokens: read.append(len(tokens)))
    generator = Diffusion(network, card).eval()
    assert generator.sample(["a cat", "a dog"], [1, 2], guidance=2.0, num_steps=3).isfinite().all()
    assert read == [2, 1]  # both texts, and that of no condition
    x, logsnr = noisy()
    ids = generator.condition.rows(["a cat", "", "ab"], 3)
    assert torch.equal(network(x, logsnr, ids), network(x, logsnr, network.read(ids)))
    assert not torch.equal(network(x, logsnr, ids), network(x, logsnr, ids.flip(0)))


def test_rows_of_a_batch_do_not_meet() -> None:
    network, (x, logsnr) = opened(dit()), noisy()
    alone = [network(x[k : k + 1], logsnr[k : k + 1], TEXTS[k : k + 1]) for k in range(3)]
    torch.testing.assert_close(torch.cat(alone), network(x, logsnr, TEXTS))


def test_under_autocast_the_stream_stays_fp32_and_the_output_close() -> None:
    network = opened(dit(qk_norm=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {tokens.dtype for tokens in network.activations(*noisy(), TEXTS)} == {torch.float32}
        half = network(*noisy(), TEXTS)
    torch.testing.assert_close(half.float(), network(*noisy(), TEXTS), rtol=0.1, atol=0.1)


def test_what_a_text_costs() -> None:
    told, labelled = (
        forward_flops(dit(text=text), torch.empty(1, *SHAPE), torch.empty(1), empty(1)[:, :width].squeeze(1))
        for text, width in ((True, L), (False, 1))
    )
    T, D = 6, 32
    cross = 2 * (2 * T * D * D + L * D * 2 * D) + 4 * T * L * D  # query and out, key and value, both products
    assert told - labelled == 2 * cross + 2 * D * D


# The autoregressive generator and its training

TEMPLATES = ("{}", "a photo of a {}", "an image of the {}", "one {}")
TEXT = TextConfig(length=24, depth=1, width=32, templates=TEMPLATES, held_out=("this is a {}",))
TOLD = AutoregressiveConfig(
    model=dataclasses.replace(MODEL, label_dropout=0.5),
    condition=ConditionConfig(kind="text", text=TEXT),
    train=TrainConfig(steps=20, batch_size=32, learning_rate=1e-2),
)


def make_task(run: RunConfig, config: AutoregressiveConfig = TOLD, source: Shards | None = None) -> AutoregressiveTask:
    torch.manual_seed(0)
    shards, test_shards = (open_shards(run.folder / "codes" / split) for split in ("train", "test"))
    tokenizer, shards = load_tokenizer(run.folder), source or shards
    card = generator_card(config, shards, tokenizer)
    return AutoregressiveTask(config=config, card=card, source=shards, test_shards=test_shards, tokenizer=tokenizer)


def learned(task: AutoregressiveTask, steps: int = 40) -> Autoregressive:
    """The generator after some steps on the same batch; its weights stay as they are then."""
    optimizer = torch.optim.AdamW(task.network.parameters(), lr=3e-3)
    batch = task.test_shards.load(torch.arange(24).numpy())
    for step in range(steps):
        optimizer.zero_grad()
        task.step(batch, StepRandom(0, step, 24))["loss"].backward()
        optimizer.step()
    return task.generator.eval()


@pytest.mark.parametrize("kind", ["raster", "random"])
def test_the_loss_is_that_of_drawn_texts_of_which_a_share_is_dropped(run: RunConfig, kind: Any) -> None:
    task = make_task(run, dataclasses.replace(TOLD, order=OrderConfig(kind=kind)))
    batch = task.test_shards.load(torch.arange(20).numpy())
    loss = task.step(batch, StepRandom(0, 0, 20))["loss"]
    rng, codes = StepRandom(0, 0, 20), batch["codes"]
    dropped = rng.uniform() < 0.5
    order = draw_orders(rng.uniform(), rng.uniform(16), 1.0) if kind == "random" else None
    turns = (rng.uniform() * 4).long().tolist()
    assert 0 < dropped.sum() < 20 and len(set(turns)) == 4
    drawn = zip(turns, batch["labels"].tolist(), dropped, strict=True)
    ids = encode_texts(TEXT, ["" if no else TEMPLATES[turn].replace("{}", "abc"[label]) for turn, label, no in drawn])
    targets = codes if order is None else codes.gather(1, order)
    torch.testing.assert_close(loss, F.cross_entropy(task.network(codes, ids, order).transpose(1, 2), targets))


def test_training_reads_the_texts_of_its_source_and_validation_those_of_the_test_split(run: RunConfig) -> None:
    condition = ConditionConfig(kind="text", text=TextConfig(length=24, depth=1, captions="data"))
    config = dataclasses.replace(TOLD, condition=condition)
    with pytest.raises(ValueError, match=r"captions=data, but the data set has no captions"):
        make_task(run, config)
    for split in ("train", "test"):
        old = open_shards(run.folder / "codes" / split)
        rows = old.load(torch.arange(len(old)).numpy())
        with ShardWriter(run.folder / "told" / split, views=("original",), vocab_size=32) as writer:
            captions = [f"{split} {row}" for row in range(len(old))]
            writer.append(labels=rows["labels"], codes=rows["codes"][:, None], captions=captions)
            writer.close({key: value for key, value in old.meta.items() if key not in ("parts", "n", "views")})
    shards, test_shards = (open_shards(run.folder / "told" / split) for split in ("train", "test"))
    tokenizer = load_tokenizer(run.folder)
    card = generator_card(config, shards, tokenizer)
    task = AutoregressiveTask(config=config, card=card, source=shards, test_shards=test_shards, tokenizer=tokenizer)
    batch = shards.load(torch.tensor([4, 30]).numpy())
    assert torch.equal(task.read(batch, None), encode_texts(TEXT, ["train 4", "train 30"]))
    held_out = torch.cat([condition for _, condition in task._test_batches()])
    assert torch.equal(held_out, encode_texts(TEXT, [f"test {row}" for row in range(24)]))
    shown = preview_rows(task.condition, task.read_test, test_shards, 16)
    assert torch.equal(shown, encode_texts(TEXT, [f"test {3 * k // 2}" for k in range(16)]))


@BLOCKS
def test_a_trained_generator_follows_its_text_and_is_rebuilt_from_its_card(run: RunConfig, block: Any) -> None:
    task = make_task(run, dataclasses.replace(TOLD, model=dataclasses.replace(TOLD.model, block=block)))
    generator, prompts = learned(task, steps=60), ["a photo of a a", "a photo of a b", "a photo of a c"]
    codes = task.test_shards.load(torch.arange(3).numpy())["codes"]
    right = generator.nll(codes, prompts)
    assert (right < generator.nll(codes, prompts[1:] + prompts[:1]) - 1).all()
    assert (right < generator.nll(codes, None)).all()
    again = Autoregressive.from_card(generator.card, generator.network.state_dict())
    told = generator.sample(prompts, [1, 2, 3], guidance=2.0)
    assert torch.equal(again.sample(prompts, [1, 2, 3], guidance=2.0), told)
    ids, null = encode_texts(TEXT, prompts), encode_texts(TEXT, [""]).expand(3, -1)
    assert torch.equal(generator.sample(ids, [1, 2, 3], guidance=2.0), told)
    settings = AutoregressiveSampleConfig(guidance=2.0)
    assert torch.equal(decode(generator.network, ids, seeded_uniforms([1, 2, 3], 16), settings, null=null), told)
    assert torch.equal(generator.sample(None, [1, 2], temperature=0), generator.sample(["", ""], [1, 2], temperature=0))
    assert torch.equal(generator.sample(prompts[1:2], [2], guidance=2.0), told[1:2])
    features = generator.features(codes, ["block2"])["block2"]
    torch.testing.assert_close(features, list(generator.network.hidden(codes, null))[1].mean(1))
    assert generator.randomised(1).sample(prompts, [1, 2, 3]).shape == (3, 16)


def test_a_preview_and_a_validation_of_texts(run: RunConfig) -> None:
    task = make_task(run)
    with torch.no_grad():
        assert task.preview()["samples"].shape == (16, 3, 16, 16)
        figures = task.validate()
    batch = task.test_shards.load(torch.arange(24).numpy())
    task.network.eval()
    nats = task.generator.nll(batch["codes"], task.read_test(batch, None))
    assert figures["nll"] == pytest.approx(nats.mean().item() / 16, rel=1e-4)


def test_bf16_decodes_texts_with_a_copy(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.device.has_bf16", lambda _: True)  # in software it is but slow
    generator, prompts = learned(make_task(run)), ["a photo of a a", "a photo of a c"]
    usual, half = (
        generator.sample(prompts, [1, 2], temperature=0, precision=precision) for precision in ("fp32", "bf16")
    )
    assert (usual == half).double().mean() > 0.8
    assert {parameter.dtype for parameter in generator.parameters()} == {torch.float32}


CARD = {"num_classes": 3, "class_names": [], "grid": GRID, "vocab_size": VOCAB}


def test_an_image_is_no_condition_of_codes() -> None:
    with pytest.raises(ValueError, match=r"autoregressive\.condition\.kind=image: only diffusion .* use class or text"):
        build_network(MODEL, CARD | {"config": {"condition": {"kind": "image"}}})


def test_a_network_of_texts_is_counted_without_being_computed() -> None:
    with torch.device("meta"):
        network = build_network(MODEL, CARD | {"config": {"condition": {"kind": "text", "text": {"length": 32}}}})
    assert network.leading == 8  # of four bytes each
    codes, ids = torch.zeros(1, LENGTH, dtype=torch.int64), torch.zeros(1, 32, dtype=torch.int64)
    blocks = 2 * (8 + LENGTH) * (2 * 12 * 32**2 + 4 * (8 + LENGTH) * 32)
    ends = 2 * 32**2 + 2 * LENGTH * 32 * VOCAB  # the map of the summary, and the head
    assert forward_flops(network, codes, ids) == blocks + ends + forward_flops(network.text, ids)
