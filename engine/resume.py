"""What a run is and where it stands: its identity, and its whole training state to and from a checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import checkpoint
from engine.checkpoint import Weights
from engine.config import difference
from engine.device import fill, full_state, unwrapped, whole
from engine.ema import Average

# Settings that may change between the start of a run and its resumption: told, but not refused.
CHANGEABLE = {
    *("steps", "accumulate", "log_every", "preview_every", "checkpoint_every", "keep_last", "milestone_every"),
    *("snapshot_every", "max_bad_steps", "workers", "max_corrupt", "sample", "precision"),
}


def check_identity(folder: Path, identity: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
    """Compare with the folder's identity.json (written at the first start); refuse what would mix two runs.

    Settings that did not exist yet when the run was begun count as having their `defaults`.

    Raises:
        ValueError: a setting that shapes the weights has changed; the message lists each old and new value.
    """
    path = folder / "identity.json"
    if path.exists():
        changes = difference(completed(json.loads(path.read_text()), defaults or {}), identity)
        lines = {key: f"  {key}: {before!r} -> {after!r}" for key, (before, after) in changes.items()}
        serious = [line for key, line in lines.items() if not CHANGEABLE & set(key.split("."))]
        if serious:
            raise ValueError(
                f"{folder} was begun with another configuration:\n" + "\n".join(serious) + "\n"
                f"Give the run another name (--run.name=...), restore these values, or delete {folder}"
            )
        if lines:
            print(f"{folder} resumes with changed settings:\n" + "\n".join(lines.values()), file=sys.stderr)
    checkpoint.write_json(path, identity)


def is_finished(folder: Path, identity: dict[str, Any], defaults: dict[str, Any] | None = None) -> bool:
    """Whether the folder holds an undamaged model whose card names exactly this identity, `defaults` as above."""
    if not (folder / "model.json").is_file():
        return False
    card, _ = checkpoint.load_model(folder)
    return completed(card.get("identity", {}), defaults or {}) == json.loads(json.dumps(identity))


def completed(stored: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`stored` with the keys that it lacks, at any depth."""
    filled = {**defaults, **stored}
    shared = stored.keys() & defaults.keys()
    both = (key for key in shared if isinstance(stored[key], dict) and isinstance(defaults[key], dict))
    return filled | {key: completed(stored[key], defaults[key]) for key in both}


def capture(
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    averages: Mapping[str, Average],
) -> tuple[Weights, Weights, dict[str, Any]]:
    """Weights, averaged weights and optimizer states, whole and on the CPU (collective under FSDP).

    An average goes by the name of its network, or by that name, `@` and what tells it from others of the network.
    """
    weights = {name: full_state(module) for name, module in modules.items()}
    state = {
        "optimizers": {name: _mapped(optimizer.state_dict(), whole) for name, optimizer in optimizers.items()},
        "updates": {name: average.updates for name, average in averages.items()},
    }
    return weights, averaged_state(modules, averages), state


def averaged_state(modules: Mapping[str, nn.Module], averages: Mapping[str, Average]) -> Weights:
    """For each average the state of its network with the averaged weights in place."""
    states = {}
    for name, average in averages.items():
        module = modules[averaged_network(name)]
        with average.applied(module):
            states[name] = full_state(module)
    return states


def averaged_network(name: str) -> str:
    """The network of an average: `network` of `network@0.05`."""
    return name.partition("@")[0]


def restore(
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    averages: Mapping[str, Average],
    saved: tuple[Weights, Weights, dict[str, Any]],
) -> None:
    """The counterpart of `capture`; every process reads the whole state and keeps its share."""
    weights, averaged, state = saved
    for name, module in modules.items():
        _load(module, weights[name])
        _load_optimizer(optimizers[name], state["optimizers"][name])
    for name, average in averages.items():
        average.updates, network = state["updates"][name], averaged_network(name)
        with average.applied(modules[network]):
            _load(modules[network], averaged[name])
        _load(modules[network], weights[network])  # buffers are not averaged


def _load(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    targets = unwrapped(module).state_dict()
    missing, unknown = sorted(targets.keys() - state.keys()), sorted(state.keys() - targets.keys())
    if missing or unknown:
        raise ValueError(f"checkpoint of another network: missing {missing[:3]}, unknown {unknown[:3]}")
    for name, target in targets.items():
        fill(target, state[name])


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Moments are copied to where their parameter lives, as shards if it is sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, moments in state["state"].items():
        for key, value in moments.items():
            if value.shape == parameters[index].shape and key != "step":
                moments[key] = torch.empty_like(parameters[index]).detach()
                fill(moments[key], value)
    optimizer.load_state_dict(state)


def _mapped(tree: Any, function: Any) -> Any:
    """A nested dict or list with `function` applied to every tensor."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, function) for key, value in tree.items()}
    return [_mapped(value, function) for value in tree] if isinstance(tree, (list, tuple)) else tree
