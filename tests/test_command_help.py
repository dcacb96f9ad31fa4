"""`--help` of every command and action says what it does with three examples; `--version` is ours."""

import sys
import tomllib
from importlib import import_module

import pytest
from application import ROOT
from test_wrong_inputs import COMMANDS

from lightning_easgd import __version__
from lightning_easgd.lab.simulation import simulate_command
from lightning_easgd.lab.stability import stability_command

pytestmark = pytest.mark.timeout(60)

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
ACTIONS = [
    (f"easgd-{module.__name__.split('.')[-1].removesuffix('_command')}", action)
    for module in (simulate_command, stability_command)
    for action in module._ACTIONS
]


def output(monkeypatch, capfd, name, *words) -> str:
    monkeypatch.setattr(sys, "argv", [name, *words])
    module, _, function = SCRIPTS[name].partition(":")
    try:
        getattr(import_module(module), function)()
    except SystemExit as end:
        if end.code:
            raise
    return capfd.readouterr().out


def examples(shown: str, command: str) -> list[str]:
    """The lines after "Examples:" that begin with the command."""
    return [line for line in shown.partition("Examples:")[2].splitlines() if line.startswith(f"  {command}")]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(monkeypatch, capfd, tmp_path, name, flag):
    monkeypatch.chdir(tmp_path)
    shown = output(monkeypatch, capfd, name, flag)
    assert len(examples(shown, name)) >= 3
    first = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
    assert first, "a sentence that begins with the command's name"
    assert first[0].split()[1].rstrip(",").endswith("s"), "says what the command does"
    assert "Hydra" not in shown.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "action"), ACTIONS)
def test_help_of_an_action(monkeypatch, capfd, name, action):
    shown = output(monkeypatch, capfd, name, action, "--help")
    assert len(examples(shown, f"{name} {action}")) == 3
    assert f"\n{action}: " in shown


@pytest.mark.parametrize("name", SCRIPTS)
def test_version(monkeypatch, capfd, name):
    assert output(monkeypatch, capfd, name, "--version") == f"{name} {__version__}\n"


@pytest.mark.parametrize(("name", "action"), ACTIONS)
def test_examples_have_keys_that_are_there(name, action):
    module = {"easgd-simulate": simulate_command, "easgd-stability": stability_command}[name]
    known = {key for kind in module._ACTIONS[action] for key in kind.__annotations__}
    for words in module._EXAMPLES[action]:
        assert {word.partition("=")[0] for word in words.split()} <= known
        if action == "check":
            assert module.run([action, *words.split()]) in (0, 1)


def test_wrong_inputs_cover_every_command():
    assert set(SCRIPTS) <= set(COMMANDS)
