"""Settings from a YAML file, then from `key=value` arguments, then from flags; later ones win.

Knows neither which keys there are nor what they mean: whoever takes the settings refuses unknown ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from outdraft.errors import UserError


def read_settings(file: Path | None, overrides: Iterable[str], **flags: Any) -> dict[str, Any]:
    """All settings together; flags that are None were not given.

    Raises:
        UserError: no such file, no mapping in it, or an override that is not `key=value`.
    """
    settings = _from_file(file) if file is not None else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' is no setting; write key=value, such as learning_rate=1e-3")
        _put(settings, key.split("."), _value(override, value))
    settings.update({name: value for name, value in flags.items() if value is not None})
    return settings


def _from_file(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} cannot be read ({type(error).__name__}); check the path") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"--config {file}{where} is not YAML ({getattr(error, 'problem', error)}); mend it") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"--config {file} must hold `key: value` lines, not a {type(settings).__name__}")
    return {str(key): value for key, value in settings.items()}


def _value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise UserError(f"the value in '{override}' is not YAML; quote it") from error


def _put(settings: dict[str, Any], path: list[str], value: Any) -> None:
    """Set `settings[a][b] = value` for the path a, b."""
    for name in path[:-1]:
        inner = settings.setdefault(name, {})
        if not isinstance(inner, dict):
            raise UserError(f"'{'.'.join(path)}' cannot be set: '{name}' is a value, not a section")
        settings = inner
    settings[path[-1]] = value
