"""Hydra composes a command's configuration in a quarter of its time: for processes that compose it again and again.

A file of the configuration is read once in a process, and those that it forks; and the configuration is not composed a
first time, only to see whether something in it sets Hydra's mode, where nothing can.
"""

import copy
import sys
import warnings
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.object_type import ObjectType

import lightning_easgd.lab.configuration  # noqa: F401  # of this clone

__all__ = ["compose_all_once"]

_read, _find_mode = ConfigRepository.load_config, Hydra.get_mode
_known: dict[tuple[str, str], Any] = {}


def _read_once(repository: ConfigRepository, config_path: str) -> Any:
    """A fifth of what it takes to compose is to read the package's files."""
    source = repository._find_object_source(config_path, ObjectType.CONFIG)
    if source is None or source.scheme() != "pkg":
        return _read(repository, config_path)
    file = (source.path, config_path)
    if file not in _known:
        _known[file] = _read(repository, config_path)
    found = copy.copy(_known[file])
    found.config = copy.deepcopy(found.config)  # overrides are written into it
    return found


def _mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    has_own_files = any(word.startswith(("--config", "-c")) for word in sys.argv)
    sets_one = has_own_files or any("hydra" in word or "hparams_search" in word for word in overrides)
    return _find_mode(hydra, config_name, overrides) if sets_one else None


def compose_all_once() -> None:
    """Read the files of the default configurations; and what parses the words in them learns their grammar."""
    with warnings.catch_warnings(action="ignore"), initialize_config_module("lightning_easgd.conf", version_base="1.3"):
        for name in ("train", "evaluate", "compare"):
            compose(name, ["paths.run=run"] if name == "train" else [], return_hydra_config=True)


Hydra.get_mode = _mode
ConfigRepository.load_config = _read_once
