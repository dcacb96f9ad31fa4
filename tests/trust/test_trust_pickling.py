"""Trainer, strategy and module are pickled and copied as with ddp: before a fit, after one, after a failed one."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from ranks import run_ranks
from toys import Regression, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy
from lightning_easgd.method.rules import CenterRule, NesterovRule
from lightning_easgd.method.schedules import Schedule

STRATEGIES = {
    "ddp": lambda: "ddp",
    "sync": lambda: EASGDStrategy(tau=3),
    "async": lambda: EASGDStrategy(tau=3, mode="async"),
    "eamsgd int8": lambda: EASGDStrategy(tau=3, momentum=0.9, wire_dtype="int8"),
    "recalibrated": lambda: EASGDStrategy(tau=3, recalibrate_batchnorm=2),
    "downpour": lambda: DownpourStrategy(tau=3),
}


class Fails(Regression):
    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if index == 5:
            torch.distributed.barrier()  # else one may hear of the other's error, in an exchange, before its own
            raise KeyError("wrong")
        return super().training_step(batch, index)


def copies(thing: Any) -> list[Any]:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return [pickle.loads(pickle.dumps(thing)), copy.deepcopy(thing), torch.load(buffer, weights_only=False)]


class Holding(CenterRule):
    """It holds what cannot be pickled, and does not show it."""

    def __init__(self) -> None:
        self.move = lambda center, difference, rate: center.add_(difference, alpha=rate)

    def move_(self, stores: Any, difference: torch.Tensor, rate: float, version: int) -> None:
        self.move(stores[0], difference, rate)

    def __repr__(self) -> str:
        return "Holding()"


def local_rule() -> CenterRule:
    class Local(CenterRule):
        def move_(self, stores: Any, difference: torch.Tensor, rate: float, version: int) -> None:
            stores[0].add_(difference, alpha=rate)

    return Local()


def local_schedule() -> Schedule:
    class Local(Schedule):
        extremes = (0.1, 0.1)

        def __call__(self, step: int) -> float:
            return 0.1

    return Local()


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
@pytest.mark.parametrize("cls", [EASGDStrategy, FabricEASGDStrategy])
@pytest.mark.parametrize(
    "given",
    [{"center_rule": Holding()}, {"center_rule": local_rule()}, {"alpha": local_schedule()}, {"rho": local_schedule()}],
)
def test_what_spawned_ranks_cannot_be_given_is_named(start_method: str, cls: type, given: dict[str, Any]) -> None:
    """Kind: an argument that cannot be pickled is an error before any process starts, by its name."""
    said = rf"^EASGDStrategy\({next(iter(given))}=.*, start_method='{start_method}'\): .*start_method='popen'\.$"
    with pytest.raises(ValueError, match=said):
        cls(start_method=start_method, **given)
    cls(**given)  # ranks that run the script again make their own
    cls(start_method="fork", **given)
    cls(start_method=start_method, center_rule=NesterovRule(0.5))


def test_copies_of_trainer_strategy_and_module() -> None:
    def train(name: str) -> None:
        trainer = quiet_trainer(strategy=STRATEGIES[name](), devices=2)
        copies(trainer)
        module = Regression()
        trainer.fit(module)
        for again in copies(trainer):
            assert again.global_step == 8, name
        copies(trainer.strategy)
        for again in copies(module):
            assert all(map(torch.equal, again.parameters(), module.parameters())), name

    run_ranks(lambda: [*map(train, STRATEGIES)], 2)


@pytest.mark.parametrize("name", STRATEGIES)
def test_copies_after_a_failed_fit(name: str) -> None:
    def train() -> None:
        trainer = quiet_trainer(strategy=STRATEGIES[name](), devices=2)
        module = Fails()
        with pytest.raises(KeyError):
            trainer.fit(module)
        for thing in (trainer, trainer.strategy, module):
            copies(thing)

    run_ranks(train, 2)


def test_a_copy_still_has_the_center_read_only() -> None:
    def train(name: str) -> None:
        trainer = quiet_trainer(strategy=STRATEGIES[name](), devices=2)
        trainer.fit(Regression())
        for again in copies(trainer.strategy):
            assert again.center.keys() == trainer.strategy.center.keys(), name
            assert all(map(torch.equal, again.center.values(), trainer.strategy.center.values())), name
            with pytest.raises(TypeError):
                again.center["x"] = torch.ones(())

    run_ranks(lambda: [*map(train, ("sync", "async", "downpour"))], 2)


def test_the_other_tree() -> None:
    def train() -> None:
        import pytorch_lightning as pl
        from pytorch_lightning.demos.boring_classes import BoringModel

        from lightning_easgd.pl import EASGDStrategy as PLStrategy

        quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, max_epochs=1, strategy=PLStrategy(tau=3), enable_model_summary=False, **quiet
        )
        trainer.fit(BoringModel())
        copies(trainer)
        for again in copies(trainer.strategy):
            assert again.center.keys() == trainer.strategy.center.keys()

    pytest.importorskip("pytorch_lightning")
    run_ranks(train, 2)


def test_a_copied_trainer_goes_on() -> None:
    def train(name: str) -> int:
        trainer = copy.deepcopy(quiet_trainer(strategy=STRATEGIES[name](), devices=2))
        trainer.fit(Regression())
        again = pickle.loads(pickle.dumps(trainer))
        again.fit_loop.max_epochs = 2
        again.fit(Regression())
        return again.global_step

    names = ("ddp", "sync", "async")
    assert run_ranks(lambda: {name: train(name) for name in names}, 2) == [dict.fromkeys(names, 16)] * 2


def test_fabrics_strategy() -> None:
    def train() -> None:
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(tau=2))
        fabric.launch()
        module = torch.nn.Linear(4, 1)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), 0.1))
        for _ in range(5):
            fabric.backward(model(torch.ones(2, 4)).sum())
            optimizer.step()
        fabric.strategy.finalize()
        for again in copies(fabric.strategy):
            assert again.center.keys() == {"weight", "bias"}

    run_ranks(train, 2)
