"""The finished models of a run in a folder of their own: small, without checkpoints, loadable as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from engine.checkpoint import load_model, save_model, write_atomic
from generator.aligned_steps import copy_aligned
from generator.captions import prompts_of
from generator.condition import condition_config
from generator.snapshots import load_generator
from tokenloom.run_files import FAMILIES, tokenizer_folder

STAGES = ("tokenizer", "autoregressive", "diffusion")


def export(run: Path, out: Path) -> Path:
    """Copy the verified weights and cards of a run, its optimised steps and its scores to `out`; returns it.

    A tokenizer that the run takes from another one is copied from there. Snapshots stay behind: of a model whose own
    samples are drawn from one, or from an average made of them, these very weights are written.

    Raises:
        ValueError: the run has no finished tokenizer, a file is damaged, samples are guided by a snapshot, or `out`
            holds other things.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out={out} is not empty: give a new folder")
    stages = [stage for stage in STAGES if stage == "tokenizer" or (run / stage / "model.json").exists()]
    homes = {stage: (tokenizer_folder(run) if stage == "tokenizer" else run) / stage for stage in stages}
    cards = {stage: load_model(home)[0] for stage, home in homes.items()}
    for card in cards.values():
        _check_guide(card)
    fingerprints = {stage: _write_model(cards[stage], home, out / stage) for stage, home in homes.items()}
    if "diffusion" in homes:
        copy_aligned(homes["diffusion"], out / "diffusion", fingerprints["diffusion"])
    for name in ("config.yaml", "eval/metrics.json"):
        if (run / name).exists():
            shutil.copyfile(run / name, out / Path(name).name)
    lines = [f"| {stage} | `{fingerprint}` |" for stage, fingerprint in fingerprints.items()]
    write_atomic(out / "README.md", "\n".join([*export_usage(cards), *FACTS, *lines, ""]).encode())
    return out


def _check_guide(card: dict[str, Any]) -> None:
    guide = card.get("sample", {}).get("guide")
    if guide is not None and guide.startswith("step-"):
        raise ValueError(
            f"diffusion.sample.guide={guide} is a snapshot, which an export leaves behind: name the folder of a model"
            " instead, or set diffusion.sample.guide=null; `tokenloom generator` then writes it into model.json"
        )


def _write_model(card: dict[str, Any], home: Path, out: Path) -> str:
    """Write the model in `home`, with the weights that its own samples are drawn from; returns their fingerprint."""
    sample = card.get("sample", {})
    chosen = {key: sample[key] for key in ("snapshot", "ema_width") if sample.get(key) is not None}
    if chosen:
        generator = load_generator(home, card["family"], **chosen)
        told = {**generator.card, "sample": {**sample, **dict.fromkeys(chosen)}}
        return save_model(out, generator.network.state_dict(), told)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "model.json"):
        shutil.copyfile(home / name, out / name)
    return card["fingerprint"]


def export_usage(cards: dict[str, dict[str, Any]]) -> list[str]:
    """How to use the models from Python."""
    family = next((family for family in FAMILIES if family in cards), None)
    told, remarks = _told(cards[family]) if family else ("", [])
    call = f'tokenloom.sample("this-folder", "{family}", {told}seeds=[0, 1, 2])'
    line = f"images = {call}" if family else 'tokenizer = tokenloom.load_tokenizer("this-folder")'
    return ["# tokenloom models", "", "```python", "import tokenloom", line, "```", "", *remarks]


def _told(card: dict[str, Any]) -> tuple[str, list[str]]:
    """What three samples are drawn from, as arguments of a call, and what must be known of it."""
    condition = condition_config(card)
    if condition.kind == "image":
        size = f"each 1/{card['low_resolution']} as wide and high as what it makes"
        return "images=small, ", [f"`small` holds three images, uint8 `[3, 3, s, s]`, {size}.", ""]
    if condition.kind == "class":
        return "labels=[0, 1, 2], " if card["num_classes"] > 2 else "", []
    text, num_classes = condition.text, max(1, card["num_classes"])
    labels, captions = [place % num_classes for place in range(3)], ["one text", "another one", "a third"]
    prompts = json.dumps(prompts_of(text, card["class_names"], labels, captions), ensure_ascii=False)
    frozen = f"Texts are read by the {text.encoder.upper()} of `{text.path}`, which is not in this folder."
    return f"prompts={prompts}, ", [] if text.encoder == "bytes" else [frozen, ""]


FACTS = [
    "`config.yaml` says how they were trained, `metrics.json` how they scored and under which protocol.",
    "",
    "| model | fingerprint |",
    "|---|---|",
]
