# SPDX-License-Identifier: Apache-2.0

"""Which layers of a decoder see a window only, and which have no rotary positions: a parsed config.json flows in, the
numbers of these layers flow out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.errors import UserError
from hintsd_jax.models.families import Family
from hintsd_jax.models.hf_keys import is_dimension, short

FULL, WINDOWED = "full_attention", "sliding_attention"  # names in layer_types, and of their rotary settings
# The window's size; of files that do not name the layers, how many make one turn, of which the last has none.
_WINDOW_KEYS = ("sliding_window", "sliding_window_pattern", "_sliding_window_pattern")
# 1 or 0 for each layer, or else all but every so many rotate.
_ROTATED_KEYS = ("no_rope_layers", "no_rope_layer_interval")


def keys(family: Family) -> tuple[str, ...]:
    """The keys that are read here, but for layer_types, which is in files of all families."""
    return _WINDOW_KEYS * (family.full_every is not None) + _ROTATED_KEYS * family.skips_rope


def refuse(hf: Mapping[str, Any], family: Family) -> None:
    """Raises UserError where a file of a family with windows does not state their size, or names other layers."""
    if family.full_every is not None and "sliding_window" not in hf:
        raise UserError(
            f"config.json: sliding_window is absent, which means a window in {family.architecture} whose size the file"
            " does not say; it must be null where there is none"
        )
    kinds, known = hf.get("layer_types") or [], [FULL]
    if family.full_every is not None and hf["sliding_window"] is not None:
        known.append(WINDOWED)
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise UserError(f"config.json: layer_types is {short(kinds)}; only {' and '.join(known)} are supported here")


def read(hf: Mapping[str, Any], num_layers: Any, family: Family) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(layers with a window, layers that do not rotate). Of a file that `refuse` has passed."""
    if not is_dimension(num_layers):
        return (), ()  # refused later
    windowed = family.full_every is not None and hf["sliding_window"] is not None
    return (
        _windowed(hf, num_layers, family) if windowed else (),
        _unrotated(hf, num_layers) if family.skips_rope else (),
    )


def to_hf(
    family: Family, num_layers: int, window: int | None, windowed: Sequence[int], unrotated: Sequence[int]
) -> dict[str, Any]:
    """What `read` reads."""
    hf: dict[str, Any] = {}
    if family.full_every is not None:
        hf["sliding_window"] = window
    if family.full_every:
        hf["layer_types"] = [WINDOWED if n in windowed else FULL for n in range(num_layers)]
    if family.skips_rope:
        hf["no_rope_layers"] = [int(n not in unrotated) for n in range(num_layers)]
    return hf


def _windowed(hf: Mapping[str, Any], num_layers: int, family: Family) -> tuple[int, ...]:
    """Those named so, or, where none is named, all but every so many."""
    kinds, every = hf.get("layer_types"), family.full_every
    if kinds:
        if len(kinds) != num_layers:
            raise UserError(f"config.json: layer_types must name each of {num_layers} layers, not {len(kinds)}")
        if every == 0 and len(set(kinds)) > 1:
            raise UserError(f"config.json: layer_types are of two kinds, unlike in {family.architecture}")
        return tuple(n for n, kind in enumerate(kinds) if kind == WINDOWED)
    patterns = [hf[key] for key in _WINDOW_KEYS[1:] if hf.get(key) is not None]
    if any(not is_dimension(pattern) or pattern != patterns[0] for pattern in patterns):
        raise UserError(f"config.json: sliding_window_pattern must be one positive integer, not {short(patterns)}")
    if every == 0 and patterns:
        raise UserError(f"config.json: sliding_window_pattern is {patterns[0]}, unlike in {family.architecture}")
    every = patterns[0] if patterns else every
    return tuple(n for n in range(num_layers) if not every or (n + 1) % every)


def _unrotated(hf: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Those with a 0 in the list, or, without one, every so many."""
    rotated, interval = hf.get("no_rope_layers"), hf.get("no_rope_layer_interval", 4)
    if rotated is None:
        if not is_dimension(interval):
            raise UserError(f"config.json: no_rope_layer_interval must be a positive integer, not {short(interval)}")
        return tuple(range(interval - 1, num_layers, interval))
    if not isinstance(rotated, list) or len(rotated) != num_layers or any(each not in (0, 1) for each in rotated):
        raise UserError(
            f"config.json: no_rope_layers must have a 0 or 1 for each of {num_layers} layers, not {short(rotated)}"
        )
    return tuple(n for n, each in enumerate(rotated) if not each)
