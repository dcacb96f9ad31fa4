"""Kind: parameters that are one memory are one to the center; nothing moves them twice, or from behind."""

from datetime import timedelta

import lightning as L
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader
from toys import TwoLayers, fitted, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.tensors.memory import Memory, once

pytestmark = pytest.mark.timeout(120)
TIMEOUT = timedelta(seconds=20)
STRATEGIES = {
    "sync": lambda: EASGDStrategy(tau=2, timeout=TIMEOUT),
    "local sgd": lambda: EASGDStrategy(tau=2, alpha=1.0, beta=1.0, pull_to="new", timeout=TIMEOUT),
    "async": lambda: EASGDStrategy(tau=2, mode="async", order="round_robin", timeout=TIMEOUT),
    "downpour": lambda: DownpourStrategy(tau=2, order="round_robin", timeout=TIMEOUT),
}


class Tied(TwoLayers):
    """The first layer's weight is the memory of other parameters, too, which take no part in the loss."""

    def __init__(self, kind, steps=9):
        super().__init__(steps=steps)
        weight, self.kind, self.trace, self.seen = self.net.first.weight, kind, [], []
        if kind in ("whole", "in another group", "three"):
            self.other = nn.Parameter(weight.data)
        if kind == "three":
            self.third = nn.Parameter(weight.data)
        if kind in ("part", "part outside"):
            self.other = nn.Parameter(weight.data[1:], requires_grad=kind == "part")
        if kind == "larger":  # the module's own order has the part first
            whole = torch.cat([weight.data, torch.ones(1, 2).double()])
            weight.data = whole[:-1]
            self.other = nn.Parameter(whole)
        if kind == "frozen":
            self.other = nn.Parameter(weight.data, requires_grad=False)
        if kind == "outside":
            self.other = nn.Parameter(weight.data)
        if kind == "buffer":
            self.register_buffer("other", weight.data)

    def configure_optimizers(self):
        inside = [*self.net.parameters()]
        others = [p for name, p in self.named_parameters() if not name.startswith("net.")]
        if self.kind == "in another group":
            return torch.optim.SGD([{"params": others}, {"params": inside}], lr=0.1)
        return torch.optim.SGD(
            inside if self.kind in ("frozen", "outside", "part outside") else inside + others, lr=0.1
        )

    def on_train_batch_end(self, *_):
        self.trace.append(self.values())

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        center = self.trainer.strategy.center
        value = center["net.first.weight"] if "net.first.weight" in center else center["other"][:3]
        self.seen.append(torch.equal(value, self.net.first.weight))

    def values(self):
        return [p.detach().clone() for p in self.net.parameters()]


def train(name, kind, folder=None, **arguments):
    module = Tied(kind)
    trainer = quiet_trainer(strategy=STRATEGIES[name](), devices=2, max_epochs=2, val_check_interval=3, **arguments)
    trainer.fit(module, ckpt_path=folder)
    return module.trace, module.values(), module.seen


def equal(these, those):
    return len(these) == len(those) and all(map(torch.equal, these, those))


TRAINED = ("whole", "in another group", "three", "part", "larger")
UNTRAINED = ("frozen", "outside", "part outside", "buffer")


@pytest.mark.parametrize("name", STRATEGIES)
def test_parameters_of_one_memory_are_moved_once_and_what_no_optimizer_has_follows_it(name):
    kinds = TRAINED + UNTRAINED if name in ("sync", "async") else TRAINED

    def train_all():
        trace, final, _ = train(name, "")
        told = {}
        for kind in kinds:
            tied, tied_final, seen = train(name, kind)
            moved_once = len(tied) == len(trace) and all(map(equal, tied, trace))
            told[kind] = moved_once, equal(tied_final, final), bool(seen) and all(seen)
        return told

    assert run_ranks(train_all, 2, timeout=90) == [dict.fromkeys(kinds, (True, True, True))] * 2


@pytest.mark.parametrize("name", ["sync", "async"])
def test_they_go_on_bit_for_bit(name, tmp_path):
    def go_on(kind):
        broken = quiet_trainer(strategy=STRATEGIES[name](), devices=2, max_epochs=1, val_check_interval=3)
        broken.fit(Tied(kind))
        broken.save_checkpoint(tmp_path / "x.ckpt")
        trace, final, _ = train(name, kind, tmp_path / "x.ckpt")
        whole, whole_final, _ = train(name, kind)
        return len(trace) == 9 and all(map(equal, trace, whole[9:])), equal(final, whole_final)

    kinds = ("three", "part", "frozen")
    told = run_ranks(lambda: {kind: go_on(kind) for kind in kinds}, 2)
    assert told == [dict.fromkeys(kinds, (True, True))] * 2


def test_what_is_written_to_beside_the_trained_columns_of_a_matrix_has_a_common_value():
    class Columns(TwoLayers):
        def __init__(self):
            super().__init__(steps=6)
            weight, self.seen = self.net.first.weight, []
            whole = torch.cat([weight.data, torch.ones_like(weight)], 1)
            weight.data = whole[:, : weight.shape[1]]
            self.teacher = nn.Parameter(whole[:, weight.shape[1] :], requires_grad=False)

        def on_train_batch_end(self, *_):
            with torch.no_grad():
                self.teacher += 1 + self.global_rank

        def validation_step(self, batch, index):
            super().validation_step(batch, index)
            self.seen.append(self.teacher.mean().item())

    def train():
        strategy = EASGDStrategy(tau=2, timeout=TIMEOUT)
        trainer = quiet_trainer(strategy=strategy, devices=2, max_epochs=1, val_check_interval=3)
        module = Columns()
        trainer.fit(module)
        return set(module.seen)

    assert run_ranks(train, 2) == [{1 + 3 * 1.5, 1 + 6 * 1.5}] * 2


class Pair(L.LightningModule):
    """½(a - c)² + ½(b + 2)² from 1, where b is a, or another parameter of its memory."""

    def __init__(self, kind):
        super().__init__()
        self.a = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.b = self.a if kind == "one" else nn.Parameter(self.a.data)
        self.trace = []

    def training_step(self, batch, index):
        return 0.5 * ((self.a - (1 + 3 * self.global_rank)).square() + (self.b + 2).square()).sum()

    def on_train_batch_end(self, *_):
        self.trace.append(self.a.tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=self.momentum)

    def train_dataloader(self):
        return DataLoader(torch.zeros(2 * 12))


def test_a_gradient_of_each_moves_them_like_one_parameter():
    def train(kind, arguments):
        module = Pair(kind)
        module.momentum = arguments.get("momentum", 0.0)
        fitted(module, EASGDStrategy(tau=3, timeout=TIMEOUT, **arguments), 2)
        return [*module.trace, module.a.tolist()]

    cases = [{}, {"momentum": 0.5}, {"momentum": 0.5, "mode": "async", "order": "round_robin"}]
    for traces in run_ranks(lambda: [(train("one", each), train("two", each)) for each in cases], 2):
        for case, (one, two) in zip(cases, traces, strict=True):
            expected, made = (torch.tensor(each, dtype=torch.float64) for each in (one, two))
            torch.testing.assert_close(made, expected, msg=lambda text, case=case: f"{case}: {text}")


class Comes(Pair):
    """The other one of b's memory is unfrozen in mid-training, or the optimizer loses it."""

    def __init__(self, kind):
        super().__init__("two")
        self.kind = kind
        self.a.requires_grad_(kind != "comes")

    def training_step(self, batch, index):
        if index == 5 and self.kind == "comes":
            self.a.requires_grad_(True)
        if index == 5 and self.kind == "goes":
            self.trainer.optimizers[0].param_groups[0]["params"] = [self.b]
        return ((self.b - (1 + 3 * self.global_rank)).square() + (self.b + 2).square()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD([self.b] if self.kind == "alone" else self.parameters(), lr=0.05)


def test_the_center_of_a_memory_goes_on_when_another_parameter_of_it_takes_part():
    def train(kind, arguments):
        module = fitted(Comes(kind), EASGDStrategy(tau=3, timeout=TIMEOUT, **arguments), 2)
        return [*module.trace, module.a.tolist()]

    cases = [{}, {"wire_dtype": "int8"}, {"outer_momentum": 0.5}]
    kinds = ("alone", "comes", "goes")
    for traces in run_ranks(lambda: [[train(kind, each) for kind in kinds] for each in cases], 2):
        for case, (alone, comes, goes) in zip(cases, traces, strict=True):
            assert comes == alone, case
            assert goes == alone, case


def test_one_of_those_that_are_one_memory_is_chosen():
    whole = torch.randn(4, 6)
    same, row, column = whole[:], whole[1], whole[:, 1]
    other, twin = torch.randn(4, 6), torch.empty(0)
    assert once([same, whole, row, other]) == {id(same), id(other)}
    assert once([row, column, whole]) == {id(whole)}
    assert once([row], [whole]) == {id(row), id(whole)}  # the first come first; the second is more than they are
    assert once([twin, torch.empty(0, device="meta")], [whole, same]) >= {id(twin), id(whole)}


def test_columns_of_one_matrix_are_apart_and_overlap_in_their_bytes():
    whole = torch.randn(4, 6)
    left, right, odd = whole[:, :3], whole[:, 3:], whole[:, 1::2]
    assert once([left, right, odd]) == {id(left), id(right), id(odd)}
    assert not Memory([left]).touches(right)
    assert not Memory([right]).touches(left)
    assert not Memory([whole[:, ::2]]).touches(whole[:, 1::2])
    assert not Memory([whole[:2, :3]]).touches(whole[1:, 3:])
    assert Memory([whole[:2, :4]]).touches(whole[1:, 3:])
    assert Memory([left.T]).touches(left[2])
    assert Memory([left]).touches(whole[:, 2])
    assert not Memory([left]).holds(odd)
    assert Memory([left]).touches(odd)
    assert Memory([left]).holds(whole[:, :3])
    assert not Memory([whole[0]]).touches(whole[1])
    assert not Memory([whole]).touches(torch.randn(4, 6))


def test_a_sparse_tensor_is_in_nobodys_memory():
    tensor = torch.eye(3).to_sparse()
    assert not Memory([tensor]).holds(tensor)
    assert once([tensor]) == {id(tensor)}
