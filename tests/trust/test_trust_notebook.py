"""In a notebook a strategy that cannot start its ranks there names what can: one of its own family, not ``ddp``'s."""

import lightning.fabric.connector
import lightning.pytorch.trainer.connectors.accelerator_connector
import lightning_fabric.connector
import pytest
import pytorch_lightning.trainer.connectors.accelerator_connector
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_trees import TREES

from lightning_easgd import EASGDStrategy, LocalStrategy

pytestmark = pytest.mark.timeout(60)

CONNECTORS = {
    "lightning.pytorch": lightning.pytorch.trainer.connectors.accelerator_connector,
    "pytorch_lightning": pytorch_lightning.trainer.connectors.accelerator_connector,
    "lightning.fabric": lightning.fabric.connector,
    "lightning_fabric": lightning_fabric.connector,
}


@pytest.fixture(autouse=True)
def notebook(monkeypatch):
    for connector in CONNECTORS.values():
        monkeypatch.setattr(connector, "_IS_INTERACTIVE", True)


def make(tree, strategy):
    return TREES[tree][1](accelerator="cpu", devices=2, strategy=strategy)


@pytest.mark.parametrize("suffix", ["", "_spawn"])
@pytest.mark.parametrize("name", ["easgd", "easgd_async", "eamsgd", "eamsgd_async", "downpour", "mdownpour"])
@pytest.mark.parametrize("tree", CONNECTORS)
def test_names(tree, name, suffix):
    with pytest.raises(Exception, match=rf"Use strategy='{name}_notebook' or ") as caught:
        make(tree, name + suffix)
    assert f"strategy='{name + suffix}')` is not compatible" in str(caught.value)  # as Lightning has it
    assert "ddp" not in str(caught.value)
    assert type(caught.value).__name__ == ("RuntimeError" if "fabric" in tree else "MisconfigurationException")


@pytest.mark.parametrize("tree", CONNECTORS)
@pytest.mark.parametrize("name", ["easgd_notebook", "mdownpour_notebook", "easgd_async_fork"])
def test_what_is_named_works(tree, name):
    assert make(tree, name).strategy.launcher.is_interactive_compatible


@pytest.mark.parametrize("strategy", [EASGDStrategy, LocalStrategy])
def test_instances(strategy):
    with pytest.raises(MisconfigurationException, match=rf"{strategy.__name__}\(start_method='fork'\)"):
        make("lightning.pytorch", strategy())


def test_a_script_is_no_notebook(monkeypatch):
    monkeypatch.setattr(CONNECTORS["lightning.pytorch"], "_IS_INTERACTIVE", False)
    assert make("lightning.pytorch", "easgd").strategy.launcher is not None
