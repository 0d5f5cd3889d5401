"""A run folder with an untrained tokenizer and with codes and latents that have something to learn."""

import shutil
from pathlib import Path

import pytest
import torch

from engine.checkpoint import save_model
from engine.config import RunConfig
from engine.device import Device, setup
from engine.shards import ShardWriter
from tokenizer.config import TokenizerModelConfig, TowerConfig
from tokenizer.model import Tokenizer, model_card

TOWER = TowerConfig(blocks=1, width=16, heads=2, mlp=32)
VOCAB, CODE_DIM, CLASSES = 32, 4, ("a", "b", "c")


def write_shards(folder: Path, num: int, fingerprint: str, seed: int) -> None:
    """Codes that count upwards from a number of the class, one in eight of them random; latents likewise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % len(CLASSES)
    codes = (labels[:, None] * 7 + torch.arange(16)) % VOCAB  # [N, 16]
    wild = torch.randint(VOCAB, codes.shape, generator=generator)
    codes = torch.where(torch.rand(codes.shape, generator=generator) < 0.125, wild, codes)
    latents = labels[:, None, None, None] - 1 + 0.1 * torch.randn(num, CODE_DIM, 4, 4, generator=generator)
    writer = ShardWriter(folder, views=("original",), vocab_size=VOCAB)
    writer.append(labels=labels, codes=codes[:, None], latents=latents[:, None])
    meta = {"tokenizer_fingerprint": fingerprint, "grid": [4, 4], "vocab_size": VOCAB, "latent_shape": [CODE_DIM, 4, 4]}
    writer.close(meta | {"class_names": list(CLASSES), "images": {"source": "counting", "n": num}})


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder up to and including its codes; copy it before training in it."""
    folder = tmp_path_factory.mktemp("runs") / "counting"
    torch.manual_seed(0)
    model = TokenizerModelConfig(patch_size=4, vocab_size=VOCAB, code_dim=CODE_DIM, encoder=TOWER, decoder=TOWER)
    tokenizer = Tokenizer(model, image_size=16)
    card = model_card(tokenizer)
    save_model(folder / "tokenizer", tokenizer.state_dict(), card)
    write_shards(folder / "codes" / "train", 96, card["code_fingerprint"], seed=1)
    write_shards(folder / "codes" / "test", 24, card["code_fingerprint"], seed=2)
    return folder


@pytest.fixture
def run(encoded: Path, tmp_path: Path) -> RunConfig:
    """A fresh copy of the encoded run."""
    shutil.copytree(encoded, tmp_path / "counting")
    return RunConfig(name="counting", root=str(tmp_path), device="cpu", precision="fp32", threads=1)


@pytest.fixture
def device(run: RunConfig) -> Device:
    return setup(run)
