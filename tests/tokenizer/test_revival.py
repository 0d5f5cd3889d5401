"""K-means start and revival."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tokenizer.config import QuantizerConfig
from tokenizer.quantize import Codebook
from tokenizer.revival import gather_rows, kmeans, revive
from tokenizer.similarity import nearest, normalize


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alone() -> SimpleNamespace:
    return SimpleNamespace(rank=0, world=1, sum=lambda value: value)


def clusters(num: int = 6, each: int = 20) -> tuple[Tensor, Tensor]:
    """Unit centres, and unit vectors close to them."""
    centres = normalize(torch.eye(num))
    noise = 0.05 * torch.randn(num, each, num, generator=generator())
    return centres, normalize(centres[:, None] + noise).flatten(0, 1)


def test_kmeans_finds_separate_clusters() -> None:
    centres, vectors = clusters()
    centroids = kmeans(vectors, 6, spherical=True, generator=generator())
    assert sorted((centroids @ centres.T).argmax(-1).tolist()) == list(range(6))
    assert (centroids @ centres.T).amax(-1).min() > 0.99
    assert torch.allclose(centroids.norm(dim=-1), torch.ones(6))


def test_kmeans_leaves_no_code_empty_where_vectors_differ() -> None:
    vectors = normalize(torch.randn(40, 4, generator=generator()))
    centroids = kmeans(vectors, 32, spherical=True, generator=generator(1), iterations=30)
    assert nearest(vectors, centroids).unique().numel() == 32


def test_euclidean_kmeans_tells_lengths_apart_and_is_a_fixed_point() -> None:
    centres = torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 0.0], [0.0, 5.0]])
    vectors = (centres[:, None] + 0.1 * torch.randn(4, 25, 2, generator=generator())).flatten(0, 1)
    centroids = kmeans(vectors, 4, spherical=False, generator=generator())
    codes = nearest(vectors, centroids, unit=False)
    means = torch.stack([vectors[codes == code].mean(0) for code in range(4)])
    assert torch.allclose(centroids, means, atol=1e-5)
    assert sorted((centroids[:, None] - centres).norm(dim=-1).argmin(-1).tolist()) == [0, 1, 2, 3]


def test_euclidean_kmeans_leaves_no_code_empty_where_vectors_differ() -> None:
    vectors = torch.randn(40, 4, generator=generator())
    centroids = kmeans(vectors, 32, spherical=False, generator=generator(1), iterations=30)
    assert nearest(vectors, centroids, unit=False).unique().numel() == 32


def test_kmeans_repeats_with_its_seed_and_survives_fewer_vectors_than_codes() -> None:
    _, vectors = clusters()
    first, again = (kmeans(vectors[:5], 9, spherical=True, generator=generator(3)) for _ in range(2))
    assert torch.equal(first, again) and first.isfinite().all()


def trained(config: QuantizerConfig | None = None) -> tuple[Codebook, torch.optim.AdamW]:
    """A codebook of 8 codes after one step."""
    torch.manual_seed(0)
    quantizer = Codebook(8, 4, config or QuantizerConfig())
    optimizer = torch.optim.AdamW([quantizer.codebook], lr=0.1)
    if quantizer.codebook.requires_grad:
        quantizer.codebook.square().sum().backward()
        optimizer.step()
    return quantizer, optimizer


DEAD = torch.tensor([True, False] * 4)


def test_revival_replaces_dead_rows_only_and_resets_their_moments() -> None:
    quantizer, optimizer = trained()
    codebook = quantizer.codebook
    before, state = codebook.detach().clone(), optimizer.state[codebook]
    moments = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    vectors = normalize(torch.randn(50, 4, generator=generator(1)))
    revive(quantizer, DEAD, vectors, optimizer, device=alone(), generator=generator(2))
    assert torch.equal(codebook[~DEAD], before[~DEAD])
    assert all((row == vectors).all(dim=1).any() for row in codebook[DEAD])
    for name, moment in moments.items():
        assert not state[name][DEAD].any() and moment[DEAD].any()
        assert torch.equal(state[name][~DEAD], moment[~DEAD])


@pytest.mark.parametrize("unit", [True, False])
def test_a_revived_code_survives_the_next_moving_average(unit: bool) -> None:
    """Its average begins at the vector that replaced it; the other codes' averages go on."""
    quantizer, optimizer = trained(QuantizerConfig(update="ema", normalize=unit))
    quantizer.ema_update(torch.full((8,), 3.0), 3 * quantizer.codebook)
    going_on = quantizer.ema_sums[~DEAD].clone()
    vectors = quantizer.latents(torch.randn(50, 4, generator=generator(1)))
    revive(quantizer, DEAD, vectors, optimizer, device=alone(), generator=generator(2))
    revived = quantizer.codebook.detach().clone()
    assert all((row == vectors).all(dim=1).any() for row in revived[DEAD])
    assert torch.equal(quantizer.ema_sums[~DEAD], going_on)
    quantizer.ema_update(torch.zeros(8), torch.zeros(8, 4))
    assert torch.allclose(quantizer.codebook[DEAD], revived[DEAD], atol=1e-3)


def test_revival_repeats_with_its_seed() -> None:
    vectors = normalize(torch.randn(50, 4, generator=generator(1)))
    results = []
    for seed in (2, 2, 3):
        quantizer, optimizer = trained()
        every = torch.ones(8, dtype=torch.bool)
        revive(quantizer, every, vectors, optimizer, device=alone(), generator=generator(seed))
        results.append(quantizer.codebook.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_rows_are_gathered_from_all_processes() -> None:
    """Every process contributes the rows that it holds; the sum over processes is the global choice."""
    vectors = torch.randn(3, 4, 2, generator=generator())  # [processes, N, D]
    wanted = torch.tensor([11, 0, 5, 5, 8])
    parts = [
        gather_rows(vectors[rank], wanted, SimpleNamespace(rank=rank, world=3, sum=lambda value: value))
        for rank in range(3)
    ]
    assert torch.equal(sum(parts), vectors.flatten(0, 1)[wanted])
