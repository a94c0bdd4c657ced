"""Reading `bench.yaml`: a fault of any kind is one line that names file, line and key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from slidesparse.config import Bench
from slidesparse.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: in YAML 1.1 an unquoted 2:8 is the base-60 number 128."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def load_bench(path: Path) -> Bench:
    """Read and validate a bench file.

    Raises:
        ConfigError: one line per fault: file, line, key, what is wrong, what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a bench file with --config") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; give a bench file with --config") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"{path}:{line}: not YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(f"{path}:{line}: not YAML: character {error.character:#04x} is not allowed") from None
    if not isinstance(data, dict) or node is None:
        raise ConfigError(f"{path}:1: expected a mapping with the keys version, models, profiles")
    duplicate = _duplicate_key(node)
    if duplicate is not None:
        raise ConfigError(f"{path}:{duplicate[1]}: key {duplicate[0]!r} stands twice in one mapping; keep one")
    try:
        return Bench.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, node, fault) for fault in _own_faults(error))) from None


def _duplicate_key(node: yaml.Node) -> tuple[str, int] | None:
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                return key.value, key.start_mark.line + 1
            seen.add(key.value)
            children.append(value)
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    return next((found for child in children if (found := _duplicate_key(child))), None)


def _own_faults(error: ValidationError) -> list[Any]:
    """Without "too short" for a list that is too short only because an item of it was refused."""
    faults = error.errors()
    return [
        fault
        for fault in faults
        if fault["type"] != "too_short"
        or not any(other["loc"][: len(fault["loc"])] == fault["loc"] and other is not fault for other in faults)
    ]


def _explain(path: Path, node: yaml.Node, fault: Any) -> str:
    location = [part for part in fault["loc"] if not str(part).startswith("function-")]
    message = str(fault["msg"]).removeprefix("Value error, ")
    named = re.match(r"(profiles\.[A-Za-z0-9_.-]+?): ", message)
    if not location and named:
        location, message = named[1].split("."), message[named.end() :]
    first = message.split(" ", 1)[0]
    if fault["type"] == "value_error" and _locate(node, [*location, first])[0] > len(location):
        location = [*location, first]  # a check over a whole section names the key that it is about first
    line = _locate(node, location)[1]
    if fault["type"] == "extra_forbidden":
        message = f"unknown key; allowed here: {', '.join(_allowed(location[:-1]))}"
    elif fault["type"] == "missing":
        message = "this key is missing"
    elif "input" in fault and not isinstance(fault["input"], dict | list | tuple):
        message = f"{message} (got {fault['input']!r})"
    return f"{path}:{line}: {'.'.join(str(part) for part in location) or 'top level'}: {message}"


def _locate(node: yaml.Node, location: list[Any]) -> tuple[int, int]:
    """Walk the YAML tree along a pydantic location: how many parts of it stand there, and the line of the deepest."""
    line, found = node.start_mark.line + 1, 0
    for part in location:
        if isinstance(node, yaml.MappingNode):
            entry = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if entry is None:
                break
            line, node = entry[0].start_mark.line + 1, entry[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
        found += 1
    return found, line


def _allowed(location: list[Any]) -> list[str]:
    """Keys of the section at a location, found by walking the model classes."""
    section: Any = Bench
    for part in location:
        if isinstance(section, type) and issubclass(section, BaseModel):
            annotation = section.model_fields[str(part)].annotation
            arguments = getattr(annotation, "__args__", ())
            nested = [a for a in (*arguments, annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
            section = nested[0] if nested else annotation
            if getattr(annotation, "__origin__", None) is dict:
                section = ("entry", section)
        elif isinstance(section, tuple):
            section = section[1]
    if isinstance(section, tuple):
        section = section[1]
    return sorted(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
