"""Generators with the weights of a snapshot, of an average of another width, and with a guide."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.checkpoint import save_model
from engine.config import RunConfig, TrainConfig
from engine.device import Device
from engine.ema import PowerEma
from engine.shards import open_shards
from engine.snapshots import averaged_at, snapshots, write_snapshot
from generator.autoregressive import build_network
from generator.card import generator_card
from generator.config import (
    AutoregressiveConfig,
    AutoregressiveModelConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    OrderConfig,
)
from generator.diffusion import Diffusion, build_denoiser
from generator.order import fold_order
from generator.sample import load_generator, open_generator, sample, sample_images
from tokenizer.model import load_tokenizer

STEPS, EVERY, WIDTHS = 30, 10, (0.05, 0.1)
CONFIG = DiffusionConfig(
    model=DenoiserModelConfig(preset="tiny", depth=1, width=16, heads=2),
    train=TrainConfig(steps=STEPS, snapshot_every=EVERY, ema_widths=WIDTHS),
    sample=DiffusionSampleConfig(num_steps=2, batch_size=4),
)


def with_sample(**settings: Any) -> DiffusionConfig:
    return dataclasses.replace(CONFIG, sample=dataclasses.replace(CONFIG.sample, **settings))


def card_of(run: RunConfig, config: Any) -> dict[str, Any]:
    return generator_card(config, open_shards(run.folder / "codes" / "train"), load_tokenizer(run.folder))


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def walk(run: RunConfig, name: str = "diffusion", seed: int = 0) -> dict[int, dict[str, Tensor]]:
    """A model whose weights walked at random for STEPS steps, with snapshots; the average of width 0.08 at each."""
    generator, card = torch.Generator().manual_seed(seed), card_of(run, CONFIG)
    network = build_denoiser(CONFIG.model, card)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    averages, tracked = {width: PowerEma(network, width) for width in (*WIDTHS, 0.08)}, {}
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
        states = {}
        for width, average in averages.items():
            average.update(network)
            with average.applied(network):
                states[width] = state_of(network)
        tracked[step] = states.pop(0.08)
        if step % EVERY == 0:
            folder = run.folder / name / "snapshots"
            write_snapshot(folder, step, updates=step, model=state_of(network), widths=states)
    save_model(run.folder / name, network.state_dict(), card)
    return tracked


@pytest.fixture
def walked(run: RunConfig) -> RunConfig:
    walk(run)
    return run


def weights(generator: Any) -> Tensor:
    return flat(generator.network.state_dict())


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state[name].flatten() for name in sorted(state)])


def test_a_snapshot_samples_with_the_weights_of_its_step(walked: RunConfig) -> None:
    found = {step: load_generator(walked.folder, "diffusion", snapshot=step) for step in (10, 20, 30)}
    final = load_generator(walked.folder / "diffusion", "diffusion")
    assert len({generator.fingerprint for generator in found.values()}) == 3
    assert torch.equal(weights(found[30]), weights(final))
    assert found[30].fingerprint == final.fingerprint  # the same weights have the same name
    assert not torch.equal(weights(found[20]), weights(final))
    assert not found[20].training and not any(each.requires_grad for each in found[20].parameters())
    images = [found[step].sample(None, [0], num_steps=2) for step in (10, 30)]
    assert not torch.equal(*images)
    assert torch.equal(images[1], final.sample(None, [0], num_steps=2))


def test_an_average_of_another_width_is_nearly_the_tracked_one(run: RunConfig) -> None:
    tracked = walk(run)
    for snapshot, step in ((None, STEPS), (20, 20)):
        generator = load_generator(run.folder, "diffusion", snapshot=snapshot, ema_width=0.08)
        stored = [flat(averaged_at(run.folder / "diffusion", step, width)) for width in WIDTHS]
        wanted = flat(tracked[step])
        rest = (weights(generator) - wanted).norm()
        assert rest < 0.35 * min((each - wanted).norm() for each in stored)
    exact = load_generator(run.folder, "diffusion", ema_width=0.05)
    assert torch.equal(weights(exact), flat(averaged_at(run.folder / "diffusion", STEPS, 0.05)))
    assert len({exact.fingerprint, generator.fingerprint, load_generator(run.folder, "diffusion").fingerprint}) == 3


def test_what_is_not_there_is_told(walked: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no snapshot of step 15: there are those of steps 10, 20, 30"):
        load_generator(walked.folder, "diffusion", snapshot=15)
    for path in snapshots(walked.folder / "diffusion").values():
        told = json.loads((path / "snapshot.json").read_text())
        (path / "snapshot.json").write_text(json.dumps(told | {"widths": []}))
    with pytest.raises(ValueError, match=r"width 0\.08 from: train with train\.ema_widths"):
        load_generator(walked.folder, "diffusion", ema_width=0.08)
    (walked.folder / "diffusion" / "model.json").unlink()
    with pytest.raises(ValueError, match="has not been trained to its end"):
        load_generator(walked.folder, "diffusion", snapshot=10)


def test_a_snapshot_of_random_orders_is_folded_as_the_model_is(run: RunConfig) -> None:
    model = AutoregressiveModelConfig(preset="tiny", depth=1, width=16, heads=2)
    config = AutoregressiveConfig(model=model, order=OrderConfig(kind="random"))
    card, folder = card_of(run, config), run.folder / "autoregressive"
    network = build_network(config.model, card, random_order=True)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    write_snapshot(folder / "snapshots", 5, updates=5, model=state_of(network), widths={})
    save_model(folder, fold_order(network.state_dict()), card)
    found, final = (load_generator(run.folder, "autoregressive", snapshot=step) for step in (5, None))
    assert torch.equal(found.sample(None, [0, 1]), final.sample(None, [0, 1]))
    assert found.fingerprint == final.fingerprint


# Guides


def test_a_guide_is_a_snapshot_of_the_run_or_another_model(walked: RunConfig) -> None:
    walk(walked, "other", seed=1)
    early = load_generator(walked.folder, "diffusion", snapshot=10)
    other = load_generator(walked.folder / "other", "diffusion")
    for name, expected in (("step-10", early), ("step-00000010", early), (str(walked.folder / "other"), other)):
        generator = load_generator(walked.folder, "diffusion", guide=name)
        assert isinstance(generator, Diffusion) and generator.guide is not None
        assert generator.guide.fingerprint == expected.fingerprint
        assert torch.equal(weights(generator.guide), weights(expected))
    late = load_generator(walked.folder / "other", "diffusion", snapshot=20, guide=str(walked.folder))
    assert late.guide.fingerprint == load_generator(walked.folder, "diffusion").fingerprint  # type: ignore[union-attr]
    assert load_generator(walked.folder, "diffusion").guide is None  # type: ignore[union-attr]


def test_a_guide_that_cannot_guide_is_refused(walked: RunConfig) -> None:
    for guide, message in (
        ("step-15", r"guide='step-15': .*no snapshot of step 15: there are those of steps 10, 20, 30"),
        ("step-30", "is the very network that it shall guide"),
        ("nowhere", r"guide='nowhere': .*model\.json is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_generator(walked.folder, "diffusion", guide=guide)


def test_a_guide_of_codes_is_refused(walked: RunConfig) -> None:
    config = AutoregressiveConfig(model=AutoregressiveModelConfig(preset="tiny", depth=1, width=16, heads=2))
    card, folder = card_of(walked, config), walked.folder / "autoregressive"
    save_model(folder, build_network(config.model, card).state_dict(), card)
    with pytest.raises(ValueError, match="describes 'autoregressive', not family='diffusion'"):
        load_generator(walked.folder, "diffusion", guide=str(folder))
    with pytest.raises(ValueError, match="guide='step-10' is of a diffusion model, but family='autoregressive'"):
        load_generator(walked.folder, "autoregressive", guide="step-10")


@pytest.mark.parametrize(("key", "value"), [("tokenizer_fingerprint", "f" * 16), ("class_names", ["a", "b", "d"])])
def test_a_guide_of_other_latents_or_classes_is_refused(walked: RunConfig, key: str, value: Any) -> None:
    walk(walked, "other", seed=1)
    path = walked.folder / "other" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    generator = load_generator(walked.folder, "diffusion", guide=str(walked.folder / "other"))
    with pytest.raises(ValueError, match=key):
        generator.sample(None, [0], num_steps=2, guidance=2.0, guide=str(walked.folder / "other"))


# Samples as files


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "samples.json").read_text())


def test_the_settings_of_a_configuration_choose_the_networks(walked: RunConfig) -> None:
    plain = open_generator(walked.folder, CONFIG)
    assert plain.fingerprint == load_generator(walked.folder, "diffusion").fingerprint
    chosen = open_generator(walked.folder, with_sample(snapshot=20, ema_width=0.07, guide="step-10", guidance=2.0))
    expected = load_generator(walked.folder, "diffusion", snapshot=20, ema_width=0.07, guide="step-10")
    assert isinstance(chosen, Diffusion) and isinstance(expected, Diffusion)
    assert chosen.fingerprint == expected.fingerprint != plain.fingerprint
    assert chosen.guide is not None and expected.guide is not None
    assert chosen.guide.fingerprint == expected.guide.fingerprint


def test_samples_tell_the_very_networks_that_made_them(walked: RunConfig, device: Device, tmp_path: Path) -> None:
    request: dict[str, Any] = {"run": walked, "family": "diffusion", "device": device, "num": 3}
    config = with_sample(snapshot=20, guide="step-10", guidance=2.0)
    found = told(sample(config=config, **request, out=tmp_path / "guided"))
    generator = load_generator(walked.folder, "diffusion", snapshot=20, guide="step-10")
    assert isinstance(generator, Diffusion) and generator.guide is not None
    assert (found["generator"], found["guide"]) == (generator.fingerprint, generator.guide.fingerprint)
    assert (found["settings"]["snapshot"], found["settings"]["guide"]) == (20, "step-10")
    assert "guide" not in told(sample(config=CONFIG, **request, out=tmp_path / "plain"))
    again = sample_images(
        generator, load_tokenizer(walked.folder), torch.tensor(found["labels"]), found["seeds"], **found["settings"]
    )
    alone = sample_images(
        generator, load_tokenizer(walked.folder), torch.tensor(found["labels"]), found["seeds"], num_steps=2
    )
    assert not torch.equal(again, alone)


def test_samples_are_kept_until_a_network_changes(walked: RunConfig, device: Device) -> None:
    walk(walked, "other", seed=1)
    levels = (-8.0, 0.0, 4.0)  # a setting that is a list in samples.json
    config = with_sample(steps="list", levels=levels, guide=str(walked.folder / "other"), guidance=2.0)
    request: dict[str, Any] = {"run": walked, "config": config, "family": "diffusion", "device": device, "num": 2}
    picture = sample(**request) / "000000.png"
    stamp = picture.stat().st_mtime_ns
    sample(**request)
    assert picture.stat().st_mtime_ns == stamp
    walk(walked, "other", seed=2)
    sample(**request)
    assert picture.stat().st_mtime_ns != stamp
