"""Commands ``NAME ACTION key=value ...``, whose keys are the arguments of functions and classes."""

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from lightning_easgd import __version__
from lightning_easgd.lab.unexpected import unexpected

__all__ = ["Actions", "Examples", "Values", "build", "check_new", "did_you_mean", "run_action"]

_HELP = ("-h", "--help", "help")
_SWITCH = {"true": True, "false": False}

T = TypeVar("T")
Values = Mapping[str, list[Any]]
Actions = Mapping[str, Sequence[Callable[..., Any]]]
"""Of each action the function that does it, then the class whose arguments it gets as ``values``, if it wants any."""
Examples = Mapping[str, Sequence[str]]
"""Of each action the words that may follow it."""


def run_action(command: str, purpose: str, actions: Actions, examples: Examples, words: Sequence[str]) -> int | str:
    """Run the action that the first word names; ``--help`` explains its keys as the docstrings do.

    Args:
        command: The command's name.
        purpose: What it does, for the help.
        actions: What it can do.
        examples: How each action is called.
        words: The command line.

    Returns:
        The exit status, or the sentence to end with.
    """
    usage = f"usage: {command} {{{','.join(actions)}}} [key=value ...]"
    if "--version" in words:
        print(f"{command} {__version__}")
        return 0
    if not set(_HELP).isdisjoint(words):
        shown = [name for name in actions if words[0] in (name, *_HELP)]
        print(usage, "\n".join(textwrap.wrap(f"{command} {purpose}", 100)), sep="\n\n")
        for name in shown:
            calls = "\n".join(f"  {command} {name} {words}".rstrip() for words in examples[name])
            print("", _help(name, actions[name]), f"Examples:\n{calls}", sep="\n")
        return 0
    if not words or words[0] not in actions:
        return f"{usage}; {command} --help explains the keys"
    act, *kinds = actions[words[0]]
    try:
        given = _read(words[1:], {key: each for kind in (act, *kinds) for key, each in _types(kind).items()})
        own = {key: given.pop(key) for key in _types(act) if key in given}
        status: int = build(act, own | ({"values": [given]} if kinds else {}))
    except (ValueError, ModuleNotFoundError, FileNotFoundError) as error:
        return f"{command}: {error}"
    except Exception as error:
        return unexpected(command, error)
    return status


def check_new(*files: Path, overwrite: bool) -> None:
    """Refuse to write over results.

    Raises:
        ValueError: If one of the files is there already, and may not be overwritten.
    """
    if not overwrite and (there := [str(file) for file in files if file.exists()]):
        raise ValueError(
            f"{', '.join(there)}: this result is there already; give another place, or overwrite=true to replace it"
        )


def build(kind: Callable[..., T], values: Values) -> T:
    """Call a function or class with one value for each argument.

    Raises:
        ValueError: If an argument has several values, or one without a default has none.
    """
    parameters = inspect.signature(kind).parameters
    missing = [key for key, each in parameters.items() if each.default is each.empty and key not in values]
    if missing:
        raise ValueError(f"give {', '.join(f'{key}=...' for key in missing)}")
    for key, several in values.items():
        if len(several) != 1:
            raise ValueError(f"{key}={','.join(map(str, several))}: one value; only a sweep takes several")
    return kind(**{key: value for key, (value,) in values.items()})


def did_you_mean(word: str, known: Sequence[str], prefix: str = "") -> str:
    """Say what a user may have meant by a word that is not known."""
    if close := difflib.get_close_matches(word, known, n=1):
        return f"did you mean {prefix}{close[0]}?"
    return f"choose one of: {', '.join(known)}" if known else "it has no keys"


def _read(words: Sequence[str], types: Mapping[str, type]) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} cannot be read; write key=value")
        if key not in types:
            raise ValueError(f"there is no key {key!r}; {did_you_mean(key, list(types))}")
        try:
            parts = [text] if types[key] is Path else text.split(",")
            values[key] = [_SWITCH[part] if types[key] is bool else types[key](part) for part in parts]
        except (KeyError, ValueError) as error:
            remedy = {int: "no whole number", bool: "neither true nor false"}.get(types[key], "no number")
            raise ValueError(f"{key}={text}: this is {remedy}") from error
    return values


def _types(kind: Callable[..., Any]) -> dict[str, type]:
    """The type of each argument but ``values``; of ``float | None`` it is ``float``."""
    hints = get_type_hints(kind)
    keys = [key for key in inspect.signature(kind).parameters if key != "values"]
    return {key: (get_args(hints[key]) or (hints[key],))[0] for key in keys}


def _help(action: str, kinds: Sequence[Callable[..., Any]]) -> str:
    """What an action does, then a paragraph for each key: what it means, its type and default."""
    lines = textwrap.wrap(f"{action}: {' '.join(_doc(kinds[0]).split('Args:')[0].split())}", 100)
    for kind in kinds:
        meanings = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", _doc(kind), re.MULTILINE))
        for key, each in _types(kind).items():
            default = inspect.signature(kind).parameters[key].default
            default = {inspect.Parameter.empty: "required", None: "may be left out"}.get(default, default)
            text = f"  {key:<18}{' '.join(meanings[key].split())} ({each.__name__}, {default})"
            lines += textwrap.wrap(text, 100, subsequent_indent=" " * 20)
    return "\n".join(lines)


def _doc(kind: Callable[..., Any]) -> str:
    return inspect.getdoc(kind) or ""
