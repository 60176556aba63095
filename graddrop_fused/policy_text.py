"""Policies as text, for command lines and files: ``graddrop-epoch:p=0.9,toggle``.

    text     = name [":" items | "(" items ")"]
    items    = item {"," item}
    item     = argument "=" value | flag | value      (a flag is an argument set to true; a value alone, in the first
                                                       place, is the class's first argument)
    value    = number | "true" | "false" | "none" | word | quoted string | name "(" items ")"   (the last: a schedule)

Names are those of the classes, in any case and with or without hyphens: GradDropEpoch, graddrop-epoch. What a policy
prints (its repr) is a text, too.
"""

import ast
import re
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any

from .policies import Policy
from .schedules import Schedule

_CALL = re.compile(r"\s*(?P<name>[A-Za-z_][\w-]*)\s*(?::(?P<open>.*)|\((?P<closed>.*)\))?\s*", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None}


class PolicyTextError(ValueError, ArgumentTypeError):
    """What is wrong with a policy's text. argparse shows its message to who typed it."""


def policy(source: str | Mapping[str, Any] | Policy | None) -> Policy | None:
    """The policy that a text or a mapping describes. Policies, and None, are given back as they are.

        policy("graddrop:p=0.1")
        policy("graddrop-epoch:p=0.9,toggle")
        policy("layer-graddrop:anneal=linear-anneal(epochs=10)")
        policy("gradfreeze:bottom-up")
        policy("none")                                                    # None
        policy({"policy": "graddrop", "p": 0.1, "block": 1024})           # a mapping of a YAML or JSON file
        parser.add_argument("--drop", type=policy)

    Your own subclass of Policy is found by its name once the module that defines it is imported.

    Raises:
        PolicyTextError (a ValueError): naming what is wrong and what would be right. TypeError: on another type.
    """
    if source is None or isinstance(source, Policy):
        return source
    if isinstance(source, Mapping):
        is_none = len(source) == 1 and _is_none(source.get("policy", ""))
        return None if is_none else _from_mapping("policy", source, _policies())
    if not isinstance(source, str):
        raise TypeError(f"a policy must be a text, a mapping, a Policy or None, got {source!r}")
    return None if _is_none(source) else _parse("policy", source, _policies())


def policy_to_text(policy: Policy | None) -> str:
    """A text from which :func:`policy` makes an equal policy, without the arguments that are the class's defaults.

    Raises:
        TypeError: on what a text cannot hold, such as a StaticMask's masks.
    """
    if policy is None:
        return "none"
    name, items = _describe(policy)
    return f"{name}:{items}" if items else name


def _policies() -> dict[str, type]:
    return dict(Policy.registry)


def _schedules() -> dict[str, type]:
    return dict(Schedule.registry)


def _is_none(name: Any) -> bool:
    """Also None itself, which a YAML file's null and a JSON file's are."""
    return str(name).strip().lower() == "none"


def _word(name: str) -> str:
    """GradDropEpoch -> graddrop-epoch: GradDrop and GradFreeze are one word each, as in the paper."""
    return re.sub(r"(?<=[a-z0-9])(?<!Grad)(?=[A-Z])", "-", name).lower()


def _bare(name: str) -> str:
    return re.sub("[-_]", "", name).lower()


def _class(kind: str, name: Any, classes: dict[str, type], where: Any) -> type:
    found = {_bare(name): cls for name, cls in classes.items()}.get(_bare(str(name)))
    if found is None:
        words = [_word(name) for name in classes]
        near = get_close_matches(str(name).lower(), words, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise PolicyTextError(f"the {kind} must be one of {', '.join(words)}, got {name!r}{meant} in {where!r}")
    return found


def _parse(kind: str, text: str, classes: dict[str, type]) -> Any:
    match = _CALL.fullmatch(text)
    if match is None:
        raise PolicyTextError(f"a {kind} must be written as name:argument=value,..., got {text!r}")
    cls = _class(kind, match["name"], classes, text)
    names = [f.name for f in fields(cls) if f.init] if hasattr(cls, "__dataclass_fields__") else []
    options: dict[str, Any] = {}
    body = match["closed"] if match["open"] is None else match["open"]
    for place, item in enumerate(_split(body or "", text)):
        argument, equals, value = item.partition("=")
        argument = argument.strip()
        if not equals and argument not in names and place == 0 and names:
            argument, value = names[0], item
        elif not equals:
            value = "true"
        if argument not in names:
            raise PolicyTextError(
                f"{_word(cls.__name__)} takes the arguments {', '.join(names)}; got {argument!r} in {text!r}"
            )
        if argument in options:
            raise PolicyTextError(f"{argument} must be given once, got it twice in {text!r}")
        options[argument] = _value(value, text)
    return _build(cls, options, text)


def _from_mapping(kind: str, source: Mapping[str, Any], classes: dict[str, type]) -> Any:
    options = dict(source)
    if kind not in options:
        raise PolicyTextError(f"a mapping must name its class under {kind!r}, got {source!r}")
    cls = _class(kind, options.pop(kind), classes, source)
    for name, value in options.items():
        if isinstance(value, Mapping):
            options[name] = _from_mapping("schedule", value, _schedules())
        elif isinstance(value, str) and re.match(r"\s*[\w-]+\s*[:(]", value):
            options[name] = _parse("schedule", value, _schedules())
    return _build(cls, options, source)


def _build(cls: type, options: dict[str, Any], source: Any) -> Any:
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        what = str(error).replace(f"{cls.__name__}.__init__()", _word(cls.__name__))
        raise PolicyTextError(f"{what}, in {source!r}") from error


def _split(body: str, text: str) -> list[str]:
    """At the commas that stand neither in parentheses nor in quotes."""
    items, depth, quote, escaped = [""], 0, "", False
    for character in body:
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        elif character in "()":
            depth += 1 if character == "(" else -1
        if character == "," and depth == 0 and not quote:
            items.append("")
        else:
            items[-1] += character
        if depth < 0:
            break
    if depth or quote:
        raise PolicyTextError(f"parentheses and quotes must be closed, got {text!r}")
    if not body.strip():
        return []
    if not all(item.strip() for item in items):
        raise PolicyTextError(f"an argument must stand between two commas, got none in {text!r}")
    return items


def _value(value: str, text: str) -> Any:
    value = value.strip()
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    for convert in (int, float):
        try:
            return convert(value)
        except ValueError:
            pass
    if value[:1] in ("'", '"'):
        try:
            return ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise PolicyTextError(f"a quoted value must be one string, got {value} in {text!r}") from None
    if "(" in value:
        return _parse("schedule", value, _schedules())
    if not value:
        raise PolicyTextError(f"an argument must have a value behind '=', got none in {text!r}")
    return value


def _describe(thing: Any) -> tuple[str, str]:
    items = []
    for f in (f for f in fields(thing) if f.init):
        value = getattr(thing, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if type(value) is type(default) and value == default:
            continue
        items.append(f.name if value is True else f"{f.name}={_value_text(f'{type(thing).__name__}.{f.name}', value)}")
    return _word(type(thing).__name__), ",".join(items)


def _value_text(name: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, str):
        bare = re.fullmatch(r"[A-Za-z][\w-]*", value) and _value(value, value) == value
        return value if bare else repr(value)
    if isinstance(value, tuple(_schedules().values())):
        return "{}({})".format(*_describe(value))
    raise TypeError(f"{name} must be a number, a word, a truth value, None or a schedule for a text, got {type(value)}")
