"""Nearest codes: brute force, tiles, ties, both geometries."""

import pytest
import torch
from torch import Tensor

from tokenizer import similarity
from tokenizer.similarity import first_largest, nearest, normalize, rows_at_once


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(draws(*shape, seed=seed))


def test_nearest_is_the_smallest_distance_by_brute_force() -> None:
    vectors, book = unit(50, 4), unit(30, 4, seed=1)
    distances = (vectors[:, None] - book[None]).square().sum(-1)
    assert torch.equal(nearest(vectors, book), distances.argmin(-1))


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_nearest_of_any_length_is_the_smallest_euclidean_distance(shift: float) -> None:
    """Also where all vectors lie far out in one direction, in which float32 products would cancel."""
    vectors, book = draws(2, 200, 4) + shift, 0.5 * draws(64, 4, seed=1) + shift
    distances = (vectors.double()[..., None, :] - book.double()).square().sum(-1)
    assert torch.equal(nearest(vectors, book, unit=False), distances.argmin(-1))


@pytest.mark.parametrize("limit", [1, 30, 100, 149, 10**6])
def test_chunks_give_what_the_whole_gives(limit: int) -> None:
    vectors, book = unit(5, 7, 4), unit(30, 4, seed=1)
    assert torch.equal(nearest(vectors, book, max_similarities=limit), (vectors @ book.T).argmax(-1))


@pytest.mark.parametrize("num_codes", [8, 30, 40, 64, 1000, 4096])
def test_the_two_stage_maximum_is_the_argmax_of_the_whole_matrix_ties_included(num_codes: int) -> None:
    vectors, book = unit(300, 8), unit(num_codes, 8, seed=1).repeat(2, 1)
    assert torch.equal(nearest(vectors, book), (vectors @ book.T).argmax(-1))
    coarse = (vectors @ book.T).mul(4).round()
    assert torch.equal(first_largest(coarse), coarse.argmax(-1))


def test_not_a_number_is_found_where_argmax_finds_it() -> None:
    values = draws(4, 64)
    values[1, 20] = values[1, 40] = values[3, 63] = float("nan")
    assert torch.equal(first_largest(values), values.argmax(-1))


def test_no_tile_exceeds_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(similarity, "first_largest", lambda tile: sizes.append(tile.numel()) or first_largest(tile))
    nearest(unit(100, 4), unit(30, 4, seed=1), max_similarities=200)
    assert max(sizes) <= 200 and sum(sizes) == 100 * 30


def test_tiles_fit_the_cache_of_a_cpu_and_fill_a_gpu() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert rows_at_once(8192, cpu) == 128 and rows_at_once(8192, gpu) == 2048
    assert rows_at_once(2**18, cpu) == 64 and rows_at_once(2**26, cpu) == 1


def test_no_vectors_have_no_codes() -> None:
    assert nearest(unit(0, 4), unit(64, 4)).shape == (0,)
