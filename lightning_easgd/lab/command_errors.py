"""One clear sentence for what a user of a command got wrong, instead of a traceback."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from lightning_easgd.lab.data.errors import DataError
from lightning_easgd.lab.demo_extra import MissingExtraError
from lightning_easgd.lab.key_values import did_you_mean

# What constructors raise for a bad argument; anything else is a fault that deserves its traceback.
_BAD_ARGUMENT = (ValueError, TypeError, ModuleNotFoundError, MisconfigurationException)


class UsageError(ValueError):
    """A combination of settings that cannot work; its message is all that the user needs to see."""


def run_command(name: str, command: Callable[[], object]) -> None:
    """Run a Hydra command; end the process with one sentence where the user's input is at fault."""
    # Hydra would print the error itself and exit; with this it lets the exception through.
    setting = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        command()
    except Exception as error:
        sentence = explain(name, error)
        if sentence is None or setting == "1":
            raise
        sys.exit(sentence)
    finally:
        if setting is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = setting


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Context of a Hydra job in which a `UsageError` ends the process with its sentence.

    Left to Hydra it would be printed beside the job's overrides, and a sweep would go on to its other jobs, which
    meet the same refusal.
    """
    try:
        yield
    except UsageError as error:
        sys.exit(str(error))


def explain(name: str, error: Exception) -> str | None:
    """Return one sentence for an error of the user's, None for any other error."""
    if isinstance(error, UsageError | DataError | MissingExtraError):
        return f"{name}: {error}" if isinstance(error, MissingExtraError) else str(error)
    if isinstance(error, MissingConfigException):
        return _unknown_option(name, error)
    if isinstance(error, ConfigCompositionException):
        return _unknown_key(name, error)
    if isinstance(error, OverrideParseException):
        return f"{name}({error.override}): this cannot be read as an override; write key=value"
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, _BAD_ARGUMENT):
        return str(error.__cause__)
    return None


def _unknown_key(name: str, error: ConfigCompositionException) -> str | None:
    cause = error.__cause__
    if not isinstance(cause, ConfigAttributeError | ConfigKeyError) or cause.full_key is None:
        return f"{name}: {error}" + (f" ({cause})" if cause else "")
    parent, _, key = cause.full_key.rpartition(".")
    where = f" in {parent!r}" if parent else ""
    node = cause.parent_node
    known = [str(k) for k in node] if isinstance(node, DictConfig) else []
    prefix = f"{parent}." if parent else ""
    # Hydra's own settings are no settings of this command.
    hint = did_you_mean(key, sorted(k for k in known if k != "hydra" and not k.startswith("_")), prefix)
    return f"{name}({cause.full_key}=...): there is no key {key!r}{where}; {hint}"


def _unknown_option(name: str, error: MissingConfigException) -> str | None:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group or not error.options:
        return f"{name}: {error}"
    hint = did_you_mean(option, sorted(error.options), f"{group}=")
    return f"{name}({group}={option}): there is no such {group}; {hint}"
