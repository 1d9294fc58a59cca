"""The base of every section of a topology file, and what a name is.

Used by `topology.schema` and by the modules that hold single sections of it.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationInfo, field_validator

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$")]


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes/no/on/off as booleans, which Python takes for 1 and 0.
        if isinstance(value, bool) and info.field_name is not None:
            wanted = cls.model_fields[info.field_name].annotation
            kinds = {getattr(kind, "__origin__", kind) for kind in (wanted, *get_args(wanted))}
            if bool not in kinds and kinds & {int, float}:
                raise ValueError(f"found {str(value).lower()}; write a number")
        return value
