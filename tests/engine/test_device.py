import pytest
import torch

from engine import device
from engine.config import RunConfig
from engine.device import choose_precision, cpu_quota, has_bf16, setup


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


def test_threads_come_from_the_configuration_or_the_quota() -> None:
    setup(RunConfig(device="cpu", threads=1))
    assert torch.get_num_threads() == 1
    assert 1 <= cpu_quota() <= 4096
    assert isinstance(has_bf16(torch.device("cpu")), bool)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"run\.device=cuda"):
        setup(RunConfig(device="cuda"))
