"""Warnings: once per lapse, after enough steps in a row, with a remedy; none while all is well."""

import pytest

from tokenizer.guard import PATIENCE, Guard


def test_a_collapsed_codebook_is_told_once_with_a_remedy() -> None:
    guard = Guard()
    for step in range(PATIENCE - 1):
        assert guard.after_step(step, {"usage": 0.02}) == []
    with pytest.warns(UserWarning, match=r"collapsed, .*now 2\.0%.*tokenizer\.model\.code_dim"):
        assert len(guard.after_step(PATIENCE, {"usage": 0.02})) == 1
    assert guard.after_step(PATIENCE + 1, {"usage": 0.02}) == []


def test_a_lapse_must_be_uninterrupted() -> None:
    guard = Guard()
    for step in range(3 * PATIENCE):
        usage = 0.5 if step % (PATIENCE - 1) == 0 else 0.01
        assert guard.after_step(step, {"usage": usage}) == []


def test_few_tokens_cannot_use_many_codes() -> None:
    guard = Guard(reachable=0.1)
    for step in range(2 * PATIENCE):
        assert guard.after_step(step, {"usage": 0.02}) == []


def test_a_winning_discriminator_is_told() -> None:
    guard, metrics = Guard(), {"usage": 0.9, "discriminator_accuracy": 0.999}
    for step in range(PATIENCE - 1):
        guard.after_step(step, metrics)
    with pytest.warns(UserWarning, match=r"tells 100% of the images apart.*tokenizer\.discriminator\.r1"):
        guard.after_step(PATIENCE, metrics)
