"""K-means start, usage counts and revival."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tokenizer.quantize import nearest, normalize
from tokenizer.revival import Usage, gather_rows, perplexity, revive, spherical_kmeans


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
    centroids = spherical_kmeans(vectors, 6, generator=generator())
    assert sorted((centroids @ centres.T).argmax(-1).tolist()) == list(range(6))
    assert (centroids @ centres.T).amax(-1).min() > 0.99
    assert torch.allclose(centroids.norm(dim=-1), torch.ones(6))


def test_kmeans_leaves_no_code_empty_where_vectors_differ() -> None:
    vectors = normalize(torch.randn(40, 4, generator=generator()))
    centroids = spherical_kmeans(vectors, 32, generator=generator(1), iterations=30)
    assert nearest(vectors, centroids).unique().numel() == 32


def test_kmeans_repeats_with_its_seed_and_survives_fewer_vectors_than_codes() -> None:
    _, vectors = clusters()
    first, again = (spherical_kmeans(vectors[:5], 9, generator=generator(3)) for _ in range(2))
    assert torch.equal(first, again) and first.isfinite().all()


def test_usage_counts_steps_without_a_choice() -> None:
    usage = Usage(3)
    usage.update(torch.tensor([2, 0, 0]))
    usage.update(torch.tensor([0, 1, 0]))
    assert usage.waited.tolist() == [1, 0, 2]
    assert usage.share(1) == pytest.approx(1 / 3) and usage.share(2) == pytest.approx(2 / 3)


def test_a_code_expires_once_and_then_waits_anew_but_is_not_in_use() -> None:
    usage = Usage(2)
    for _ in range(3):
        usage.update(torch.tensor([1, 0]))
    assert usage.expired(4).tolist() == [False, False]
    assert usage.expired(3).tolist() == [False, True]
    assert usage.expired(3).tolist() == [False, False]
    assert usage.share(100) == 0.5


def test_perplexity_of_even_and_single_use() -> None:
    assert perplexity(torch.full((8,), 5)) == pytest.approx(8)
    assert perplexity(torch.tensor([0, 9, 0])) == pytest.approx(1)


def trained_codebook() -> tuple[nn.Parameter, torch.optim.AdamW]:
    codebook = nn.Parameter(normalize(torch.randn(8, 4, generator=generator())))
    optimizer = torch.optim.AdamW([codebook], lr=0.1)
    codebook.square().sum().backward()
    optimizer.step()
    return codebook, optimizer


def test_revival_replaces_dead_rows_only_and_resets_their_moments() -> None:
    codebook, optimizer = trained_codebook()
    before, state = codebook.detach().clone(), optimizer.state[codebook]
    moments = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    dead = torch.tensor([True, False] * 4)
    vectors = normalize(torch.randn(50, 4, generator=generator(1)))
    revive(codebook, dead, vectors, optimizer, device=alone(), generator=generator(2))
    assert torch.equal(codebook[~dead], before[~dead])
    assert all((row == vectors).all(dim=1).any() for row in codebook[dead])
    for name, moment in moments.items():
        assert not state[name][dead].any() and moment[dead].any()
        assert torch.equal(state[name][~dead], moment[~dead])


def test_revival_repeats_with_its_seed() -> None:
    vectors = normalize(torch.randn(50, 4, generator=generator(1)))
    results = []
    for seed in (2, 2, 3):
        codebook, optimizer = trained_codebook()
        revive(codebook, torch.ones(8, dtype=torch.bool), vectors, optimizer, device=alone(), generator=generator(seed))
        results.append(codebook.detach())
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
