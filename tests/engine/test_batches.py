import numpy as np
import pytest
import torch

from engine.batches import Batches, StepRandom, augmentation_draws, global_indices, mix


class Rows:
    """A source whose sample i is the number i, with its draws."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        assert draws is not None
        return {"row": torch.from_numpy(indices), "draws": torch.from_numpy(draws)}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_parts(parts: int) -> None:
    batches = Batches(Rows(37), batch_size=8, seed=3)
    for step in (0, 4, 11):
        whole = batches.batch(step)
        pieces = [batches.batch(step, part, parts) for part in range(parts)]
        for key in whole:
            assert torch.equal(torch.cat([piece[key] for piece in pieces]), whole[key])


def test_every_epoch_visits_every_sample_once_in_an_order_of_its_own() -> None:
    stream = np.concatenate([global_indices(10, 4, 0, step) for step in range(5)])
    first, second = stream[:10], stream[10:]
    assert sorted(first) == list(range(10)) == sorted(second)
    assert list(first) != list(second)


def test_a_batch_may_be_larger_than_the_source() -> None:
    assert sorted(global_indices(3, 7, 0, 0)[:3]) == [0, 1, 2]


def test_other_seeds_and_steps_give_other_orders_and_draws() -> None:
    assert not np.array_equal(global_indices(1000, 64, 0, 0), global_indices(1000, 64, 1, 0))
    assert not np.array_equal(augmentation_draws(64, 0, 0), augmentation_draws(64, 0, 1))
    assert mix(0, 1) != mix(1, 0)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_stream_reads_ahead_in_order_and_starts_anywhere(workers: int) -> None:
    batches = Batches(Rows(20), batch_size=4, seed=0, workers=workers)
    stream = batches.stream(5, range(1, 3), 4)
    for step in (5, 6, 7):
        for part in (1, 2):
            assert torch.equal(next(stream)["row"], batches.batch(step, part, 4)["row"])
    stream.close()


@pytest.mark.parametrize("draw", ["normal", "uniform", "integers"])
def test_sample_i_meets_the_same_noise_however_the_batch_is_split(draw: str) -> None:
    def draws(part: int, parts: int) -> list[torch.Tensor]:
        rng = StepRandom(7, 3, 8, part=part, parts=parts)
        arguments = (5, 2) if draw == "integers" else (2,)
        return [getattr(rng, draw)(*arguments) for _ in range(3)]

    whole = draws(0, 1)
    split = [torch.cat(rows) for rows in zip(*(draws(part, 4) for part in range(4)), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True))
    assert not torch.equal(whole[0], whole[1])


def test_unequal_parts_and_empty_sources_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size=9 must be a multiple"):
        Batches(Rows(20), batch_size=9, seed=0).batch(0, 0, 2)
    with pytest.raises(ValueError, match="empty"):
        Batches(Rows(0), batch_size=9, seed=0)
