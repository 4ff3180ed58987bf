# SPDX-License-Identifier: Apache-2.0

"""The rotary settings of a config.json: a parsed file flows in, the base and the scaling of its frequencies flow out.

What the decoder does not compute is refused by its key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hintsd_jax.errors import UserError
from hintsd_jax.models.hf_keys import is_off, is_positive, short

# Our field -> the key in rope_scaling or rope_parameters.
ROPE_KEYS = {
    "factor": "factor",
    "low_freq": "low_freq_factor",
    "high_freq": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}
# Of such a section: what is read.
_ROPE_READ = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_KEYS.values()}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The "llama3" scaling of rotary frequencies for contexts longer than those first trained on (see `rope`).

    Wavelengths, in tokens, above original_positions / low_freq are divided by `factor`, those below original_positions
    / high_freq stay, those between are blended. Raises UserError on impossible values.
    """

    factor: float
    low_freq: float
    high_freq: float
    original_positions: int

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not is_positive(value):
                raise UserError(f"config.json: llama3 rope scaling: {name} must be a positive number, not {value!r}")
        if self.high_freq <= self.low_freq:
            raise UserError(
                f"config.json: llama3 rope scaling: high_freq ({self.high_freq}) must exceed low_freq ({self.low_freq})"
            )


def read_rope(hf: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
    """The rotary base and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`
    (older).

    A file may have both; what they say must agree. Raises UserError where it does not, and on what is not supported.
    """
    sections = {}
    for name in ("rope_parameters", "rope_scaling"):
        if (section := hf.get(name)) is not None:
            if not isinstance(section, Mapping):
                raise UserError(f"config.json: {name} is {short(section)}, not an object")
            sections[name] = section
    thetas = [part["rope_theta"] for part in (*sections.values(), hf) if part.get("rope_theta") is not None]
    if not thetas:
        raise UserError("config.json: missing rope_theta (or rope_parameters.rope_theta)")
    scalings = [_rope_scaling(name, section) for name, section in sections.items()]
    if any(theta != thetas[0] for theta in thetas) or any(scaling != scalings[0] for scaling in scalings):
        raise UserError("config.json: rope_parameters, rope_theta and rope_scaling contradict each other")
    theta = float(thetas[0]) if is_positive(thetas[0]) else thetas[0]
    return theta, scalings[0] if scalings else None


def _rope_scaling(section: str, rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise UserError(f"config.json: {section} has the rope_type {short(kind)}, but the type {short(rope['type'])}")
    if kind not in ("default", "llama3"):
        raise UserError(f"config.json: {section}.rope_type is {short(kind)}; only 'default' and 'llama3' are supported")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: {section}.partial_rotary_factor is {short(rope['partial_rotary_factor'])};"
            " only 1.0 is supported"
        )
    unheard = sorted(key for key in rope if key not in _ROPE_READ and not is_off(rope[key]))
    if kind == "default":
        unheard += [key for key in ROPE_KEYS.values() if rope.get(key) not in (None, 1)]
    if unheard:
        raise UserError(
            f"config.json: {section}.{ascii(unheard[0])[1:-1]:.60} is {short(rope[unheard[0]])}, which is not"
            f" supported where the type is {kind!r}"
        )
    if kind == "default":
        return None
    missing = [key for key in ROPE_KEYS.values() if rope.get(key) is None]
    if missing:
        raise UserError(f"config.json: {section} of type llama3 lacks {', '.join(missing)}")
    return RopeScaling(**{name: rope[key] for name, key in ROPE_KEYS.items()})
