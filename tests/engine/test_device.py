from collections.abc import Iterator

import pytest
import torch

from engine import device
from engine.config import RunConfig
from engine.device import choose_precision, cpu_quota, exact_products, gathered, has_bf16, setup


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for capable, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(device, "has_bf16", lambda _, capable=capable: capable)
        assert choose_precision("auto", cpu) == precision
        assert choose_precision("fp32", cpu) == "fp32"
    with pytest.raises(ValueError, match=r"run\.precision=bf16, but this cpu"):
        choose_precision("bf16", cpu)


def test_autocast_computes_in_the_chosen_precision() -> None:
    cpu = setup(RunConfig(device="cpu", precision="fp32", threads=1))
    x = torch.ones(4, 4)
    with cpu.autocast():
        assert (x @ x).dtype == torch.float32
    cpu.precision = "bf16"
    with cpu.autocast():
        assert (x @ x).dtype == torch.bfloat16


def test_what_is_not_sharded_needs_no_gathering() -> None:
    layer = torch.nn.Linear(2, 2)
    before = dict(vars(layer))
    with gathered(layer, "extra_repr"):
        assert vars(layer) == before


@pytest.fixture
def reduced() -> Iterator[None]:
    """Products and convolutions may be TF32, as on a GPU."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def settings() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("reduced")
@pytest.mark.parametrize("kind", [None, "cuda"])
def test_products_are_exact_inside_the_block_and_as_before_after_it(kind: str | None) -> None:
    with exact_products(kind and torch.device(kind)):
        assert settings() == ("highest", False)
    assert settings() == ("high", True)
    with pytest.raises(KeyError), exact_products():
        raise KeyError
    assert settings() == ("high", True)


@pytest.mark.usefixtures("reduced")
def test_on_a_cpu_products_are_left_alone() -> None:
    with exact_products(torch.device("cpu")):
        assert settings() == ("high", True)


def test_threads_come_from_the_configuration_or_the_quota() -> None:
    setup(RunConfig(device="cpu", threads=1))
    assert torch.get_num_threads() == 1
    assert 1 <= cpu_quota() <= 4096
    assert isinstance(has_bf16(torch.device("cpu")), bool)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"run\.device=cuda"):
        setup(RunConfig(device="cuda"))
