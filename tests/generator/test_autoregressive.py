"""VIM and the generator around it: causality, caches, seeds, labels, sizes, learning."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.config import to_dict
from generator.autoregressive import VIM, Autoregressive, build_network
from generator.config import AutoregressiveConfig, AutoregressiveModelConfig, AutoregressiveSampleConfig

sys.path.insert(0, str(Path(__file__).parent))
from gpt2 import vim_from_gpt2

MODEL = AutoregressiveModelConfig(preset="tiny", depth=2, width=32, heads=4, dropout=0.0)
CARD = {
    "config": {"model": to_dict(MODEL)}, "num_classes": 3, "class_names": ["a", "b", "c"], "grid": [2, 4],
    "vocab_size": 11, "tokenizer_fingerprint": "t", "fingerprint": "g",
}  # fmt: skip
VOCAB, LENGTH = 11, 8


def sharp_network(model: AutoregressiveModelConfig = MODEL, num_classes: int = 3) -> VIM:
    """An untrained network with large weights, so that its distributions are far from uniform."""
    torch.manual_seed(0)
    network = VIM(model, vocab_size=VOCAB, length=LENGTH, num_classes=num_classes, grid=CARD["grid"]).eval()
    for parameter in network.parameters():
        parameter.data.mul_(8 if parameter.ndim == 2 else 1)
    return network


@pytest.fixture(params=["vim", "modern"])
def generator(request: pytest.FixtureRequest) -> Autoregressive:
    model = dataclasses.replace(MODEL, block=request.param)
    return Autoregressive(sharp_network(model), CARD | {"config": {"model": to_dict(model)}}).eval()


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 3])


def test_logits_of_a_code_see_the_label_and_earlier_codes_alone(generator: Autoregressive, codes: torch.Tensor) -> None:
    before = generator.network(codes, LABELS)
    assert before.shape == (4, LENGTH, VOCAB)
    changed = codes.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % VOCAB
    after = generator.network(changed, LABELS)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:], atol=1e-2)
    relabelled = generator.network(codes, LABELS.flip(0))
    assert ((relabelled - before).abs().amax((1, 2)) > 1e-2).all()
    assert ((relabelled - before).abs().amax((0, 2)) > 1e-2).all()


@pytest.mark.parametrize("given", [0, 3])
def test_cached_logits_equal_full_forward_logits(generator: Autoregressive, codes: torch.Tensor, given: int) -> None:
    network, position = generator.network, torch.arange(LENGTH)
    caches = network.caches(len(codes))
    cached = [network.advance(codes[:, :given], LABELS, position[: given + 1], caches)]
    for step in range(given + 1, LENGTH):
        cached.append(network.advance(codes[:, step - 1 : step], None, position[step : step + 1], caches))
    full = network(codes, LABELS)
    torch.testing.assert_close(torch.stack(cached, dim=1), full[:, given:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("complete", [False, True])
def test_cached_logits_on_windows_of_the_cache_equal_full_forward_logits(
    generator: Autoregressive, codes: torch.Tensor, complete: bool
) -> None:
    network, position = generator.network, torch.arange(LENGTH)
    caches, full, given = network.caches(2 * len(codes)), network(codes, LABELS), 3

    def advance(start: int, stop: int, labels: torch.Tensor | None) -> torch.Tensor:
        window = stop if complete else min(LENGTH, stop + 2)
        one = complete and stop == start + 1
        views = [cache.view(rows=slice(4, 8), window=window, complete=one) for cache in caches]
        return network.advance(codes[:, max(0, start - 1) : stop - 1], labels, position[start:stop], views)

    cached = [advance(0, given + 1, LABELS), *(advance(step, step + 1, None) for step in range(given + 1, LENGTH))]
    torch.testing.assert_close(torch.stack(cached, dim=1), full[:, given:], atol=1e-5, rtol=1e-5)


def test_greedy_samples_are_the_argmax_of_the_full_forward(generator: Autoregressive) -> None:
    labels = torch.tensor([0, 1, 2])
    codes = generator.sample(labels, [0, 1, 2], temperature=0)
    assert torch.equal(codes, generator.network(codes, labels).argmax(-1))


@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0}, {"top_k": 5, "top_p": 0.9, "guidance": 1.5}])
def test_a_sample_depends_on_its_seed_and_label_alone(generator: Autoregressive, settings: dict) -> None:
    labels, seeds = torch.arange(9) % 3, list(range(100, 109))
    together = generator.sample(labels, seeds, **settings)
    parts = ([0], [1, 2, 3], [8, 7])
    pieces = [generator.sample(labels[rows], [seeds[row] for row in rows], **settings) for rows in parts]
    assert torch.equal(torch.cat(pieces), together[[0, 1, 2, 3, 8, 7]])
    assert len(together.unique(dim=0)) > 5


def test_guidance_one_is_plain_sampling_and_more_follows_the_formula(generator: Autoregressive) -> None:
    labels, seeds = torch.tensor([0, 1, 2]), [5, 6, 7]
    assert torch.equal(generator.sample(labels, seeds, guidance=1.0), generator.sample(labels, seeds))
    codes = generator.sample(labels, seeds, temperature=0, guidance=3.0)
    conditional, null = generator.network(codes, labels), generator.network(codes, torch.full((3,), 3))
    assert torch.equal((null + 3 * (conditional - null)).argmax(-1), codes)


def test_a_prefix_is_kept_and_continued_as_the_sample_would_go_on(generator: Autoregressive) -> None:
    labels, seeds = torch.tensor([0, 1]), [5, 6]
    codes = generator.sample(labels, seeds)
    assert torch.equal(generator.sample(labels, seeds, prefix=codes[:, :5]), codes)
    with pytest.raises(ValueError, match=r"prefix of shape \(2, 8\)"):
        generator.sample(labels, seeds, prefix=codes)


def test_a_stream_tells_every_code_as_it_is_drawn(generator: Autoregressive) -> None:
    labels, seeds = torch.tensor([0, 1]), [5, 6]
    whole = generator.sample(labels, seeds, guidance=1.5)
    told = [(done, codes.clone()) for done, codes in generator.stream(labels, seeds, guidance=1.5)]
    assert [done for done, _ in told] == list(range(1, LENGTH + 1))
    assert all(torch.equal(codes[:, :done], whole[:, :done]) for done, codes in told)
    rest = [done for done, _ in generator.stream(labels, seeds, prefix=whole[:, :5])]
    assert rest == [6, 7, 8]


def test_a_stream_refuses_at_the_call(generator: Autoregressive) -> None:
    with pytest.raises(ValueError, match=r"label 3 must be 0 \.\. 2"):
        generator.stream(torch.tensor([3]), [0])
    with pytest.raises(ValueError, match=r"temperature=-1"):
        generator.stream(None, [0], temperature=-1)
    for draw in (generator.sample, generator.stream):
        with pytest.raises(ValueError, match=r"sample\.precision='fp8' must be one of fp32, bf16"):
            draw(None, [0], precision="fp8")
        with pytest.raises(ValueError, match=r"guidance_schedule='step' must be one of constant, linear, cosine"):
            draw(None, [0], guidance_schedule="step")
        with pytest.raises(ValueError, match=r"autoregressive\.sample\.tempreature=2 is no setting; .* temperature, "):
            draw(None, [0], tempreature=2)


def test_bf16_is_refused_where_hardware_has_none(generator: Autoregressive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.device.has_bf16", lambda _: False)
    with pytest.raises(ValueError, match=r"autoregressive\.sample\.precision=bf16, but this cpu has no bf16 .* fp32"):
        generator.stream(None, [0], precision="bf16")
    generator.sample(None, [0], precision="fp32")


def test_bf16_decodes_with_a_copy_and_leaves_the_network_alone(
    generator: Autoregressive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.device.has_bf16", lambda _: True)  # in software it is but slow
    labels, seeds = torch.tensor([0, 1, 2]), [5, 6, 7]
    before = generator.sample(labels, seeds, temperature=0)
    half = generator.sample(labels, seeds, temperature=0, precision="bf16")
    assert (half == before).double().mean() > 0.8
    assert {parameter.dtype for parameter in generator.parameters()} == {torch.float32}
    assert torch.equal(generator.sample(labels, seeds, temperature=0), before)
    generator.network.head.weight.data.neg_()  # in training the weights change from call to call
    changed = generator.sample(labels, seeds, temperature=0, precision="bf16")
    assert (changed == generator.sample(labels, seeds, temperature=0)).double().mean() > 0.8
    assert (changed == half).double().mean() < 0.5


def test_fp32_decodes_a_half_precision_network_in_fp32(generator: Autoregressive) -> None:
    half = generator.bfloat16()
    expected = Autoregressive.from_card(half.card, {k: v.float() for k, v in half.network.state_dict().items()})
    assert torch.equal(half.sample(None, [1, 2]), expected.sample(None, [1, 2]))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_randomised_generator_depends_on_its_seed_alone(generator: Autoregressive, codes: torch.Tensor) -> None:
    state, before = torch.get_rng_state(), generator.nll(codes, LABELS - 1)
    first, again, other = (generator.randomised(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(generator.nll(codes, LABELS - 1), before)
    assert (first.fingerprint, other.fingerprint, generator.fingerprint) == ("random-1", "random-2", "g")
    deep = [each.features(codes, ["block2"])["block2"] for each in (first, again, other)]
    assert torch.equal(deep[0], deep[1])
    assert not torch.allclose(deep[0], deep[2], atol=1e-3)
    names = {name: weight.shape for name, weight in generator.network.state_dict().items()}
    assert {name: weight.shape for name, weight in first.network.state_dict().items()} == names
    assert first.network.code_embedding.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not first.training and not any(parameter.requires_grad for parameter in first.parameters())


def test_no_label_means_the_null_label(generator: Autoregressive) -> None:
    assert torch.equal(generator.sample(None, [1, 2]), generator.sample(torch.tensor([-1, -1]), [1, 2]))
    assert not torch.equal(generator.sample(None, [1, 2]), generator.sample(torch.tensor([0, 0]), [1, 2]))


def test_wrong_labels_and_codes_are_named_with_their_range(generator: Autoregressive, codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"label 3 must be 0 \.\. 2"):
        generator.sample(torch.tensor([0, 3]), [0, 1])
    with pytest.raises(ValueError, match="1 labels for 2 samples"):
        generator.sample(torch.tensor([0]), [0, 1])
    with pytest.raises(ValueError, match=r"code 11 is out of the vocabulary 0 \.\. 10"):
        generator.features(torch.full_like(codes, 11), ["block1"])
    with pytest.raises(ValueError, match=r"code -1 is out of the vocabulary 0 \.\. 10"):
        generator.nll(torch.full_like(codes, -1), LABELS - 1)
    with pytest.raises(ValueError, match="T at most 8"):
        generator.features(codes.repeat(1, 2), ["block1"])
    with pytest.raises(ValueError, match="tap='block9' must be one of block1, block2"):
        generator.features(codes, ["block9"])


def test_an_unconditional_generator_knows_one_start_token(codes: torch.Tensor) -> None:
    generator = Autoregressive(sharp_network(num_classes=0), CARD | {"num_classes": 0, "class_names": []}).eval()
    assert generator.network.label_embedding.num_embeddings == 1
    assert generator.sample(None, [0, 1]).shape == (2, LENGTH)
    torch.testing.assert_close(generator.nll(codes, LABELS), generator.nll(codes, torch.full((4,), -1)))
    with pytest.raises(ValueError, match=r"guidance=2\.0"):
        generator.sample(None, [0], guidance=2.0)
    with pytest.raises(ValueError, match="knows no classes"):
        generator.sample(torch.tensor([0]), [0])


def test_guidance_needs_a_trained_null_label() -> None:
    config = to_dict(AutoregressiveModelConfig(preset="tiny", label_dropout=0.0))
    generator = Autoregressive(sharp_network(), CARD | {"config": {"model": config}})
    with pytest.raises(ValueError, match="label_dropout above 0"):
        generator.sample(torch.tensor([0]), [0], guidance=2.0)


def test_features_average_the_stream_after_a_block(generator: Autoregressive, codes: torch.Tensor) -> None:
    caught = []
    handle = generator.network.blocks[0].register_forward_hook(lambda *args: caught.append(args[2]))
    generator.network(codes, torch.full((4,), 3))
    handle.remove()
    features = generator.features(codes, ["block1", "block2"])
    assert features["block1"].shape == (4, 32)
    torch.testing.assert_close(features["block1"], caught[0].mean(1))
    assert not torch.allclose(features["block1"], features["block2"])


def test_features_at_several_taps_are_those_of_each_from_one_pass(
    generator: Autoregressive, codes: torch.Tensor
) -> None:
    passes: list[int] = []
    for number, block in enumerate(generator.network.blocks, start=1):
        block.register_forward_hook(lambda *args, number=number: passes.append(number))
    both = generator.features(codes, ["block2", "block1"])
    assert passes == [1, 2] and both.keys() == {"block1", "block2"}
    for tap, found in both.items():
        assert torch.equal(found, generator.features(codes, [tap])[tap]) and not found.requires_grad
    passes.clear()
    generator.features(codes, ["block1", "block1"])
    assert passes == [1]  # no further than the deepest tap
    assert generator.features(codes, []) == {}
    with pytest.raises(ValueError, match="tap='block0' must be one of block1, block2"):
        generator.features(codes, ["block1", "block0"])


def test_nll_is_the_summed_cross_entropy(generator: Autoregressive, codes: torch.Tensor) -> None:
    labels = torch.tensor([0, 1, 2, -1])
    logits = generator.network(codes, LABELS)
    expected = [F.cross_entropy(row, target, reduction="sum") for row, target in zip(logits, codes, strict=True)]
    torch.testing.assert_close(generator.nll(codes, labels), torch.stack(expected))


def test_likelihoods_of_all_sequences_sum_to_one() -> None:
    torch.manual_seed(0)
    network = VIM(MODEL, vocab_size=3, length=4, num_classes=1).eval()
    card = CARD | {"num_classes": 1, "class_names": ["a"]}
    every = torch.cartesian_prod(*[torch.arange(3)] * 4)
    nats = Autoregressive(network, card).nll(every, torch.zeros(len(every), dtype=torch.int64))
    assert float((-nats.double()).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_from_card_rebuilds_the_network(generator: Autoregressive, codes: torch.Tensor) -> None:
    rebuilt = Autoregressive.from_card(generator.card, generator.network.state_dict())
    assert (rebuilt.fingerprint, rebuilt.tokenizer_fingerprint, rebuilt.num_classes) == ("g", "t", 3)
    assert not rebuilt.training
    assert torch.equal(rebuilt.network(codes, LABELS), generator.network(codes, LABELS))


def test_from_card_takes_weights_that_are_not_folded_yet(codes: torch.Tensor) -> None:
    network = build_network(MODEL, CARD, random_order=True).eval()
    rebuilt = Autoregressive.from_card(CARD, network.state_dict()).network
    assert torch.equal(rebuilt(codes, LABELS), network(codes, LABELS))
    assert build_network(MODEL, CARD).source_embedding is None


def test_a_card_from_before_the_modern_block_has_the_published_one() -> None:
    old = {key: value for key, value in to_dict(MODEL).items() if key != "block"}
    network = build_network(AutoregressiveModelConfig(**old), CARD)
    assert network.rotary is None and isinstance(network.norm, torch.nn.LayerNorm)


def test_the_modern_block_takes_rows_and_columns_from_the_card() -> None:
    modern = dataclasses.replace(MODEL, block="modern")
    rotary = build_network(modern, CARD | {"codes_per_token": 2}).rotary
    assert (rotary.columns, rotary.codes_per_cell, rotary.head_dim) == (4, 2, 8)
    with pytest.raises(ValueError, match=r"grid=None: autoregressive\.model\.block=modern needs the rows"):
        VIM(modern, vocab_size=VOCAB, length=LENGTH, num_classes=0)


@pytest.mark.parametrize("block", ["vim", "modern"])
def test_dropout_is_off_in_eval_mode(codes: torch.Tensor, block) -> None:
    network = sharp_network(dataclasses.replace(MODEL, depth=1, dropout=0.3, block=block)).train()
    assert not torch.equal(network(codes, LABELS), network(codes, LABELS))
    network.eval()
    assert torch.equal(network(codes, LABELS), network(codes, LABELS))


@pytest.mark.parametrize("block", ["vim", "modern"])
@pytest.mark.parametrize("preset", ["tiny", "mini", "small", "base", "vim-base", "vim-large"])
def test_presets_have_the_parameters_of_their_shape(preset, block) -> None:
    model = AutoregressiveModelConfig(preset=preset, block=block)
    depth, width, heads = model.shape
    with torch.device("meta"):
        network = VIM(model, vocab_size=8192, length=1024, num_classes=1000, grid=(32, 32))
    hidden = math.ceil(8 * width / 3 / 64) * 64
    layers = {"vim": 12 * width**2 + 13 * width, "modern": 4 * width**2 + 3 * width * hidden + 2 * width}[block]
    layers += {"vim": 0, "modern": 2 * width // heads}[block]
    tables = (8192 + 1024 + 1001 + 8192) * width + {"vim": 2, "modern": 1}[block] * width
    assert sum(parameter.numel() for parameter in network.parameters()) == depth * layers + tables


@pytest.mark.parametrize(("preset", "millions", "told"), [("vim-base", 708, 650), ("vim-large", 1851, 1697)])
def test_vim_presets_are_near_the_papers_sizes(preset, millions: int, told: int) -> None:
    """`told` is second-hand; it is less than the matrices of the blocks alone, 12 width^2 each (680 M, 1812 M)."""
    with torch.device("meta"):
        network = VIM(AutoregressiveModelConfig(preset=preset), vocab_size=8192, length=1024, num_classes=1000)
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert parameters == pytest.approx(millions, abs=1) and parameters == pytest.approx(told, rel=0.1)


def test_single_numbers_replace_those_of_a_preset() -> None:
    assert AutoregressiveModelConfig(preset="vim-base", depth=3).shape == (3, 1536, 16)
    with pytest.raises(ValueError, match=r"model\.width=30 must be a multiple of autoregressive\.model\.heads=4"):
        AutoregressiveModelConfig(preset="tiny", width=30)
    with pytest.raises(ValueError, match=r"autoregressive\.model\.depth=0"):
        AutoregressiveModelConfig(depth=0)


def test_heads_that_cannot_turn_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.block=modern .* a head has 6 .* multiple of 4, or block=vim"):
        AutoregressiveModelConfig(preset="tiny", width=24, heads=4, block="modern")


@pytest.mark.parametrize(("settings", "message"), [
    ({"guidance_power": 0.0, "guidance_schedule": "cosine"}, r"guidance_power=0\.0 must be above 0"),
    ({"guidance_power": 2.0}, r"guidance_power=2\.0 needs guidance_schedule=cosine: constant has no power"),
    ({"guidance_start": 0.5, "guidance_stop": 0.5}, r"guidance_start=0\.5 must lie below guidance_stop=0\.5"),
    ({"guidance_stop": 1.5}, r"guidance_stop=1\.5, both in \[0, 1\]"),
])  # fmt: skip
def test_impossible_guidance_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoregressiveSampleConfig(**settings)


@pytest.mark.parametrize("length", [1, 7, 16])
def test_logits_equal_those_of_transformers_gpt2(length: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.2)
    ours, codes = vim_from_gpt2(theirs, length), torch.randint(50, (3, length))
    prompted = torch.cat([torch.zeros(3, 1, dtype=torch.int64), codes[:, :-1]], dim=1)
    with torch.no_grad():
        expected = theirs(prompted).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(codes, torch.zeros(3, dtype=torch.int64)), expected, atol=1e-5, rtol=1e-5)


def test_it_learns_a_few_sequences_by_heart(codes: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = VIM(MODEL, vocab_size=VOCAB, length=LENGTH, num_classes=4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(network(codes, LABELS).flatten(0, 1), codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 < math.log(VOCAB)
    generator = Autoregressive(network.eval(), CARD | {"num_classes": 4, "class_names": list("abcd")})
    assert torch.equal(generator.sample(LABELS, [0, 0, 0, 0]), codes)


@pytest.mark.slow
def test_the_compiled_step_gives_the_same_samples(generator: Autoregressive) -> None:
    labels, seeds = torch.tensor([0, 1]), [1, 2]
    assert torch.equal(generator.sample(labels, seeds, compile=True), generator.sample(labels, seeds))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_draws_the_same_samples(generator: Autoregressive, compiled: bool) -> None:
    labels, seeds = torch.tensor([0, 1, 2]), [1, 2, 3]
    expected = generator.sample(labels, seeds, guidance=1.5)
    assert torch.equal(generator.cuda().sample(labels, seeds, guidance=1.5, compile=compiled).cpu(), expected)


def test_defaults_are_the_papers() -> None:
    config = AutoregressiveConfig()
    assert (config.model.dropout, config.train.betas, config.sample.temperature) == (0.1, (0.9, 0.96), 1.0)
