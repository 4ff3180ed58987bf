# SPDX-License-Identifier: Apache-2.0

"""The `env.options` of an environment: a mapping in, its own dataclass out, each field of the type of its default."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from hintsd_jax.errors import UserError
from hintsd_jax.texts import did_you_mean

T = TypeVar("T")


def read(cls: type[T], environment: str, options: Mapping[str, Any]) -> T:
    """The options as a `cls`, a dataclass with a default for every field. A whole number is a number too, and a list is
    as good as a tuple; ranges are the environment's to check.

    Raises:
      UserError: an unknown option (with the nearest name), or one of another type.
    """
    any_class: Any = cls  # pyright has no bound for "a dataclass"
    defaults = {field.name: _default(field) for field in dataclasses.fields(any_class)}
    for name, value in options.items():
        if name not in defaults:
            known = did_you_mean(name, defaults)
            raise UserError(f"env.options.{name}: environment {environment!r} has no such option; {known}")
        kind = type(defaults[name])
        others = {float: (int,), tuple: (list,)}.get(kind, ())
        if type(value) is not kind and type(value) not in others:
            raise UserError(f"{environment}: env.options.{name} is {value!r}: give a value of type {kind.__name__}")
    return cls(**options)


def _default(field: Any) -> Any:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default
