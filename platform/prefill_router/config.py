"""The base class of configuration models, and a validator for renamed fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class FrozenModel(BaseModel):
    """An immutable pydantic model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def renamed_fields(**names: str) -> Any:
    """A validator that accepts old names of fields: `renamed_fields(old="new")`.

    Assign it to a private class attribute of a model. It raises ValueError if the input has both names of a field.
    """

    def rename(cls: type[BaseModel], values: Any) -> Any:
        if not isinstance(values, dict) or not names.keys() & values.keys():
            return values
        for old, new in names.items():
            if old in values and new in values:
                raise ValueError(f"{new}: given twice, also under its earlier name {old}; leave {old} out")
        return {names.get(name, name): value for name, value in values.items()}

    return model_validator(mode="before")(classmethod(rename))  # type: ignore[arg-type]
