"""Who looks for Lightning without importing it leaves the names to be registered: only an executed import counts."""

import pytest
from preloaded import python_of_torch
from test_trees import in_new_process

pytestmark = pytest.mark.timeout(150)

CHECK = """
import sys
registry = getattr(sys.modules[tree + ".strategies"], "StrategyRegistry", None)
registry = getattr(sys.modules[tree + ".strategies"], "STRATEGY_REGISTRY", registry)
assert "easgd_async_spawn" in registry, sorted(registry)
assert not any(getattr(finder, "tree", None) == tree for finder in sys.meta_path)
print("registered")
"""
TREES = ["lightning_fabric", "pytorch_lightning", "lightning.fabric"]


LOOKS = """
import importlib, importlib.util, pkgutil
import lightning_easgd
from lightning_utilities.core.imports import RequirementCache, module_available
for _ in range(2):
    spec = importlib.util.find_spec(tree)
    assert spec.loader.get_source(tree), "a loader like any other"
    importlib.util.module_from_spec(spec)  # made, and never executed
    assert pkgutil.get_importer(spec.submodule_search_locations[0])
    assert module_available(tree)
    assert RequirementCache(tree.partition(".")[0])
importlib.import_module(tree)
"""


@pytest.mark.parametrize("tree", TREES)
def test_a_look_does_not_count(tree):
    assert in_new_process(f"tree = {tree!r}" + LOOKS + CHECK, python_of_torch())[-1] == "registered"


def test_a_reload_and_an_import_in_another_thread():
    code = """
import importlib, importlib.util, threading
tree = "lightning_fabric"
import lightning_easgd
specs = []
lookers = [threading.Thread(target=lambda: specs.append(importlib.util.find_spec(tree))) for _ in range(8)]
importers = [threading.Thread(target=importlib.import_module, args=(tree,)) for _ in range(2)]
for thread in lookers + importers:
    thread.start()
for thread in lookers + importers:
    thread.join()
assert all(specs) and len(specs) == 8
importlib.reload(importlib.import_module(tree))
importlib.reload(lightning_easgd)
"""
    assert in_new_process(code + CHECK, python_of_torch())[-1] == "registered"


def test_a_lazy_import_registers_when_it_is_executed():
    code = """
import importlib.util, sys
tree = "lightning_fabric"
import lightning_easgd
spec = importlib.util.find_spec(tree)
spec.loader = importlib.util.LazyLoader(spec.loader)
module = importlib.util.module_from_spec(spec)
sys.modules[tree] = module
spec.loader.exec_module(module)
assert any(getattr(finder, "tree", None) == tree for finder in sys.meta_path), "nothing has been executed"
module.Fabric
"""
    assert in_new_process(code + CHECK, python_of_torch())[-1] == "registered"


def test_a_loader_of_a_whole_archive():
    code = """
import pathlib, sys, tempfile, warnings, zipfile
archive = pathlib.Path(tempfile.mkdtemp(), "all.zip")
with zipfile.ZipFile(archive, "w") as file:
    file.writestr("other.py", "")
    file.writestr("lightning_fabric/__init__.py", "version = 'of long ago'")
sys.path.insert(0, str(archive))
import lightning_easgd, importlib.util
importlib.util.find_spec("lightning_fabric")
waits = lambda: any(getattr(finder, "tree", None) == "lightning_fabric" for finder in sys.meta_path)
import other
assert waits()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lightning_fabric
assert not waits()
print(lightning_fabric.version, "not registered" in str(caught[-1].message))
"""
    assert in_new_process(code) == ["of long ago True"]
