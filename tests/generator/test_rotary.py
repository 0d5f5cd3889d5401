"""Rotary positions in two dimensions, against complex multiplication and their invariances."""

import pytest
import torch

from generator.rotary import Rotary, rotate

HEAD_DIM, COLUMNS = 8, 4


@pytest.fixture
def rotary() -> Rotary:
    return Rotary(HEAD_DIM, columns=COLUMNS)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_label_stands_at_the_origin_and_codes_from_one_on(rotary: Rotary) -> None:
    places = rotary.coordinates(torch.arange(9))
    assert places.tolist() == [[0, 0], [1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [2, 3], [2, 4]]


def test_codes_of_a_cell_share_its_coordinates() -> None:
    places = Rotary(HEAD_DIM, columns=2, codes_per_cell=3).coordinates(torch.arange(13))
    assert places[1:].unique_consecutive(dim=0).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert places[1:4].unique(dim=0).tolist() == [[1, 1]] and places[0].tolist() == [0, 0]


def test_half_of_the_pairs_turn_with_the_row_and_half_with_the_column(rotary: Rotary) -> None:
    x, position = noise(2, 3, 5, HEAD_DIM), torch.tensor([0, 1, 7, 8, 3])
    row, column = rotary.coordinates(position).float().unbind(-1)
    frequencies = torch.tensor([1.0, 10000.0**-0.5])
    angles = torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], dim=-1)  # [5, d / 2]
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones(()), angles)
    torch.testing.assert_close(rotate(x, rotary(position)), torch.cat([pairs.real, pairs.imag], dim=-1))


def test_a_score_depends_on_the_distance_in_rows_and_columns_alone(rotary: Rotary) -> None:
    query, key = noise(1, 1, 1, HEAD_DIM), noise(1, 1, 1, HEAD_DIM, seed=1)

    def score(one: int, other: int) -> torch.Tensor:
        turned = [rotate(x, rotary(torch.tensor([at]))) for x, at in ((query, one), (key, other))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(6, 1), score(12, 7))  # one row down and one column right, from two places
    assert not torch.isclose(score(6, 1), score(5, 1)) and not torch.isclose(score(6, 1), score(2, 1))


def test_positions_of_each_sample_give_the_turns_of_each(rotary: Rotary) -> None:
    x, position = noise(2, 3, 4, HEAD_DIM), torch.tensor([[0, 3, 1, 2], [0, 8, 7, 5]])
    together = rotate(x, rotary(position))
    apart = [rotate(x[[row]], rotary(position[row])) for row in range(2)]
    assert torch.equal(together, torch.cat(apart))


def test_half_precision_is_turned_in_fp32_and_keeps_its_type(rotary: Rotary) -> None:
    x, position = noise(2, 3, 9, HEAD_DIM).bfloat16(), torch.arange(9)
    turned = rotate(x, rotary(position))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), rotary(position)).bfloat16())


def test_a_head_that_four_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim=6 must be a multiple of 4"):
        Rotary(6, columns=2)
