# SPDX-License-Identifier: Apache-2.0

"""The rotary settings of a config.json: a parsed file flows in, the bases and the scaling of its frequencies flow out.

What the decoder does not compute is refused by its key. `rope` has the formulas.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from hintsd_jax.errors import UserError
from hintsd_jax.models.families import Family
from hintsd_jax.models.hf_keys import LARGEST, is_off, is_positive, short
from hintsd_jax.models.layer_kinds import FULL, WINDOWED


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies differ from those of a shorter context first trained on: of one `kind`, Hugging
    Face's name. KEYS: our field -> the key in rope_scaling or rope_parameters. Raises UserError on impossible values.
    """

    kind: ClassVar[str]
    KEYS: ClassVar[Mapping[str, str]]

    factor: float

    def __post_init__(self):
        for name, key in self.KEYS.items():
            value = getattr(self, name)
            is_left_out = value is None and self._default(name) is None
            if not (is_positive(value) or is_left_out):
                raise UserError(
                    f"config.json: {self.kind} rope scaling: {key} must be a positive number, not {value!r}"
                )

    @classmethod
    def _default(cls, name: str) -> Any:
        return next(field.default for field in dataclasses.fields(cls) if field.name == name)

    @classmethod
    def read(cls, section: str, rope: Mapping[str, Any]) -> RopeScaling:
        """Raises UserError where a key without a default is missing, or a value is impossible."""
        needed = {key for name, key in cls.KEYS.items() if cls._default(name) is dataclasses.MISSING}
        if missing := [key for key in cls.KEYS.values() if key in needed and rope.get(key) is None]:
            raise UserError(f"config.json: {section} of type {cls.kind} lacks {', '.join(missing)}")
        return cls(**{name: rope[key] for name, key in cls.KEYS.items() if rope.get(key) is not None})

    def to_hf(self) -> dict[str, Any]:
        """Its section of a config.json, without the base."""
        values = {key: getattr(self, name) for name, key in self.KEYS.items()}
        return {"rope_type": self.kind} | {key: value for key, value in values.items() if value is not None}


_FACTOR = {"factor": "factor"}
_ORIGINAL = {"original_positions": "original_max_position_embeddings"}


@dataclasses.dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """All pairs rotate `factor` times slower (Gemma 3's layers without a window)."""

    kind = "linear"
    KEYS = _FACTOR


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Wavelengths, in tokens, above original_positions / low_freq are divided by `factor`, those below
    original_positions / high_freq stay, those between are blended.
    """

    kind = "llama3"
    KEYS = _FACTOR | {"low_freq": "low_freq_factor", "high_freq": "high_freq_factor"} | _ORIGINAL

    low_freq: float
    high_freq: float
    original_positions: int

    def __post_init__(self):
        super().__post_init__()
        if self.high_freq <= self.low_freq:
            raise UserError(
                f"config.json: llama3 rope scaling: high_freq ({self.high_freq}) must exceed low_freq ({self.low_freq})"
            )


@dataclasses.dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """Pairs that rotate more than `fast` times within the first context stay, those that do less than `slow` times
    rotate `factor` times slower, those between are blended; cosine and sine are multiplied by `attention_factor`
    (None: 0.1 ln(factor) + 1), so that scores are by its square.
    """

    kind = "yarn"
    KEYS = _FACTOR | _ORIGINAL | {"fast": "beta_fast", "slow": "beta_slow", "attention_factor": "attention_factor"}

    original_positions: int
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.fast <= self.slow:
            raise UserError(
                f"config.json: yarn rope scaling: beta_fast ({self.fast}) must exceed beta_slow ({self.slow})"
            )
        # Logarithms are taken of their quotients.
        for key, value, least in (
            ("beta_slow", self.slow, 1e-3),
            ("beta_fast", self.fast, 1e-3),
            ("original_max_position_embeddings", self.original_positions, 1),
        ):
            if not least <= value <= LARGEST:
                raise UserError(f"config.json: yarn rope scaling: {key} must be from {least} to {LARGEST}, not {value}")

    @property
    def magnitude(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


_SCALINGS: dict[str, type[RopeScaling]] = {kind.kind: kind for kind in (LinearScaling, Llama3Scaling, YarnScaling)}
# Of such a section: what is read whatever the kind is.
_READ = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_CONTRADICTION = "config.json: rope_parameters, rope_theta and rope_scaling contradict each other"


def read_rope(hf: Mapping[str, Any], family: Family) -> tuple[Any, RopeScaling | None, Any]:
    """The rotary base and scaling, and the base of layers with windows where these rotate apart (else None), from
    `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (older).

    A file may have both; what they say must agree. Raises UserError where it does not, and on what is not supported.
    """
    new, old = (_section(hf, name) for name in ("rope_parameters", "rope_scaling"))
    sections, thetas = {"rope_parameters": new, "rope_scaling": old}, [hf.get("rope_theta")]
    window_thetas = []
    if family.rotates_windows_apart:
        window_thetas.append(hf.get(family.window_theta_key))
        if new is not None:
            kinds = {kind: _section(new, kind, "rope_parameters.") for kind in (FULL, WINDOWED)}
            if others := sorted(set(map(str, new)) - set(kinds)):
                raise UserError(f"config.json: rope_parameters has {others[0]!r} beside {FULL} and {WINDOWED}")
            windowed = kinds[WINDOWED] or {}
            if _scaling(f"rope_parameters.{WINDOWED}", windowed) is not None:
                raise UserError(f"config.json: rope_parameters.{WINDOWED} is scaled, which is not supported")
            window_thetas.append(windowed.get("rope_theta"))
            del sections["rope_parameters"]
            sections[f"rope_parameters.{FULL}"] = kinds[FULL]
    given = {name: section for name, section in sections.items() if section is not None}
    thetas += [section.get("rope_theta") for section in given.values()]
    theta = _agreed("rope_theta (or rope_parameters.rope_theta)", thetas)
    scalings = [_scaling(name, section) for name, section in given.items()]
    if any(scaling != scalings[0] for scaling in scalings):
        raise UserError(_CONTRADICTION)
    window_theta = None
    if family.rotates_windows_apart:
        window_theta = _agreed(f"{family.window_theta_key} (or rope_parameters.{WINDOWED}.rope_theta)", window_thetas)
    return theta, scalings[0] if scalings else None, window_theta


def rope_to_hf(theta: float, scaling: RopeScaling | None, window_theta: float | None, family: Family) -> dict[str, Any]:
    """The rotary settings in both forms, or in the newer alone where the older has one base for two."""
    scaled = None if scaling is None else scaling.to_hf()
    section = {"rope_theta": theta, **(scaled or {"rope_type": "default"})}
    old = {"rope_theta": theta, "rope_scaling": scaled}
    if not family.rotates_windows_apart:
        return old | {"rope_parameters": section}
    new = {"rope_parameters": {FULL: section, WINDOWED: {"rope_theta": window_theta, "rope_type": "default"}}}
    if old.get(family.window_theta_key, window_theta) != window_theta:
        return new
    return new | old | {family.window_theta_key: window_theta}


def _section(parent: Mapping[str, Any], name: str, where: str = "") -> Mapping[str, Any] | None:
    section = parent.get(name)
    if section is not None and not isinstance(section, Mapping):
        raise UserError(f"config.json: {where}{name} is {short(section)}, not an object")
    return section


def _agreed(key: str, thetas: list[Any]) -> Any:
    """The one base of those that are given, a number as float."""
    thetas = [theta for theta in thetas if theta is not None]
    if not thetas:
        raise UserError(f"config.json: missing {key}")
    if any(theta != thetas[0] for theta in thetas):
        raise UserError(_CONTRADICTION)
    return float(thetas[0]) if is_positive(thetas[0]) else thetas[0]


def _scaling(section: str, rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise UserError(f"config.json: {section} has the rope_type {short(kind)}, but the type {short(rope['type'])}")
    if kind != "default" and (not isinstance(kind, str) or kind not in _SCALINGS):
        raise UserError(
            f"config.json: {section}.rope_type is {short(kind)}; only 'default', {', '.join(map(repr, _SCALINGS))} are"
            " supported"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: {section}.partial_rotary_factor is {short(rope['partial_rotary_factor'])};"
            " only 1.0 is supported"
        )
    read = set() if kind == "default" else set(_SCALINGS[kind].KEYS.values())
    of_any = {key for each in _SCALINGS.values() for key in each.KEYS.values()}
    unheard = sorted(str(key) for key in rope if key not in _READ | of_any and not is_off(rope[key]))
    unheard += [key for key in sorted(of_any - read) if rope.get(key) not in (None, 1)]
    if kind == YarnScaling.kind and rope.get("truncate") not in (None, True):
        unheard.append("truncate")  # false is not off: the ends of the blend would not be rounded
    if unheard:
        raise UserError(
            f"config.json: {section}.{ascii(unheard[0])[1:-1]:.60} is {short(rope.get(unheard[0]))}, which is not"
            f" supported where the type is {kind!r}"
        )
    return None if kind == "default" else _SCALINGS[kind].read(section, rope)
