"""Where the commands' configuration lies: inside of an installed package, beside the package in a clone."""

import sys
from importlib.resources import files
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import lightning_easgd

__all__ = ["GROUPS", "SEARCH_PATH", "option_file", "options"]

_NAME = "lightning_easgd.conf"
SEARCH_PATH = f"pkg://{_NAME}"


def _find_in_clone() -> None:
    """Make a clone's `conf` the configuration of the clone's package.

    Otherwise the package of a clone has none, or that of another version, which is installed.
    """
    package = Path(lightning_easgd.__file__).parent
    source = package.parent / "conf" / "__init__.py"
    if (package / "conf").is_dir() or not source.is_file():
        return
    spec = spec_from_file_location(_NAME, source, submodule_search_locations=[str(source.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)


def option_file(group: str, option: str) -> DictConfig | None:
    """Read the file of an option of a configuration group; None if there is no such option."""
    path = files(_NAME).joinpath(group, f"{option}.yaml")
    if not path.is_file():
        return None
    config = OmegaConf.create(path.read_text(encoding="utf-8"))
    return config if isinstance(config, DictConfig) else None


def options(group: str) -> list[str]:
    """List the options of a configuration group."""
    return sorted(each.name.removesuffix(".yaml") for each in files(_NAME).joinpath(group).iterdir() if each.is_file())


_find_in_clone()

GROUPS = frozenset(each.name for each in files(_NAME).iterdir() if each.is_dir() and not each.name.startswith("_"))
"""The names of the configuration groups."""
