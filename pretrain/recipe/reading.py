"""Recipes from YAML files and ``key=value`` overrides; what is wrong is said with the nearest right name."""

from __future__ import annotations

import difflib
import importlib.resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pretrain.errors import UserError
from pretrain.recipe.whole import Recipe

T = TypeVar("T", bound=BaseModel)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a file, or of a shipped recipe's name, with ``key.sub=value`` overrides applied.

    Raises:
        UserError: no such recipe, not YAML, an unknown key (with the nearest name), a wrong value.
    """
    try:
        text, where = _read(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a recipe: it is no text ({error})") from None
    data = mapping(text, where)
    for override in overrides or []:
        _override(data, override)
    return parse_recipe(data, where)


def parse_recipe(data: dict[str, Any], where: str) -> Recipe:
    """`data` as a checked Recipe; `where` names it in errors."""
    return parse(Recipe, data, where)


def parse(kind: type[T], data: dict[str, Any], where: str) -> T:
    """`data` as a checked `kind`; UserError, with `where` and the nearest right names, when it is none."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}:\n" + "\n".join(f"  {_explain(kind, e)}" for e in error.errors())) from None


def mapping(text: str, where: str) -> dict[str, Any]:
    """YAML `text` as a mapping; UserError, with `where`, when it is none."""
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{where} must be a mapping of keys to values, not {type(data).__name__}")
    return data


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal value."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(f.name[:-5] for f in importlib.resources.files("recipes").iterdir() if f.name.endswith(".yaml"))


def _read(path: str | Path) -> tuple[str, str]:
    if Path(path).is_file():
        return Path(path).read_text(), str(path)
    shipped = importlib.resources.files("recipes") / f"{path}.yaml"
    if shipped.is_file():
        return shipped.read_text(), f"recipe {path}"
    near = difflib.get_close_matches(str(path), shipped_recipes(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"no recipe {path}: neither a file nor one of {', '.join(shipped_recipes())}{hint}")


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value (for example optimizer.lr=1e-3)")
    *parents, last = key.split(".")
    for parent in parents:
        data = _descend(data, parent, override)
    if isinstance(data, list):
        data[_position(data, last, override)] = _scalar(value)
    else:
        data[last] = _scalar(value)


def _descend(data: Any, part: str, override: str) -> Any:
    key: Any = _position(data, part, override) if isinstance(data, list) else part
    held = data[key] if isinstance(data, list) else data.get(key)
    if not isinstance(held, dict | list):  # a plain value (a source's bare path) gives way to the section
        data[key] = {}
    return data[key]


def _position(data: list, part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(data):
        raise UserError(f"override {override!r}: {part!r} is no position in a list of {len(data)}")
    return int(part)


def _scalar(value: str) -> Any:
    parsed = yaml.safe_load(value)
    if isinstance(parsed, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


def _explain(kind: type[BaseModel], error: Any) -> str:
    location = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        near = difflib.get_close_matches(str(key), _fields(kind, parents), n=1, cutoff=0.5)
        return f"unknown key {location}" + (
            f"; did you mean {near[0]}?" if near else f"; known: {', '.join(_fields(kind, parents))}"
        )
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{location}: {message}{shown if error['type'] != 'missing' else ''}"


def _fields(kind: type[BaseModel], parents: list) -> list[str]:
    part: Any = kind
    for name in parents:
        if isinstance(name, int):
            continue
        part = next((t for t in _types(part.model_fields[name].annotation) if hasattr(t, "model_fields")), part)
    return list(part.model_fields)


def _types(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [annotation] if not inner else [t for a in inner for t in _types(a)]
