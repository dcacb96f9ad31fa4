"""One clear sentence for what a user of a command got wrong, instead of a traceback."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from lightning_easgd import __version__
from lightning_easgd.lab.configuration import GROUPS, option_file
from lightning_easgd.lab.data.errors import DataError
from lightning_easgd.lab.demo_extra import MissingExtraError
from lightning_easgd.lab.key_values import did_you_mean
from lightning_easgd.lab.unexpected import unexpected

# What constructors raise for a bad argument; anything else is a fault that deserves its traceback.
_BAD_ARGUMENT = (ValueError, TypeError, ArithmeticError, ImportError, MisconfigurationException)
_OF_A_COMPARISON = "callbacks=compare"  # what easgd-compare gives each of its runs
_FLAGS = (
    "--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r",
    "--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn",
    "--config-dir", "-cd", "--experimental-rerun", "--info", "-i",
)  # fmt: skip
_SECONDS_TO_SPEAK = 5.0
_SWEEP = ("-m", "--multirun")
_NAMES_ITSELF = re.compile(r"[\w.-]+\(.*=")  # as the errors of this package do: Class(argument=value)
_NO_GROUP = re.compile(r"Could not override '(.+?)'\.\s+No match in the defaults list")
_NO_OPTION = "Config group override must be a string or a list"
_HYDRAS_OWN = "HYDRA_FULL_ERROR"
_TRACEBACKS = "EASGD_TRACEBACKS"  # what the user has set, for ranks, which inherit what is set here


class UsageError(ValueError):
    """A combination of settings that cannot work; its message is all that the user needs to see."""


class ReportedError(RuntimeError):
    """An error of which the user has been told already."""


def run_command(name: str, command: Callable[[], object]) -> None:
    """Run a Hydra command; end the process with one sentence, whatever goes wrong.

    Of what is not the user's fault the traceback goes to a file; with HYDRA_FULL_ERROR=1 to the terminal.
    """
    if "--version" in sys.argv[1:]:
        print(f"{name} {__version__}")
        return
    # Hydra would print the error itself and exit; with this it lets the exception through.
    setting = os.environ.get(_HYDRAS_OWN)
    os.environ.setdefault(_TRACEBACKS, setting or "0")
    os.environ[_HYDRAS_OWN] = "1"
    try:
        with usage_errors(name):
            _check_flags(name)
            _check_experiment(name)
        command()
    except Exception as error:
        if shows_tracebacks():
            raise
        _end(None if isinstance(error, ReportedError) else explain(name, error) or unexpected(name, error))
    finally:
        if setting is None:
            del os.environ[_HYDRAS_OWN]
            del os.environ[_TRACEBACKS]
        else:
            os.environ[_HYDRAS_OWN] = setting


def _end(sentence: str | None) -> NoReturn:
    """End the process; of the ranks that torchrun or SLURM has started on a node, one says why."""
    launched = not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"}.isdisjoint(os.environ)
    number = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    if launched and number != "0":
        time.sleep(_SECONDS_TO_SPEAK)  # their launcher ends all when the first has ended
        sys.exit(1)
    sys.exit(sentence or 1)


def shows_tracebacks() -> bool:
    """Whether the user has asked for tracebacks."""
    return os.environ.get(_TRACEBACKS) == "1"


def _check_flags(name: str) -> None:
    """Refuse what Hydra would answer with its whole usage, and put a sweep's option where Hydra looks for it."""
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in _SWEEP)
    for word in sys.argv[1:]:
        flag = word.partition("=")[0]
        if flag.startswith("-") and flag not in _FLAGS:
            hint = did_you_mean(flag, [each for each in _FLAGS if each.startswith("--")])
            raise UsageError(f"{name}({word}): there is no such option; {hint}")
    parser = get_args_parser()
    parser.error = lambda message: _refuse(f"{name}: {message}; {name} --hydra-help explains the options")  # type: ignore[method-assign]
    parser.parse_args()


def _refuse(sentence: str) -> NoReturn:
    raise UsageError(sentence)


def _check_experiment(name: str) -> None:
    """Refuse an experiment that is of another command, whose settings this one would not look at."""
    if _OF_A_COMPARISON in sys.argv:
        return
    given = [word.partition("=")[2] for word in sys.argv[1:] if word.startswith("experiment=")]
    for option in (option for options in given for option in options.strip("[]").split(",")):
        if (file := option_file("experiment", option)) is None:
            continue
        of = "easgd-compare" if "grid" in file else "easgd-train"
        if of != name:
            word = f"experiment={option}"
            raise UsageError(f"{name}({word}): this experiment is one of {of}; run {of} {word}, or leave it out")


@contextlib.contextmanager
def usage_errors(name: str) -> Iterator[None]:
    """Context of a Hydra job in which an error ends the process with its sentence.

    Left to Hydra it would be printed beside the job's overrides, and a sweep would go on to its other jobs, which
    meet the same refusal.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ReportedError) or shows_tracebacks():
            raise
        _end(explain(name, error) or unexpected(name, error))


def explain(name: str, error: Exception) -> str | None:
    """Return one sentence, in one line, for an error of the user's, None for any other error."""
    sentence = _explain(name, error)
    return None if sentence is None else " ".join(innermost(sentence).split())


def innermost(text: str) -> str:
    """Of an error that a process of a data loader has raised, what it said there; of any other its text."""
    _, mark, trace = text.partition("Original Traceback (most recent call last):")
    return trace.strip().splitlines()[-1].partition(": ")[2] if mark else text


def _explain(name: str, error: Exception) -> str | None:
    sentence: str | None = None
    if isinstance(error, UsageError | DataError | MissingExtraError):
        sentence = f"{name}: {error}" if isinstance(error, MissingExtraError) else str(error)
    elif isinstance(error, MissingConfigException):
        sentence = _unknown_option(name, error)
    elif isinstance(error, ConfigCompositionException):
        sentence = _unknown_key(name, error)
    elif isinstance(error, OverrideParseException):
        # A value with a sign such as = is one that Hydra wants in quotes.
        remedy = "put the value in quotes, key=\"'value'\"" if "=" in (error.override or "") else "write key=value"
        sentence = f"{name}({error.override}): this cannot be read as an override; {remedy}"
    elif isinstance(error, InstantiationException) and isinstance(error.__cause__, _BAD_ARGUMENT):
        sentence = str(error.__cause__)
    elif isinstance(error, YAMLError):
        sentence = f"{name}: a configuration cannot be read: {error}; correct this file"
    elif isinstance(error, ValueError) and str(error).startswith(_NO_OPTION):
        given = ", ".join(word for word in sys.argv[1:] if word.endswith("=null") or word.startswith("="))
        sentence = f"{name}({given}): a group takes one of its options; {name} --help lists them"
    elif isinstance(error, HydraException) and not isinstance(error, InstantiationException):
        sentence = f"{name}: {error}"
    elif isinstance(error, OmegaConfBaseException):
        given = ", ".join(word for word in sys.argv[1:] if "${" in word)
        sentence = f"{name}({error.full_key or given or 'configuration'}): {error.msg or error}; correct this value"
    return sentence


@contextlib.contextmanager
def before_training(name: str) -> Iterator[None]:
    """Context of what is made and checked before any process starts: what it cannot work with is the user's.

    Raises:
        UsageError: With the error's text.
    """
    try:
        yield
    except (UsageError, DataError, MissingExtraError):
        raise
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None:
            raise
        raise UsageError(naming_the_key(name, _key_of(error), cause)) from cause
    except OmegaConfBaseException:
        raise
    except _BAD_ARGUMENT as error:
        raise UsageError(naming_the_key(name, "", error)) from error


def naming_the_key(name: str, key: str, error: BaseException) -> str:
    """Say what is wrong with a value: errors of this package name class and argument, others get the key.

    Args:
        name: The command's name.
        key: What the value is below; of what the command line sets there the error is likely to be about. Without one
            it is about what it names.
        error: The error.
    """
    text = str(error) or type(error).__name__
    if _NAMES_ITSELF.match(text):
        return text
    words = [word for word in sys.argv[1:] if "=" in word]
    given = [word for word in words if (word.lstrip("+").startswith(f"{key}.") if key else _is_named(word, text))]
    where = ", ".join(given) or key
    return f"{name}({where}): {text}; correct this value" if where else f"{name}: {text}"


def _is_named(word: str, text: str) -> bool:
    """Whether an error speaks of an override: of its key or of its value."""
    key, _, value = word.partition("=")
    spoken = re.findall(r"\w+", text.lower())
    return key.rpartition(".")[2].lower() in spoken or value.lower() in spoken


def _key_of(error: InstantiationException) -> str:
    _, _, key = str(error).partition("full_key: ")
    return key or "configuration"


def _unknown_key(name: str, error: ConfigCompositionException) -> str | None:
    cause = error.__cause__
    if group := _NO_GROUP.match(str(error)):
        hint = (
            f"a saved configuration has values and no options: set {group[1]}.key=value, or go on with ckpt_path=..."
            if group[1] in GROUPS
            else did_you_mean(group[1], sorted(GROUPS))
        )
        return f"{name}({group[1]}=...): there is no group {group[1]!r} here; {hint}"
    if not isinstance(cause, ConfigAttributeError | ConfigKeyError) or cause.full_key is None:
        return f"{name}: {error}" + (f" ({cause})" if cause else "")
    parent, _, key = cause.full_key.rpartition(".")
    where = f" in {parent!r}" if parent else ""
    node = cause.parent_node
    known = [str(k) for k in node] if isinstance(node, DictConfig) else []
    prefix = f"{parent}." if parent else ""
    # Hydra's own settings are no settings of this command.
    hint = did_you_mean(key, sorted(k for k in known if k != "hydra" and not k.startswith("_")), prefix)
    if not known:  # the value there was null, or a number
        hint += f"; +{cause.full_key}=... gives it this one"
    return f"{name}({cause.full_key}=...): there is no key {key!r}{where}; {hint}"


def _unknown_option(name: str, error: MissingConfigException) -> str | None:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group or not error.options:
        return f"{name}: {error}"
    if (group, option) == ("hydra/sweeper", "optuna"):
        return (
            f"{name}(hparams_search=optuna): the package hydra-optuna-sweeper is not installed; run pip install"
            " 'lightning_easgd[search]'"
        )
    hint = did_you_mean(option, sorted(error.options), f"{group}=")
    return f"{name}({group}={option}): there is no such {group}; {hint}"
