"""A network that serves one cluster of noise levels inside another model, which serves all others."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.checkpoint import load_model, save_model
from engine.config import DataConfig, RunConfig, TrainConfig
from engine.device import Device
from engine.shards import open_shards
from engine.snapshots import write_snapshot
from generator.autoregressive import build_network
from generator.card import generator_card
from generator.clusters import cluster_edges
from generator.config import (
    AutoregressiveConfig,
    AutoregressiveModelConfig,
    CurriculumConfig,
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    ScheduleConfig,
)
from generator.diffusion import Diffusion, build_denoiser
from generator.sample import load_generator, open_generator, sample
from generator.schedule import build_schedule
from generator.solvers import SampleNoise, solve
from generator.train import train_generator
from tokenizer.model import load_tokenizer

N = 4
FULL = DiffusionConfig(
    model=DenoiserModelConfig(preset="tiny", depth=1, width=16, heads=2),
    train=TrainConfig(steps=2, batch_size=8, log_every=1, preview_every=1, checkpoint_every=2),
    sample=DiffusionSampleConfig(num_steps=9, batch_size=4),
)
LABELS, SEEDS = torch.tensor([2, 0, 1]), [4, 5, 6]


def copy_config(cluster: int, clusters: Any = "time", **changes: Any) -> DiffusionConfig:
    """The settings of a network that is trained on one cluster of N."""
    curriculum = CurriculumConfig(kind="single", num_clusters=N, cluster=cluster, clusters=clusters)
    return dataclasses.replace(FULL, curriculum=curriculum, **changes)


def card_of(run: RunConfig, config: Any, **changes: Any) -> dict[str, Any]:
    card = generator_card(config, open_shards(run.folder / "codes" / "train"), load_tokenizer(run.folder))
    return {**card, **changes}


def weights_of(run: RunConfig, config: DiffusionConfig, seed: int) -> dict[str, Tensor]:
    network, generator = build_denoiser(config.model, card_of(run, config)), torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return network.state_dict()


def model(run: RunConfig, config: DiffusionConfig, seed: int = 0, **changes: Any) -> Diffusion:
    return Diffusion.from_card(card_of(run, config, **changes), weights_of(run, config, seed))


def served(run: RunConfig, config: DiffusionConfig, seed: int = 1) -> Diffusion:
    """A copy with the model FULL, of seed 0, around it."""
    copy = model(run, config, seed)
    copy.outside = model(run, FULL)
    return copy


def interval(config: DiffusionConfig) -> tuple[float, float]:
    """The log SNRs of the cluster, low <= log SNR < high; the outermost ones have no end."""
    cluster, schedule = config.curriculum.cluster, build_schedule(config.schedule)
    edges = cluster_edges(config.curriculum, schedule)  # [N + 1]
    low, high = schedule.inverse(edges[[N - cluster, N - cluster + 1]]).float().tolist()
    return -torch.inf if cluster == N else low, torch.inf if cluster == 1 else high


def draw(generator: Diffusion, **settings: Any) -> Tensor:
    return generator.sample(LABELS, SEEDS, **{"num_steps": 9, **settings})


def spied(generator: Diffusion) -> list[tuple[float, list[int]]]:
    """Log SNR and labels of every call of the network from now on."""
    calls: list[tuple[float, list[int]]] = []
    generator.network.register_forward_pre_hook(
        lambda _, inputs: calls.append((float(inputs[1][0]), inputs[2].tolist()))  # type: ignore[func-returns-value]
    )
    return calls


# Which network is asked


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"solver": "heun"}, {"solver": "sde_dpmpp_2m", "steps": "karras"}, {"guidance": 3.0, "guidance_last": 2.0},
        {"precision": "bf16"}, {"guidance": 2.0, "precision": "bf16", "solver": "heun"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("cluster", [1, 3])
def test_equal_networks_serve_as_one(run: RunConfig, cluster: int, settings: dict[str, Any]) -> None:
    copy = served(run, copy_config(cluster), seed=0)
    assert copy.outside is not None
    assert torch.equal(draw(copy, outside="full", **settings), draw(copy.outside, **settings))


@pytest.mark.parametrize(
    ("kind", "clusters", "solver"),
    [
        ("ddpm", "time", "heun"), ("ddpm", "logsnr", "ddim"), ("edm", "time", "heun"), ("edm", "noise_level", "ddim"),
        ("logit_normal", "noise_level", "heun"),
    ],
)  # fmt: skip
def test_every_call_goes_to_one_network_by_its_level(run: RunConfig, kind: Any, clusters: Any, solver: str) -> None:
    """The calls of the N copies together are those of one model, and none is missing or double."""
    full = model(run, FULL)
    whole, shares = spied(full), []
    draw(full, solver=solver)
    for cluster in range(1, N + 1):
        config = copy_config(cluster, clusters, schedule=ScheduleConfig(kind=kind))
        copy = served(run, config)
        assert copy.outside is not None
        inside, outside = spied(copy), spied(copy.outside)
        draw(copy, outside="full", solver=solver)
        low, high = interval(config)
        assert all(low <= level < high for level, _ in inside)
        assert not any(low <= level < high for level, _ in outside)
        assert sorted(inside + outside) == sorted(whole)
        shares.append(inside)
    assert sorted(call for calls in shares for call in calls) == sorted(whole)


def test_steps_that_stop_at_the_very_edges_are_shared_out_once(run: RunConfig) -> None:
    """With steps=time and equal parts of time every cluster has its share of the steps."""
    shares = []
    for cluster in range(1, N + 1):
        copy = served(run, copy_config(cluster))
        inside = spied(copy)
        draw(copy, outside="full", steps="time", num_steps=2 * N, from_zero_snr=True)
        shares.append([level for level, _ in inside])
    levels = [level for share in shares for level in share]
    assert len(levels) == len(set(levels)) == 2 * N
    assert [len(share) for share in shares] == [2] * N


def test_the_outermost_clusters_have_no_end(run: RunConfig) -> None:
    for cluster, mine in ((1, [25.0]), (2, []), (N, [-25.0])):
        copy = served(run, copy_config(cluster))
        calls = spied(copy)
        draw(copy, outside="full", steps="list", levels=(-25.0, 25.0))
        assert [level for level, _ in calls] == mine
    last = served(run, copy_config(N))
    calls = spied(last)
    draw(last, outside="full", from_zero_snr=True)
    assert calls[0][0] == -torch.inf


def test_networks_of_other_parametrisations_work_together(run: RunConfig) -> None:
    """Each estimates x0 in its own way; sampling equals a solver that asks for the estimate of the level's network."""
    config = copy_config(2, "logsnr", path="flow", target="velocity", schedule=ScheduleConfig(kind="logit_normal"))
    copy, (low, high) = served(run, config), interval(config)
    outside = copy.outside
    assert outside is not None and not torch.isinf(torch.tensor([low, high])).any()
    asked: set[bool] = set()

    def denoise(z: Tensor, logsnr: Tensor) -> Tensor:
        asked.add(inside := bool(low <= logsnr[0] < high))
        return (copy if inside else outside).denoise(z, logsnr, LABELS)

    noise, levels = SampleNoise(SEEDS, copy.network.latent_shape), copy.levels(DiffusionSampleConfig(num_steps=9))
    with torch.inference_mode():
        expected = solve(denoise, noise, levels, solver="dpmpp_2m", eta=0.0)
    assert asked == {True, False}
    found = draw(copy, outside="full", solver="dpmpp_2m")
    assert torch.equal(found, expected)
    assert not torch.equal(found, draw(outside, solver="dpmpp_2m"))
    assert not torch.equal(found, draw(copy, solver="dpmpp_2m"))


def test_guidance_asks_each_network_with_and_without_the_label(run: RunConfig) -> None:
    copy = served(run, copy_config(2))
    assert copy.outside is not None
    calls = spied(copy), spied(copy.outside)
    draw(copy, outside="full", guidance=2.0)
    assert all(calls)
    assert {tuple(labels) for each in calls for _, labels in each} == {(2, 0, 1, 3, 3, 3)}


def test_a_guide_guides_at_all_levels(run: RunConfig) -> None:
    copy = served(run, copy_config(2))
    copy.guide = model(run, FULL, seed=2)
    assert copy.outside is not None
    own, others, guide = spied(copy), spied(copy.outside), spied(copy.guide)
    draw(copy, outside="full", guide="weaker", guidance=2.0)
    assert 0 < len(own) < 9 and len(own) + len(others) == len(guide) == 9


def test_what_is_attached_acts_only_where_it_is_named(run: RunConfig) -> None:
    copy = served(run, copy_config(2))
    alone = model(run, copy_config(2), seed=1)
    assert torch.equal(draw(copy), draw(alone))
    assert copy.companions == {"outside": copy.outside} and alone.companions == {}


# What cannot work


def test_an_outside_network_that_does_not_fit_is_refused(run: RunConfig) -> None:
    copy = model(run, copy_config(2))
    with pytest.raises(ValueError, match=r"diffusion\.sample\.outside='full' is not attached"):
        draw(copy, outside="full")
    for key, value in (("tokenizer_fingerprint", "f" * 16), ("class_names", ["a", "b", "d"]), ("latent_shape", [4, 4])):
        copy.outside = model(run, FULL)
        copy.outside.card[key] = value
        with pytest.raises(ValueError, match=rf"outside='full' has {key}=.*choose a model of the same tokenizer"):
            draw(copy, outside="full")
    whole = model(run, FULL)
    whole.outside = model(run, FULL, seed=1)
    with pytest.raises(ValueError, match=r"no effect with curriculum\.kind=uniform: .* set outside=null"):
        draw(whole, outside="full")


def test_an_outside_network_that_cannot_do_what_sampling_asks_is_refused(run: RunConfig) -> None:
    copy = model(run, copy_config(2))
    unlabelled = dataclasses.replace(FULL, model=dataclasses.replace(FULL.model, label_dropout=0.0))
    copy.outside = model(run, unlabelled)
    assert draw(copy, outside="full").isfinite().all()
    with pytest.raises(ValueError, match=r"outside='full' learned no null condition for diffusion\.sample\.guidance=2"):
        draw(copy, outside="full", guidance=2.0)
    copy.outside = model(run, dataclasses.replace(FULL, target="eps"))
    with pytest.raises(ValueError, match=r"outside='full' has a target that .*\.from_zero_snr starts: choose another"):
        draw(copy, outside="full", from_zero_snr=True)
    last = model(run, copy_config(N))
    last.outside = copy.outside
    assert draw(last, outside="full", from_zero_snr=True).isfinite().all()  # it is not asked there


# Folders


@pytest.fixture
def saved(run: RunConfig) -> RunConfig:
    """A finished copy for cluster 2 with a snapshot of step 1, and beside it `full`, which has one too."""
    for name, config, seed in (("diffusion", copy_config(2), 1), ("full", FULL, 0)):
        folder = run.folder / name
        write_snapshot(folder / "snapshots", 1, updates=1, model=weights_of(run, config, seed + 10), widths={})
        save_model(folder, weights_of(run, config, seed), card_of(run, config))
    return run


def with_outside(run: RunConfig, **settings: Any) -> DiffusionConfig:
    sampling = dataclasses.replace(FULL.sample, outside=str(run.folder / "full"), **settings)
    return copy_config(2, sample=sampling)


def test_whatever_snapshot_is_served_the_model_around_it_is_the_trained_one(saved: RunConfig) -> None:
    full = load_generator(saved.folder / "full", "diffusion")
    found = [open_generator(saved.folder, with_outside(saved, snapshot=step)) for step in (1, None)]
    for copy in found:
        assert isinstance(copy, Diffusion) and copy.outside is not None and copy.guide is None
        assert copy.outside.fingerprint == full.fingerprint
        assert not copy.outside.training and not any(each.requires_grad for each in copy.outside.parameters())
    assert found[0].fingerprint != found[1].fingerprint
    assert load_generator(saved.folder, "diffusion").outside is None  # type: ignore[union-attr]


def test_samples_tell_the_model_around_and_are_kept_until_it_changes(saved: RunConfig, device: Device) -> None:
    request: dict[str, Any] = {"run": saved, "family": "diffusion", "device": device, "num": 2}
    config = with_outside(saved, num_steps=3)
    folder = sample(config=config, **request)
    stamp = (folder / "000000.png").stat().st_mtime_ns
    told = json.loads((folder / "samples.json").read_text())
    fingerprints = [load_model(saved.folder / name)[0]["fingerprint"] for name in ("diffusion", "full")]
    assert [told["generator"], told["outside"]] == fingerprints
    assert told["settings"]["outside"] == str(saved.folder / "full")
    sample(config=config, **request)
    assert (folder / "000000.png").stat().st_mtime_ns == stamp
    save_model(saved.folder / "full", weights_of(saved, FULL, 7), card_of(saved, FULL))
    sample(config=config, **request)
    assert (folder / "000000.png").stat().st_mtime_ns != stamp
    assert "outside" not in json.loads((sample(config=copy_config(2), **request) / "samples.json").read_text())


def test_a_folder_without_a_model_of_all_levels_is_refused(saved: RunConfig) -> None:
    config = AutoregressiveConfig(model=AutoregressiveModelConfig(preset="tiny", depth=1, width=16, heads=2))
    card = card_of(saved, config)
    save_model(saved.folder / "autoregressive", build_network(config.model, card).state_dict(), card)
    for outside, message in (
        ("nowhere", r"diffusion\.sample\.outside='nowhere': .*model\.json is missing"),
        (
            str(saved.folder / "autoregressive"),
            r"sample\.outside=.* describes 'autoregressive', not family='diffusion'",
        ),
        (
            str(saved.folder),
            r"sample\.outside=.* was itself trained on one cluster .*: name a model that was trained on",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_generator(saved.folder, "diffusion", outside=outside)
    with pytest.raises(ValueError, match="outside='full' is of a diffusion model, but family='autoregressive'"):
        load_generator(saved.folder, "autoregressive", outside="full")


# Training


def test_training_refuses_a_model_that_cannot_serve_before_it_begins(saved: RunConfig, device: Device) -> None:
    shutil.rmtree(saved.folder / "diffusion")
    settings: dict[str, Any] = {"run": saved, "data": DataConfig(workers=0), "family": "diffusion", "device": device}
    card, weights = load_model(saved.folder / "full")
    save_model(saved.folder / "full", weights, {**card, "class_names": ["x", "y", "z"]})
    with pytest.raises(ValueError, match=r"diffusion\.sample\.outside=.* has class_names=\['x', 'y', 'z'\]"):
        train_generator(config=with_outside(saved), **settings)
    shutil.rmtree(saved.folder / "full")
    with pytest.raises(ValueError, match=r"diffusion\.sample\.outside=.*model\.json is missing"):
        train_generator(config=with_outside(saved), **settings)
    assert not (saved.folder / "diffusion").exists()


def test_the_model_around_takes_no_part_in_training(saved: RunConfig, device: Device, tmp_path: Path) -> None:
    """Nor in its previews, which show the network alone."""
    shutil.rmtree(saved.folder / "diffusion")
    shutil.copytree(saved.folder, tmp_path / "twin")
    settings: dict[str, Any] = {"data": DataConfig(workers=0), "family": "diffusion", "device": device}
    inside = train_generator(run=saved, config=with_outside(saved, guidance=2.0), **settings)
    alone = train_generator(run=dataclasses.replace(saved, name="twin"), config=copy_config(2), **settings)
    (card, first), (_, second) = load_model(inside), load_model(alone)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert card["sample"]["outside"] == str(saved.folder / "full")
