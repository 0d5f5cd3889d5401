"""The codes carry the image: 16 photographs are learnt by heart through a codebook, each from codes of its own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from engine.batches import Batches
from engine.config import RunConfig, TrainConfig
from engine.device import setup
from engine.images import ImageSet, Listing
from engine.loop import fit
from tokenizer.config import QuantizerConfig, TokenizerConfig, TokenizerLossConfig, TokenizerModelConfig, TowerConfig
from tokenizer.losses import psnr
from tokenizer.model import Tokenizer
from tokenizer.train import TokenizerTask, start_codebook

STEPS = 450
TOWER = TowerConfig(blocks=2, width=64, heads=2, mlp=128)
CONFIG = TokenizerConfig(
    model=TokenizerModelConfig(patch_size=4, vocab_size=1024, code_dim=8, encoder=TOWER, decoder=TOWER),
    quantizer=QuantizerConfig(revive_after=50),
    loss=TokenizerLossConfig(l2=40.0),
    train=TrainConfig(
        steps=STEPS,
        batch_size=16,
        learning_rate=3e-3,
        warmup_steps=20,
        ema=0.9,
        preview_every=0,
        log_every=STEPS,
        checkpoint_every=STEPS,
    ),
)


def photographs() -> ImageSet:
    """16 parts of scikit-learn's two sample photographs, 32 x 32 pixels each."""
    crops = []
    for photograph in load_sample_images().images:
        small = Image.fromarray(photograph).resize((128, 96), Image.Resampling.LANCZOS)
        crops += [small.crop((left, top, left + 32, top + 32)) for top in (16, 56) for left in range(0, 128, 32)]
    listing = Listing(
        labels=np.zeros(16, np.int64), class_names=("all",), read=crops.__getitem__, name=str, digest="photographs"
    )
    return ImageSet(listing, size=32, split="train", origin={"source": "photographs"})


@pytest.mark.slow
def test_sixteen_photographs_are_learnt_by_heart_and_each_ones_codes_are_its_own(tmp_path: Path) -> None:
    run = RunConfig(device="cpu", threads=1, root=str(tmp_path))
    device, images = setup(run), photographs()
    torch.manual_seed(0)
    model = Tokenizer(CONFIG.model, CONFIG.quantizer, image_size=32)
    batches = Batches(images, batch_size=16, seed=0)
    start_codebook(model, batches, seed=0, device=device)
    task = TokenizerTask(model, CONFIG, test=images, device=device)
    weights = fit(task, batches, train=CONFIG.train, run=run, device=device, folder=tmp_path, identity={})
    model.load_state_dict(weights["tokenizer"])
    model.eval()
    originals = next(images.in_order(16))["images"]  # [16, 3, 32, 32]
    again = model.decode(model.encode(originals))
    pairs = again.repeat_interleave(16, 0), originals.repeat(16, 1, 1, 1)
    likeness = psnr(*pairs).unflatten(0, (16, 16))  # dB, [whose codes, which image]
    assert likeness.diagonal().mean() > 25
    others = likeness.masked_fill(torch.eye(16, dtype=torch.bool), -torch.inf)
    assert (likeness.diagonal() - others.amax(dim=1)).min() > 5
    order = torch.arange(15, -1, -1)
    assert torch.equal(model.decode(model.encode(originals)[order]), again[order])
