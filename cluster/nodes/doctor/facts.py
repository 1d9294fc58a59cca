"""What a host told of itself, as values. What is odd or missing counts as not known. Pure.

A probe that runs in a strange place may tell strange things; none of them may keep the doctor from
judging the rest. Called by: nodes.doctor.examine, judge, compare.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

Bytes = Annotated[int, Field(ge=0, le=2**63)]
Count = Annotated[int, Field(ge=0, le=100_000)]
PortNumber = Annotated[int, Field(ge=0, le=65_535)]
Limit = Annotated[int, Field(ge=-1, le=2**63)]  # -1: none


class _Told(BaseModel):
    """Each field by itself: what does not fit its type is replaced by the default."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _default_for_odd(
        cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        try:
            return handler(value)
        except ValidationError:
            field = cls.model_fields[info.field_name or ""]
            return field.get_default(call_default_factory=True, validated_data={})


class System(_Told):
    """`match_level`: how alike Ray wants Pythons to be ("": its default, all of the version)."""

    hostname: str = ""
    python: str = ""
    executable: str = ""
    match_level: str = ""
    hash_seed: str = ""


class Interpreter(_Told):
    """The Python of an engine, or of a container."""

    exists: bool | None = None
    python: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    error: str = ""


class Devices(_Told):
    nvidia: Count = 0
    davinci: Count = 0


class Gpu(_Told):
    names: tuple[str, ...] = ()
    driver: str = ""
    error: str = ""


class Npu(_Told):
    driver: str = ""
    cann: str = ""
    error: str = ""


class Shm(_Told):
    total_bytes: Bytes | None = None
    free_bytes: Bytes | None = None


class Limits(_Told):
    open_files: Limit | None = None
    locked_bytes: Limit | None = None


class Port(_Told):
    """`error` "": it can be bound. `owner`: the cluster's mark, if a process of ours has it."""

    port: PortNumber = 0
    address: str = ""
    error: str = ""
    by: str = ""
    owner: str = ""


class Folder(_Told):
    path: str = ""
    writable: bool | None = None
    owner: str = ""
    free_bytes: Bytes | None = None


class Model(_Told):
    """`digest`: of names and sizes; `config`: of config.json; `missing`: weights that are not there
    though the folder's index names them."""

    id: str = ""
    path: str = ""
    exists: bool | None = None
    files: Count = 0
    bytes: Bytes = 0
    digest: str = ""
    config: str = ""
    missing: tuple[str, ...] = ()
    free_bytes: Bytes | None = None


class Container(_Told):
    has_image: bool | None = None
    runs: bool | None = None
    python: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    error: str = ""


class Facts(_Told):
    """One host. `errors`: parts that could not be looked at, and why."""

    system: System = Field(default_factory=System)
    packages: dict[str, str] = Field(default_factory=dict)
    interpreters: dict[str, Interpreter] = Field(default_factory=dict)
    commands: dict[str, bool] = Field(default_factory=dict)
    libraries: dict[str, str] = Field(default_factory=dict)
    devices: Devices | None = None
    gpu: Gpu | None = None
    npu: Npu | None = None
    rdma_devices: tuple[str, ...] | None = None
    memory_bytes: Bytes | None = None
    shm: Shm = Field(default_factory=Shm)
    limits: Limits = Field(default_factory=Limits)
    ephemeral: tuple[PortNumber, PortNumber] | None = None
    ports: tuple[Port, ...] = ()
    folders: dict[str, Folder] = Field(default_factory=dict)
    models: tuple[Model, ...] = ()
    container: Container | None = None
    errors: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def of(cls, told: Any) -> Facts:
        """From the probe's answer, whatever it is."""
        return cls.model_validate(told) if isinstance(told, dict) else cls()


class Clock(BaseModel):
    """A host's clock beside the operator's: ahead by `offset_s`, give or take `error_s`."""

    model_config = ConfigDict(frozen=True)

    offset_s: float
    error_s: float
