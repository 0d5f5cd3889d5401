"""The finished models of a run in a folder of their own: small, without checkpoints, loadable as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.checkpoint import load_model, write_atomic
from tokenloom.run_files import tokenizer_folder

STAGES = ("tokenizer", "autoregressive", "diffusion")


def export(run: Path, out: Path) -> Path:
    """Copy the verified weights and cards of a run, and its scores, to `out`; returns it.

    A tokenizer that the run takes from another one is copied from there.

    Raises:
        ValueError: the run has no finished tokenizer, a file is damaged, or `out` holds other things.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out={out} is not empty: give a new folder")
    stages = [stage for stage in STAGES if stage == "tokenizer" or (run / stage / "model.json").exists()]
    homes = {stage: (tokenizer_folder(run) if stage == "tokenizer" else run) / stage for stage in stages}
    cards = {stage: load_model(home)[0] for stage, home in homes.items()}
    for stage, home in homes.items():
        (out / stage).mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "model.json"):
            shutil.copyfile(home / name, out / stage / name)
    for name in ("config.yaml", "eval/metrics.json"):
        if (run / name).exists():
            shutil.copyfile(run / name, out / Path(name).name)
    lines = [f"| {stage} | `{card['fingerprint']}` |" for stage, card in cards.items()]
    write_atomic(out / "README.md", "\n".join([*CARD, *lines, ""]).encode())
    return out


CARD = [
    "# tokenloom models",
    "",
    "```python",
    "import tokenloom",
    'images = tokenloom.sample("this-folder", "autoregressive", labels=[0, 1, 2], seeds=[0, 1, 2])',
    "```",
    "",
    "`config.yaml` says how they were trained, `metrics.json` how they scored and under which protocol.",
    "",
    "| model | fingerprint |",
    "|---|---|",
]
