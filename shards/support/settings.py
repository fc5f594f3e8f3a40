"""Settings: YAML files with `base:` inheritance and dotted overrides, checked by pydantic models.

YAML is read by the rules of YAML 1.2: `1e-4` is a number, `no` is a string, `010` is ten. PyYAML's 1.1
rules read them as a string, false and eight.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shards.support.errors import ConfigError


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


S = TypeVar("S", bound=Settings)
_Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]


class _Yaml12Loader(yaml.SafeLoader):
    """A safe loader with the scalar rules of the YAML 1.2 core schema."""

    # tables of its own: the ones of the parent belong to every SafeLoader
    yaml_implicit_resolvers: _Resolvers = {}  # noqa: RUF012
    yaml_constructors = dict(yaml.SafeLoader.yaml_constructors)  # noqa: RUF012


class _Yaml12Dumper(yaml.SafeDumper):
    """A safe dumper that quotes every string which either set of rules would read as something else."""

    yaml_implicit_resolvers: _Resolvers = {  # noqa: RUF012
        first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(?:[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"^(?:<<)$", "<"),
):
    for _side in (_Yaml12Loader, _Yaml12Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _construct_int(loader: _Yaml12Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    digits = text.lstrip("+-")
    value = int(digits, 16 if digits[:2] == "0x" else 8 if digits[:2] == "0o" else 10)
    return -value if text.startswith("-") else value


def _construct_mapping(loader: _Yaml12Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} appears twice", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Yaml12Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse_yaml(text: str, *, where: object = "text") -> Any:
    """Parse YAML text by the 1.2 rules.

    Raises:
        ConfigError: the text is not YAML, or a key appears twice.
    """
    try:
        return yaml.load(text, Loader=_Yaml12Loader)  # noqa: S506 (a SafeLoader with other scalar rules)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}", where=where) from error


def dump_yaml(value: Any) -> str:
    """Write plain data as YAML that both 1.1 and 1.2 readers understand."""
    return yaml.dump(value, Dumper=_Yaml12Dumper, sort_keys=False, allow_unicode=True)


def find_config(name: str | Path) -> Path:
    """Find a config file: a path, or the name of one that the package ships (`demo/retmae.yaml`).

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = Path(__file__).parents[2] / "configs"  # beside the packages, in a checkout and in the wheel
    for candidate in (shipped / path, shipped / path.with_suffix(".yaml")):
        if candidate.is_file():
            return candidate
    names = sorted(p.relative_to(shipped).as_posix() for p in shipped.rglob("*.yaml"))
    close = difflib.get_close_matches(path.with_suffix(".yaml").as_posix(), names, n=4, cutoff=0.5) or names
    raise ConfigError("no such config file", where=name, allowed=f"a path, or one of {', '.join(close)}")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `over` upon `base`, mapping by mapping; lists and scalars are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_config(name: str | Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a config file and what it inherits from by `base:` (relative to the file, or shipped).

    Raises:
        ConfigError: a file is missing, malformed, or inherits from itself.
    """
    path = find_config(name).resolve()
    if path in _seen:
        raise ConfigError("the file inherits from itself", where=path, fix="remove one `base:`")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), where=path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=path) from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError("a config is a mapping of keys to values", where=path)
    base = data.pop("base", None)
    if base is None:
        return data
    beside = path.parent / str(base)
    return merge(read_config(beside if beside.is_file() else base, (*_seen, path)), data)


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `dotted.key=value` overrides, each value read as YAML.

    Raises:
        ConfigError: an override has no `=`, or goes through a value that is not a mapping.
    """
    result = dict(data)
    for override in overrides:
        dotted, sep, text = override.partition("=")
        if not sep or not dotted:
            raise ConfigError(
                "an override needs a key and a value", where=override, allowed="--set dotted.key=value"
            )
        value: Any = parse_yaml(text, where=override)
        *parents, leaf = dotted.split(".")
        node = result
        for key in parents:
            child = node.get(key)
            if child is not None and not isinstance(child, Mapping):
                raise ConfigError(f"'{key}' is a value, not a group of settings", where=override)
            node[key] = dict(child or {})
            node = node[key]
        node[leaf] = value
    return result


def validate(model: type[S], data: Mapping[str, Any], *, where: object) -> S:
    """Check plain data against a settings model.

    Raises:
        ConfigError: every wrong key in one message, each with what is allowed.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or "(whole file)"
            if item["type"] == "extra_forbidden":
                problems.append(f"unknown key '{key}'{_known_keys(model, item['loc'])}")
            else:
                # of a rule about several keys, what was given is all of them
                is_whole = isinstance(item["input"], Mapping) or item["type"] == "missing"
                given = "" if is_whole else f" (given: {item['input']!r})"
                problems.append(f"'{key}': {item['msg']}{given}")
        raise ConfigError("; ".join(problems), where=where, fix="correct the keys named") from error


def _known_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """Name the keys allowed beside an unknown one; empty where the place cannot be followed."""
    node: Any = model
    for part in loc[:-1]:
        if hasattr(node, "model_fields"):
            field = node.model_fields.get(str(part))
            node = field.annotation if field is not None else None
        else:
            node = _inside(node, part)
    if hasattr(node, "model_fields"):
        return f" (allowed here: {', '.join(node.model_fields)})"
    return ""


def _inside(annotation: Any, part: int | str) -> Any:
    """What stands at a place of a sequence (a number), or is called so in a union told apart by a key."""
    arguments = get_args(annotation)
    if isinstance(part, int):
        return arguments[0] if arguments else None
    for inner in arguments:
        fields = getattr(inner, "model_fields", {})
        if any(part in get_args(field.annotation) for field in fields.values()):
            return inner
        if get_args(inner) and (found := _inside(inner, part)) is not None:
            return found
    return None


def load_settings(model: type[S], name: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read a config file with its bases, apply overrides, and check the whole.

    Raises:
        ConfigError: with every problem named.
    """
    return validate(model, apply_overrides(read_config(name), overrides), where=name)
