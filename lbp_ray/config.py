"""Configuration: YAML plus ``key=value`` → one frozen, validated model; every error at once.

Only entry points and composition roots see these models. Everything below takes plain keyword arguments.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

_VARIABLE = re.compile(r"\$\{(\w+)\}")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every fault and what to do."""


class FrozenModel(BaseModel):
    """A configuration section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _require_absolute(value: Path) -> Path:
    if not value.is_absolute():
        msg = (
            f"must be an absolute path on storage that every node sees, found {str(value)!r}; "
            "a relative one would land in a throwaway copy of the working directory"
        )
        raise ValueError(msg)
    return value


AbsolutePath = Annotated[Path, AfterValidator(_require_absolute)]
"""A path that means the same on every node and inside a Ray job."""

Model = TypeVar("Model", bound=BaseModel)


def load_config(model: type[Model], path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Model:
    """Read a YAML file, apply overrides and validate.

    Parameters
    ----------
    model
        The pydantic model of the whole file.
    path
        YAML file. ``${NAME}`` in a string is replaced by the environment variable of that name.
    overrides
        ``section.key=value`` pairs, applied in order; values are parsed as YAML.

    Returns
    -------
    Model
        The validated configuration.

    Raises
    ------
    ConfigError
        If the file is missing or not a mapping, an override is malformed, a variable is not set, a key is unknown or a
        value is out of range. All faults of the content are listed together.
    """
    if not path.is_file():
        msg = f"configuration file not found: {path}; the project's own are under configs/"
        raise ConfigError(msg)
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        msg = f"{path} is not valid YAML: {error}"
        raise ConfigError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} must hold a mapping of sections, found {type(content).__name__}"
        raise ConfigError(msg)
    for override in overrides:
        _apply_override(content, override)
    missing: list[str] = []
    content = _expand(content, missing)
    faults = [f"environment variable {name} is not set: export {name}=/absolute/path" for name in sorted(set(missing))]
    try:
        validated = model.model_validate(content)
    except ValidationError as error:
        # A value with an unset variable in it is named above; what else is wrong with it cannot be known.
        faults += [
            _explain(model, fault)
            for fault in error.errors()
            if not (isinstance(fault["input"], str) and _VARIABLE.search(fault["input"]))
        ]
    if faults:
        msg = f"{path}: {len(faults)} fault(s)\n" + "\n".join(f"  - {fault}" for fault in faults)
        raise ConfigError(msg)
    return validated


def _apply_override(content: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or not all(keys):
        msg = f"override {override!r} is not of the form section.key=value"
        raise ConfigError(msg)
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            msg = f"override {override!r}: {key!r} is a value, not a section"
            raise ConfigError(msg)
    content[keys[-1]] = yaml.safe_load(text)


def _expand(value: Any, missing: list[str]) -> Any:  # noqa: ANN401  (any YAML value)
    if isinstance(value, dict):
        return {key: _expand(item, missing) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, missing) for item in value]
    if isinstance(value, str):
        missing += [name for name in _VARIABLE.findall(value) if name not in os.environ]
        return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), value)
    return value


def _explain(model: type[BaseModel], fault: Any) -> str:  # noqa: ANN401  (pydantic's ErrorDetails)
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _known_keys(model, fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(sorted(known))}"
        return f"{where}: unknown key{hint}"
    found = "" if fault["type"] == "missing" else f" (found {fault['input']!r})"
    return f"{where or 'file'}: {fault['msg']}{found}"


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        current = field.annotation if field is not None else None
    return list(getattr(current, "model_fields", {}))
