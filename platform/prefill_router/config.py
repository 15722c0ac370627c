"""The base of every configuration model, and the reading of fields under their earlier names."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class FrozenModel(BaseModel):
    """An immutable pydantic model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def renamed_fields(**names: str) -> Any:
    """A validator that reads each field `old` under its present name: `renamed_fields(old="new")`.

    Assign it to a private class attribute of a model. It raises ValueError if a file gives both names.
    """

    def rename(cls: type[BaseModel], values: Any) -> Any:
        if not isinstance(values, dict) or not names.keys() & values.keys():
            return values
        for old, new in names.items():
            if old in values and new in values:
                raise ValueError(f"{new}: given twice, also under its earlier name {old}; leave {old} out")
        return {names.get(name, name): value for name, value in values.items()}

    return model_validator(mode="before")(classmethod(rename))  # type: ignore[arg-type]
