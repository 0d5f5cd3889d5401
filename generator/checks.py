"""Checks that the sections of a generator share. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(key: str, config: Any) -> None:
    """Raise ValueError unless each field of a Literal type holds one of its choices: calls from Python may not."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{key}.{name}={value!r} must be one of {', '.join(map(str, get_args(kind)))}")


def check_finite(key: str, config: Any, remedy: str = "") -> None:
    """Raise ValueError if a number of a section is infinite or none; YAML knows such."""
    for each in fields(config):
        value = getattr(config, each.name)
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError(f"{key}.{each.name}={value} must be finite{remedy}")


def check_at_least(key: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{key}={value} must be at least {least}")


def check_scale(key: str, scale: float | None) -> None:
    if scale is not None and not scale > 0:
        raise ValueError(f"{key}={scale} must be positive")


def check_share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{key}={value} must lie in [0, 1]")
