"""Training: it learns, keeps codes in use, resumes to the bit, and leaves a measured, loadable model."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from engine.batches import Batches, StepRandom
from engine.config import DataConfig, RunConfig, TrainConfig
from engine.device import Device, setup
from engine.images import ImageSet, to_float, to_uint8
from engine.optim import build_optimizer
from tokenizer.config import (
    CnnConfig,
    DiscriminatorConfig,
    QuantizerConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TokenizerModelConfig,
    TowerConfig,
)
from tokenizer.losses import l2, psnr
from tokenizer.model import Tokenizer, load_tokenizer
from tokenizer.train import TokenizerTask, measure_latents, start_codebook, train_tokenizer

DATA = DataConfig(source="digits", size=16, workers=0)
TRAIN = TrainConfig(
    steps=4, batch_size=8, decay="constant", ema=0.9, log_every=1, preview_every=4, checkpoint_every=2, keep_last=9
)
TOWER = TowerConfig(blocks=2, width=32, heads=2, mlp=64)
MODEL = TokenizerModelConfig(patch_size=4, vocab_size=32, code_dim=4, encoder=TOWER, decoder=TOWER)
CONFIG = TokenizerConfig(model=MODEL, quantizer=QuantizerConfig(revive_after=1), train=TRAIN)


@pytest.fixture
def device() -> Device:
    return setup(RunConfig(device="cpu", precision="fp32", threads=1))


def trained(root: Path, device: Device, config: TokenizerConfig = CONFIG, *, name: str = "run", seed: int = 0) -> Path:
    run = RunConfig(name=name, root=str(root), seed=seed, device="cpu", precision="fp32")
    return train_tokenizer(run=run, data=DATA, tokenizer=config, device=device)


def test_it_overfits_a_few_images(tokenizer: Tokenizer, squares: ImageSet) -> None:
    images = next(squares.in_order(4))["images"]
    optimizer = build_optimizer(tokenizer, TrainConfig(learning_rate=3e-3))
    for _ in range(300):
        output, _, losses, _ = tokenizer(to_float(images))
        loss = l2(output, to_float(images)) + losses["codebook"] + 0.25 * losses["commitment"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert psnr(tokenizer.decode(tokenizer.encode(images)), images).min() > 25


def task_of(tokenizer: Tokenizer, test: ImageSet, device: Device, config: TokenizerConfig = CONFIG) -> TokenizerTask:
    return TokenizerTask(tokenizer, config, test=test, device=device)


def test_the_loss_is_the_weighted_sum_of_its_terms(tokenizer: Tokenizer, squares: ImageSet, device: Device) -> None:
    loss = TokenizerLossConfig(l2=0.5, l1=2.0, codebook=0.25, commitment=4.0)
    task = task_of(tokenizer, squares, device, replace(CONFIG, loss=loss))
    values = task.step(Batches(squares, batch_size=8, seed=0).batch(0), StepRandom(0, 0, 8))
    terms = 0.5 * values["l2"] + 2 * values["l1"] + 0.25 * values["codebook"] + 4 * values["commitment"]
    assert torch.allclose(values["loss"], terms)
    assert values["loss"].requires_grad and values["psnr"].isfinite()


def test_unused_codes_are_revived_and_counted(tokenizer: Tokenizer, squares: ImageSet, device: Device) -> None:
    task = task_of(tokenizer, squares, device, replace(CONFIG, quantizer=QuantizerConfig(revive_after=2)))
    before = tokenizer.quantizer.codebook.detach().clone()
    batches, shown = Batches(squares, batch_size=8, seed=0), []
    for step in range(2):
        task.before_step()
        task.step(batches.batch(step), StepRandom(0, step, 8))
        metrics: dict[str, float] = {}
        task.after_step(step, metrics, StepRandom(0, step, 8))
        shown.append(metrics)
    changed = (tokenizer.quantizer.codebook != before).any(dim=1)
    assert shown[0]["revived"] == 0 < shown[1]["revived"] == changed.sum()
    assert shown[1]["usage"] == pytest.approx(1 - shown[1]["revived"] / 32)
    assert 1 <= shown[0]["perplexity"] <= 32
    task.before_step()
    assert not task.counts.any() and not task.vectors


def test_accumulated_parts_count_like_one_batch(tokenizer: Tokenizer, squares: ImageSet, device: Device) -> None:
    batches, counts = Batches(squares, batch_size=8, seed=0), []
    for parts in (1, 2):
        task = task_of(tokenizer, squares, device)
        for part in range(parts):
            task.step(batches.batch(0, part, parts), StepRandom(0, 0, 8, part=part, parts=parts))
        counts.append(task.counts)
    assert torch.equal(counts[0], counts[1]) and counts[0].sum() == 8 * 16


def test_kmeans_start_uses_most_codes_and_repeats(tokenizer: Tokenizer, squares: ImageSet, device: Device) -> None:
    batches, books = Batches(squares, batch_size=8, seed=0), []
    for _ in range(2):
        start_codebook(tokenizer, batches, seed=0, device=device)
        books.append(tokenizer.quantizer.codebook.detach().clone())
    assert torch.equal(books[0], books[1])
    assert tokenizer.encode(next(squares.in_order(50))["images"]).unique().numel() > 0.8 * 32


def test_validation_and_preview_show_the_test_images(tokenizer: Tokenizer, squares: ImageSet, device: Device) -> None:
    task = task_of(tokenizer, squares, device)
    figures, pairs = task.validate(), task.preview()["reconstructions"]
    originals = torch.cat([batch["images"] for batch in squares.in_order(50)])
    output, codes, _, _ = tokenizer(to_float(originals))
    assert figures["psnr"] == pytest.approx(psnr(to_uint8(output), originals).mean().item(), abs=1e-3)
    assert figures["usage"] == pytest.approx(codes.unique().numel() / 32)
    assert torch.equal(pairs[0::2], originals[:32]) and torch.equal(pairs[1::2], to_uint8(output)[:32])


def test_measured_latents_have_zero_mean_and_unit_variance(
    tokenizer: Tokenizer, squares: ImageSet, device: Device
) -> None:
    measure_latents(tokenizer, squares, device=device, batch_size=16)
    latents = tokenizer.to_latents(next(squares.in_order(50))["images"])
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (latents.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    measure_latents(tokenizer, squares, device=device, batch_size=16, limit=5)
    few = tokenizer.to_latents(squares.load(np.arange(0, 50, 10))["images"])  # spread over the set
    assert few.mean(dim=(0, 2, 3)).abs().max() < 1e-5


def test_static_statistics_are_one_factor_that_keeps_the_proportions(
    tokenizer: Tokenizer, squares: ImageSet, device: Device
) -> None:
    images = next(squares.in_order(50))["images"]
    raw = tokenizer.to_latents(images)  # mean 0 and deviation 1 are the untrained tokenizer's
    measure_latents(tokenizer, squares, kind="static", device=device, batch_size=16)
    latents = tokenizer.to_latents(images)
    assert latents.square().mean().sqrt() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(latents, raw / raw.square().mean().sqrt(), atol=1e-5)
    assert torch.equal(tokenizer.from_latents(latents), tokenizer.decode(tokenizer.encode(images)))


def test_the_latents_of_several_processes_are_measured_together(
    tokenizer: Tokenizer, squares: ImageSet, device: Device
) -> None:
    """Each process adds its share; the shares add up to what one process finds."""
    found = []
    for rank, world in ((0, 1), (0, 3), (1, 3), (2, 3)):
        told = SimpleNamespace(rank=rank, world=world, device=device.device, sum=lambda x: (found.append(x), x)[1])
        measure_latents(tokenizer, squares, device=cast(Device, told), batch_size=4, limit=20)
    assert found[0][0, 0] == 20 * 16 and torch.allclose(found[0], sum(found[1:]), rtol=1e-12, atol=0)


def test_training_leaves_a_loadable_model_with_its_facts(tmp_path: Path, device: Device) -> None:
    folder = trained(tmp_path, device)
    model = load_tokenizer(tmp_path / "run")
    card = json.loads((folder / "model.json").read_text())
    assert folder == tmp_path / "run" / "tokenizer" and len(model.fingerprint) == 16
    assert card["identity"]["data"]["source"] == "digits" and len(card["class_names"]) == 10
    assert not torch.equal(model.latent_std, torch.ones(4))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = {"loss", "l2", "codebook", "commitment", "psnr", "usage", "perplexity", "revived"}
    assert expected <= records[0].keys() and {"validation/psnr", "validation/usage"} <= records[-1].keys()
    assert (folder / "previews" / "step-00000004-reconstructions.png").is_file()


def test_interrupted_training_equals_uninterrupted(tmp_path: Path, device: Device) -> None:
    """Revival happens in every step here, so its counters and draws are part of the comparison."""
    trained(tmp_path, device, name="whole")
    trained(tmp_path, device, replace(CONFIG, train=replace(TRAIN, steps=2)), name="cut")
    trained(tmp_path, device, name="cut")
    whole, cut = load_tokenizer(tmp_path / "whole"), load_tokenizer(tmp_path / "cut")
    assert whole.fingerprint == cut.fingerprint
    trained(tmp_path, device, name="other", seed=1)
    assert load_tokenizer(tmp_path / "other").fingerprint != whole.fingerprint


def test_a_finished_run_is_left_alone_and_another_is_refused(tmp_path: Path, device: Device) -> None:
    folder = trained(tmp_path, device)
    written = (folder / "model.json").stat().st_mtime_ns
    trained(tmp_path, device)
    assert (folder / "model.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"tokenizer\.loss\.commitment: 0\.25 -> 1\.0"):
        trained(tmp_path, device, replace(CONFIG, loss=TokenizerLossConfig(commitment=1.0)))


def test_other_statistics_of_a_trained_network_need_no_training(tmp_path: Path, device: Device) -> None:
    folder = trained(tmp_path, device)
    first, log = load_tokenizer(folder), (folder / "metrics.jsonl").read_text()
    trained(tmp_path, device, replace(CONFIG, latent_statistics="static"))
    second = load_tokenizer(folder)
    assert second.latent_std.unique().numel() == 1 and second.code_fingerprint != first.code_fingerprint
    changed = {name for name, value in first.state_dict().items() if not torch.equal(value, second.state_dict()[name])}
    assert changed == {"latent_mean", "latent_std"} and (folder / "metrics.jsonl").read_text() == log
    trained(tmp_path, device)
    assert load_tokenizer(folder).fingerprint == first.fingerprint


def test_runs_of_before_a_setting_existed_stay_valid(tmp_path: Path, device: Device) -> None:
    folder = trained(tmp_path, device)
    for name, place in (("model.json", ("identity",)), ("identity.json", ())):
        told = json.loads((folder / name).read_text())
        identity = told[place[0]] if place else told
        for key in ("ema_widths", "snapshot_every"):
            del identity["tokenizer"]["train"][key]
        identity.pop("latent_statistics", None)
        (folder / name).write_text(json.dumps(told))
    written = (folder / "model.json").stat().st_mtime_ns
    trained(tmp_path, device)
    assert (folder / "model.json").stat().st_mtime_ns == written
    trained(tmp_path, device, replace(CONFIG, train=replace(TRAIN, steps=6)))
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


FULL = replace(
    CONFIG,
    model=replace(MODEL, output="logit_laplace"),
    loss=TokenizerLossConfig(logit_laplace=0.1, adversarial=0.1),
    discriminator=DiscriminatorConfig(channels=8, channel_base=128, start_step=1, r1_every=2, lecam=0.01),
)


def test_all_losses_of_the_paper_train_both_networks(tmp_path: Path, device: Device) -> None:
    folder = trained(tmp_path, device, FULL)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "discriminator" not in records[0] and {"logit_laplace", "grad_norm/discriminator"} <= records[0].keys()
    assert {"adversarial", "discriminator", "logits_real", "r1", "lecam"} <= records[2].keys()
    assert records[0]["grad_norm/discriminator"] == 0 < records[2]["grad_norm/discriminator"]
    assert load_tokenizer(tmp_path / "run").config.output == "logit_laplace"


PATCHES = DiscriminatorConfig(kind="patchgan", patch_channels=8, patch_layers=1, adaptive=True)


@pytest.mark.parametrize(
    "config",
    [
        FULL,
        replace(FULL, discriminator=PATCHES),
        replace(CONFIG, quantizer=QuantizerConfig(update="ema", revive_after=1, ema_decay=0.8)),
        replace(CONFIG, quantizer=QuantizerConfig(kind="kl")),
        replace(CONFIG, quantizer=QuantizerConfig(normalize=False, revive_after=2, gradient="rotation")),
    ],
    ids=["full", "patchgan", "ema", "kl", "euclidean"],
)
def test_every_recipe_resumes_to_the_bit(config: TokenizerConfig, tmp_path: Path, device: Device) -> None:
    trained(tmp_path, device, config, name="whole")
    trained(tmp_path, device, replace(config, train=replace(TRAIN, steps=2)), name="cut")
    trained(tmp_path, device, config, name="cut")
    assert load_tokenizer(tmp_path / "whole").fingerprint == load_tokenizer(tmp_path / "cut").fingerprint


def test_the_cnn_trains_under_the_same_losses(tmp_path: Path, device: Device) -> None:
    cnn = CnnConfig(channels=8, multipliers=(1, 1, 2), res_blocks=1)
    trained(tmp_path, device, replace(FULL, model=replace(FULL.model, architecture="cnn", cnn=cnn)))
    model = load_tokenizer(tmp_path / "run")
    assert model.config.cnn == cnn and model.grid == (4, 4)


def test_the_adaptive_weight_balances_the_gradients_at_the_last_layer(
    tokenizer: Tokenizer, squares: ImageSet, device: Device
) -> None:
    config = replace(CONFIG, loss=TokenizerLossConfig(adversarial=0.5), discriminator=replace(PATCHES, r1=0.0))
    task = task_of(tokenizer, squares, device, config)
    values = task.step(Batches(squares, batch_size=8, seed=0).batch(0), StepRandom(0, 0, 8))
    layer = tokenizer.decoder.last_layer
    plain = values["l2"] + values["codebook"] + 0.25 * values["commitment"]
    gradients = [torch.autograd.grad(value, layer, retain_graph=True)[0] for value in (plain, values["adversarial"])]
    expected = gradients[0].norm() / (gradients[1].norm() + 1e-4)
    assert values["adaptive_weight"] == pytest.approx(expected.item(), rel=1e-4)
    total = plain + 0.5 * expected * values["adversarial"] + values["discriminator"]
    assert values["loss"].item() == pytest.approx(total.item(), rel=1e-4)


def test_a_new_decoder_keeps_the_codes(tmp_path: Path, device: Device) -> None:
    trained(tmp_path, device, name="first")
    first = load_tokenizer(tmp_path / "first")
    larger = replace(MODEL, decoder=TowerConfig(blocks=3, width=32, heads=2, mlp=64))
    for name, model in (("same", MODEL), ("larger", larger)):
        config = replace(CONFIG, model=model, encoder_from=str(tmp_path / "first"))
        trained(tmp_path, device, config, name=name)
        second = load_tokenizer(tmp_path / name)
        assert second.code_fingerprint == first.code_fingerprint and second.fingerprint != first.fingerprint
        images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
        assert torch.equal(second.encode(images), first.encode(images))
        assert torch.equal(second.to_latents(images), first.to_latents(images))
        assert not torch.equal(second.decode(second.encode(images)), first.decode(first.encode(images)))
    with pytest.raises(ValueError, match=r"tokenizer\.encoder_from=.*nowhere: .*model\.json is missing"):
        trained(tmp_path, device, replace(CONFIG, encoder_from=str(tmp_path / "nowhere")), name="other")
    for change, told in ((replace(TOWER, heads=4), "encoder.heads 2 -> 4"), (None, "encoder.width 32 -> 512")):
        config = replace(CONFIG, model=replace(MODEL, encoder=change), encoder_from=str(tmp_path / "first"))
        with pytest.raises(ValueError, match=rf"tokenizer\.encoder_from: .*{told}"):
            trained(tmp_path, device, config, name="other")


def test_parts_too_small_for_the_minibatch_deviation_are_told(
    tokenizer: Tokenizer, squares: ImageSet, device: Device
) -> None:
    with pytest.warns(UserWarning, match="5 images at a time make no groups of 2 to 4"):
        task_of(tokenizer, squares, device, replace(FULL, train=replace(TRAIN, batch_size=5)))
