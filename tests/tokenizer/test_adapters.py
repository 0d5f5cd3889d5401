"""Every bottleneck under one contract, and those of vector-quantize-pytorch beside that library itself."""

import itertools
import sys
from typing import Any, get_args, get_type_hints

import pytest
import torch
import vector_quantize_pytorch as vqp
from torch import Tensor

from engine.flops import forward_flops
from tokenizer.adapters import Binary, FiniteScalar, Residual, Simple
from tokenizer.bottleneck import Bottleneck
from tokenizer.config import QuantizerConfig, TokenizerLossConfig, TokenizerModelConfig
from tokenizer.entropy import code_entropy
from tokenizer.quantize import Codebook, build_bottleneck

# What identifies each bottleneck: its configuration, its code_dim, its vocabulary.
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "codebook": ({}, 4, 32),
    "codebook-rotation": ({"gradient": "rotation"}, 4, 32),
    "codebook-ema": ({"update": "ema"}, 4, 32),
    "codebook-plain": ({"normalize": False}, 4, 32),
    "codebook-plain-rotation-ema": ({"normalize": False, "gradient": "rotation", "update": "ema"}, 4, 32),
    "kl": ({"kind": "kl"}, 4, 0),
    "fsq": ({"kind": "fsq", "levels": (8, 5, 4)}, 3, 160),
    "lfq": ({"kind": "lfq"}, 5, 32),
    "bsq": ({"kind": "bsq"}, 5, 32),
    "simvq": ({"kind": "simvq"}, 4, 32),
    "simvq-rotation": ({"kind": "simvq", "gradient": "rotation"}, 4, 32),
    "residual": ({"kind": "residual", "depth": 3}, 4, 32),
}
ENTROPY = TokenizerLossConfig(entropy=0.1, entropy_temperature=0.5)


def built(name: str) -> Bottleneck:
    settings, dim, vocab_size = CASES[name]
    torch.manual_seed(0)
    model = TokenizerModelConfig(code_dim=dim, vocab_size=vocab_size or 2)
    bottleneck = build_bottleneck(model, QuantizerConfig(**settings), ENTROPY)
    if isinstance(bottleneck, Residual):  # the library's codes start too small to leave anything over
        with torch.no_grad():
            bottleneck.books.normal_(std=0.5)
    return bottleneck


def inputs(bottleneck: Bottleneck) -> Tensor:
    return torch.randn(2, 7, bottleneck.input_dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
def test_shapes_types_and_names(name: str) -> None:
    bottleneck = built(name)
    z = inputs(bottleneck).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantised, codes, losses, stats = bottleneck(z)
    assert bottleneck.vocab_size == CASES[name][2] and bottleneck.latent_dim == CASES[name][1]
    assert quantised.shape == stats["vectors"].shape == (2, 7, bottleneck.latent_dim)
    assert quantised.dtype == stats["vectors"].dtype == torch.float32 and not stats["vectors"].requires_grad
    assert losses.keys() <= {"codebook", "commitment", "entropy", "kl"}
    assert all(loss.shape == () and loss.dtype == torch.float32 for loss in losses.values())
    if codes is not None:
        assert codes.dtype == torch.int64 and codes.shape == (2, 7 * bottleneck.codes_per_token)
        assert 0 <= codes.min() and codes.max() < bottleneck.vocab_size
    (gradient,) = torch.autograd.grad(quantised.square().sum() + sum(losses.values()), z)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in CASES if name != "kl"])
def test_latents_find_the_codes_and_codes_the_vectors_of_the_forward_pass(name: str) -> None:
    bottleneck = built(name).eval()
    z = inputs(bottleneck)
    quantised, codes, losses, _ = bottleneck(z)
    latents = bottleneck.latents(z)
    assert torch.equal(bottleneck.nearest(latents), codes)
    assert torch.allclose(bottleneck.lookup(codes), quantised, atol=1e-5)
    assert torch.allclose(bottleneck.snap(latents), quantised, atol=1e-5)
    assert "entropy" not in losses


@pytest.mark.parametrize("name", [name for name in CASES if name != "kl"])
def test_training_and_evaluation_choose_alike_and_nothing_moves_or_is_random(name: str) -> None:
    bottleneck = built(name)
    z, state = inputs(bottleneck), {key: value.clone() for key, value in bottleneck.state_dict().items()}
    generator = torch.get_rng_state()
    first, again = bottleneck.train()(z), bottleneck(z)
    evaluated = bottleneck.eval()(z)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and torch.equal(first[1], evaluated[1])
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[key]) for key, value in bottleneck.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_a_bottleneck_built_without_values_computes_as_before_once_it_is_loaded(name: str) -> None:
    settings, dim, vocab_size = CASES[name]
    bottleneck = built(name).eval()
    with torch.device("meta"):
        model = TokenizerModelConfig(code_dim=dim, vocab_size=vocab_size or 2)
        empty = build_bottleneck(model, QuantizerConfig(**settings)).eval()
    products = forward_flops(empty, torch.zeros(2, 7, bottleneck.input_dim, device="meta"))
    assert products > 0 or name in ("kl", "fsq", "lfq", "bsq")
    empty.load_state_dict(bottleneck.state_dict(), assign=True)
    z = inputs(bottleneck)
    assert torch.equal(empty.to("cpu")(z)[0], bottleneck(z)[0])


@pytest.mark.parametrize("levels", [(3, 3), (8, 5, 4), (8, 8, 8, 6, 5), (7, 5, 5, 5, 5)])
def test_fsq_codes_and_their_vectors_are_one_to_one_and_every_code_is_reached(levels: tuple[int, ...]) -> None:
    bottleneck = FiniteScalar(levels)
    codes = torch.arange(bottleneck.vocab_size)[None]
    vectors = bottleneck.lookup(codes)
    assert torch.equal(bottleneck.nearest(vectors), codes)
    assert vectors[0].unique(dim=0).shape[0] == bottleneck.vocab_size and vectors.abs().max() <= 1
    grids = [torch.linspace(-4, 4, 60) for _ in levels[:2]]
    z = torch.zeros(1, 3600, len(levels))
    z[0, :, :2] = torch.cartesian_prod(*grids)
    assert bottleneck(z)[1].unique().numel() == levels[0] * levels[1]


def test_fsq_takes_what_a_diffusion_model_may_give_beyond_the_levels() -> None:
    bottleneck = FiniteScalar((8, 5))
    assert bottleneck.snap(torch.tensor([[[9.0, 9.0], [-9.0, -9.0]]])).tolist() == [[[0.75, 1.0], [-1.0, -1.0]]]


def test_fsq_is_the_library_s_in_values_codes_and_gradients() -> None:
    levels = (8, 5, 4)
    bottleneck, peer = FiniteScalar(levels), vqp.FSQ(levels=list(levels))
    mine, theirs = ((3 * inputs(bottleneck)).requires_grad_() for _ in range(2))
    quantised, codes, _, _ = bottleneck(mine)
    expected, indices = peer(theirs)
    assert torch.allclose(quantised, expected, atol=1e-6) and torch.equal(codes, indices.long())
    weights = torch.randn(quantised.shape)
    gradients = (torch.autograd.grad(*pair, weights)[0] for pair in ((quantised, mine), (expected, theirs)))
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("levels", [(), (8, 2)])
def test_fsq_refuses_levels_that_it_cannot_round_to(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"quantizer\.levels=\[.*at least 3"):
        FiniteScalar(levels)


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_bits_and_losses_are_the_library_s(name: str) -> None:
    bottleneck = built(name)
    peer = vqp.LFQ(dim=5, spherical=name == "bsq", commitment_loss_weight=1.0)
    mine, theirs = (inputs(bottleneck).requires_grad_() for _ in range(2))
    quantised, codes, losses, _ = bottleneck(mine)
    (expected, indices, _), parts = peer(theirs, inv_temperature=1 / 0.5, return_loss_breakdown=True)
    assert torch.allclose(quantised, expected, atol=1e-6) and torch.equal(codes, indices.long())
    assert torch.allclose(losses["commitment"], parts.commitment, atol=1e-6)
    assert torch.allclose(losses["entropy"], parts.per_sample_entropy - parts.batch_entropy, atol=1e-4)
    for ours, other in ((quantised.sum(), expected.sum()), (losses["commitment"], parts.commitment)):
        gradients = (torch.autograd.grad(*pair, retain_graph=True)[0] for pair in ((ours, mine), (other, theirs)))
        assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize(("name", "length"), [("lfq", 5**0.5), ("bsq", 1.0)])
def test_bits_spell_all_sign_vectors(name: str, length: float) -> None:
    bottleneck = built(name)
    vectors = bottleneck.lookup(torch.arange(32)[None])[0]  # [32, 5]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)))
    assert torch.equal(vectors.sign(), signs)
    assert torch.allclose(vectors.norm(dim=1), torch.tensor(length))


def test_bits_have_no_entropy_loss_without_a_weight() -> None:
    assert Binary(4, QuantizerConfig(kind="lfq"))(torch.randn(1, 3, 4))[2].keys() == {"commitment"}


def test_the_entropy_of_bits_is_that_of_their_whole_codebook() -> None:
    bottleneck = built("bsq")
    z = inputs(bottleneck)
    book = bottleneck.lookup(torch.arange(32)[None])[0]
    expected = code_entropy(bottleneck.latents(z), book, temperature=0.5, unit=True)
    assert torch.allclose(bottleneck(z)[2]["entropy"], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["simvq", "simvq-rotation"])
def test_simvq_is_the_library_s(name: str) -> None:
    bottleneck = built(name)
    assert isinstance(bottleneck, Simple)
    peer = vqp.SimVQ(dim=4, codebook_size=32, rotation_trick=name == "simvq-rotation")
    peer.load_state_dict(bottleneck.simvq.state_dict())
    mine, theirs = (inputs(bottleneck).requires_grad_() for _ in range(2))
    quantised, codes, losses, _ = bottleneck(mine)
    expected, indices, loss = peer(theirs)
    assert torch.allclose(quantised, expected, atol=1e-5) and torch.equal(codes, indices)
    assert torch.allclose(losses["codebook"] + 0.25 * losses["commitment"], loss)
    weights = torch.randn(quantised.shape)
    gradients = (torch.autograd.grad(*pair, weights)[0] for pair in ((quantised, mine), (expected, theirs)))
    assert torch.allclose(*gradients, atol=1e-5)


def test_simvq_learns_the_map_and_never_the_vectors() -> None:
    bottleneck = built("simvq")
    assert {name for name, _ in bottleneck.named_parameters()} == {"simvq.code_transform.weight"}
    sum(bottleneck(inputs(bottleneck))[2].values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in bottleneck.parameters())


def test_residual_codes_and_sums_are_the_library_s() -> None:
    bottleneck = built("residual")
    z = inputs(bottleneck)
    quantised, codes, _, _ = bottleneck(z)
    rvq = vqp.ResidualVQ(dim=4, num_quantizers=3, codebook_size=32).eval()
    for layer, book in zip(rvq.layers, bottleneck.books.detach(), strict=True):
        layer._codebook.embed.copy_(book[None])
    expected, indices, _ = rvq(z)
    assert torch.allclose(quantised, expected, atol=1e-5)
    assert torch.equal(codes, indices.flatten(1))  # a token's codes side by side
    assert torch.allclose(bottleneck.lookup(codes), rvq.get_output_from_indices(indices), atol=1e-6)


def test_residual_losses_in_closed_form_and_each_moves_its_own_side() -> None:
    bottleneck = built("residual")
    z = inputs(bottleneck).requires_grad_()
    losses, codes = bottleneck(z)[2], bottleneck(z)[1].unflatten(1, (-1, 3))
    rest, expected = z.detach(), []
    for depth in range(3):
        rest = rest - bottleneck.books[depth][codes[..., depth]]
        expected.append(rest.square().mean())
    for loss in losses.values():  # what is left over after each code, for the code and for the vector alike
        assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-6)
    to_z, to_books = torch.autograd.grad(losses["codebook"], [z, bottleneck.books], allow_unused=True)
    assert to_z is None and (to_books.abs().sum(dim=(1, 2)) > 0).all()
    to_z, to_books = torch.autograd.grad(losses["commitment"], [z, bottleneck.books], allow_unused=True)
    assert to_z.abs().sum() > 0 and to_books is None


def test_every_kind_is_built_from_the_configuration() -> None:
    kinds = {settings.get("kind", "codebook") for settings, _, _ in CASES.values()}
    assert kinds == set(get_args(get_type_hints(QuantizerConfig)["kind"]))
    assert isinstance(built("codebook"), Codebook)


@pytest.mark.parametrize("name", ["fsq", "lfq", "bsq", "simvq", "residual"])
def test_a_missing_library_is_named_with_its_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ValueError, match=rf"quantizer\.kind={name} needs .*tokenloom\[quantizers\]"):
        built(name)
