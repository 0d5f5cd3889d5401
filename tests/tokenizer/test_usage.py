"""Counts of the codes in use, over the last steps and over a window of tokens."""

import pytest
import torch

from tokenizer.usage import WINDOW_TOKENS, Usage, perplexity


def test_usage_counts_steps_without_a_choice() -> None:
    usage = Usage(3, codes_per_step=2)
    usage.update(torch.tensor([2, 0, 0]))
    usage.update(torch.tensor([0, 1, 0]))
    assert usage.waited.tolist() == [1, 0, 2]
    assert usage.share(1) == pytest.approx(1 / 3) and usage.share(2) == pytest.approx(2 / 3)


def test_a_code_expires_once_and_then_waits_anew_but_is_not_in_use() -> None:
    usage = Usage(2, codes_per_step=1)
    for _ in range(3):
        usage.update(torch.tensor([1, 0]))
    assert usage.expired(4).tolist() == [False, False]
    assert usage.expired(3).tolist() == [False, True]
    assert usage.expired(3).tolist() == [False, False]
    assert usage.share(100) == 0.5


def test_perplexity_of_even_and_single_use() -> None:
    assert perplexity(torch.full((8,), 5)) == pytest.approx(8)
    assert perplexity(torch.tensor([0, 9, 0])) == pytest.approx(1)


def test_running_figures_look_back_over_a_window_of_tokens() -> None:
    usage = Usage(4, codes_per_step=WINDOW_TOKENS // 4)
    usage.update(torch.tensor([0, 0, 0, 8]))
    for _ in range(4):
        usage.update(torch.tensor([4, 2, 2, 0]))
    fading = 8 * 0.75**4
    counts = sum(0.75**age for age in range(4)) * torch.tensor([4.0, 2, 2, 0]) + torch.tensor([0, 0, 0, fading])
    assert usage.dead() == 1
    assert usage.perplexity() == pytest.approx(perplexity(counts))


def test_the_counts_survive_a_restart() -> None:
    usage, again = Usage(4, codes_per_step=100), Usage(4, codes_per_step=100)
    for step in range(3):
        usage.update(torch.tensor([step, 1, 0, 0]))
    again.load_state_dict(usage.state_dict())
    assert again.perplexity() == usage.perplexity() and again.expired(3).tolist() == usage.expired(3).tolist()
