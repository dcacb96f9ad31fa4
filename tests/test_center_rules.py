"""A rule for the center of one's own: one class and one argument, in both modes, with the same object."""

import math
import os
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from channels import LoneChannel, line_on
from ranks import end_ranks, run_ranks
from reference import MINIMA, synchronous_trace
from toys import Quadratic, Regression, fitted, quiet_trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.averagers import Channel, SynchronousAverager, Transfer, all_reduced_sums
from lightning_easgd.averagers.sync.difference_sum import DifferenceSum
from lightning_easgd.method.elastic import elastic_push_
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.method.rules import AveragedRule, CenterRule, ConstantRate, HeavyBallRule, NesterovRule, PlainRule


class Halving(CenterRule):
    """β is halved at every exchange."""

    def move_(self, stores, difference, rate, version):
        elastic_push_([stores[0]], [difference], rate * 0.5**version)


def train(strategy, steps):
    module = Quadratic(lr=0.1, steps=steps)
    fitted(module, strategy(), 2)
    return module.trace, module.x.item()


def halving_trace(steps, tau, alpha, beta, asynchronous):
    """Rows (x_1, x_2, x̃) after each step of two workers; asynchronous ones take turns."""
    x, center, version, rows = np.ones(2), 1.0, 0, []
    for t in range(steps):
        pull = np.zeros(2)
        if t and t % tau == 0:
            if asynchronous:
                for i in range(2):
                    pull[i] = alpha * (x[i] - center)
                    center += pull[i] * 0.5**version
                    version += 1
            else:
                difference = x - center
                pull = alpha * difference
                center += beta / 2 * difference.sum() * 0.5**version
                version += 1
        x = x - 0.1 * (x - np.array(MINIMA[:2])) - pull
        rows.append((*x, center))
    return np.array(rows)


def test_a_rule_of_ones_own():
    turns = {"mode": "async", "order": "round_robin"}
    cases = [mode | {"process_group_backend": backend} for mode in ({}, turns) for backend in (None, "gloo")]

    def run():
        return [train(lambda each=each: EASGDStrategy(tau=2, center_rule=Halving(), **each), 9) for each in cases]

    for case, *traces in zip(cases, *run_ranks(run, 2), strict=True):
        asynchronous = "order" in case
        expected = halving_trace(9, 2, 0.45, 0.9, asynchronous)
        for rank, (trace, center) in enumerate(traces):
            assert np.array(trace)[:, 0] == pytest.approx(expected[:, rank], abs=1e-6), case
            assert center == pytest.approx(expected[-1, -1], abs=1e-6), case
            if not asynchronous:
                assert np.array(trace)[:, 1] == pytest.approx(expected[:, -1], abs=1e-6), case


class OwnChannel(Channel):
    user = "OwnChannel"

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo")

    def sum(self, buffer):
        return OwnTransfer(dist.all_reduce(buffer, group=self.group, async_op=True))


class OwnTransfer(Transfer):
    def __init__(self, work):
        self.work = work

    def wait(self):
        self.work.wait()


class OverOwnChannel(EASGDStrategy):
    """As CONTRIBUTING.md says it."""

    def make_averaging(self, optimizers):
        return self.synchronous_averaging(OwnChannel(), all_reduced_sums(OwnChannel, self.tau))


@pytest.mark.parametrize("given", [{"center_rule": Halving()}, {"center_rule": Halving(), "pull_to": "new"}])
def test_a_transport_of_ones_own_carries_all_that_the_strategy_was_given(given):
    def end(cls):
        return train(lambda: cls(tau=2, process_group_backend="gloo", **given), 9)

    for own, ours in run_ranks(lambda: (end(OverOwnChannel), end(EASGDStrategy)), 2):
        assert own == ours
        if "pull_to" not in given:
            expected = halving_trace(9, 2, 0.45, 0.9, asynchronous=False)
            assert np.array(own[0])[:, 1] == pytest.approx(expected[:, -1], abs=1e-6)


def test_the_contributors_page_says_how_a_transport_is_given():
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    assert "`self.synchronous_averaging(control, make_sum)`" in page


class Momentum(CenterRule):
    """v ← ½v + rΔ, x̃ ← x̃ + v: a rule with a store of its own."""

    names = ("center", "velocity")

    def move_(self, stores, difference, rate, version):
        center, velocity = stores
        velocity.mul_(0.5)
        elastic_push_([velocity], [difference], rate)
        center.add_(velocity)


@pytest.mark.parametrize("mode", [{}, {"process_group_backend": "gloo"}, {"wire_dtype": "bfloat16"},
                                  {"mode": "async", "order": "round_robin"}])  # fmt: skip
def test_a_resumed_run_goes_on_with_what_the_rule_keeps(mode, tmp_path):
    rules = [Momentum(), Halving(), AveragedRule(NesterovRule(0.5), ConstantRate(0.25))]

    def run(rule):
        def fit(epochs, checkpoint=None):
            torch.manual_seed(0)
            module = Regression(batches=6)
            strategy = EASGDStrategy(tau=2, center_rule=rule, **mode)
            quiet_trainer(strategy=strategy, devices=2, max_epochs=epochs).fit(module, ckpt_path=checkpoint)
            return module

        whole, first = fit(2), fit(1)
        first.trainer.save_checkpoint(tmp_path / "half.ckpt")
        second = fit(2, tmp_path / "half.ckpt")
        pairs = zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
        return all((a == b).all() for a, b in pairs), any((p != q).any() for p, q in zip(
            first.parameters(), second.parameters(), strict=True))  # fmt: skip

    told = run_ranks(lambda: {repr(rule): run(rule) for rule in rules}, 2)
    assert told == [dict.fromkeys(map(repr, rules), (True, True))] * 2


def test_what_another_rule_begins_anew_is_said(tmp_path):
    """Of a checkpoint that is whole, saved in the fit or after it: nothing is put down to an error alone."""
    averaged = {"center_rule": AveragedRule(NesterovRule(0.5), ConstantRate(0.25))}
    nows = {
        "plain": [
            (
                {"outer_momentum": 0.5},
                r"with the stores center: of HeavyBallRule momentum and the count .* begin anew",
            ),
            ({"outer_momentum": 0.5, "worker_state": "none"}, r"with the stores center: of HeavyBallRule momentum"),
            ({"center_rule": Halving()}, "of another rule or saved on an error"),
        ],
        "momentum": [
            (
                averaged,
                r"with the stores center, momentum: of AveragedRule average and the count of exchanges begin anew",
            ),
            ({"outer_momentum": 0.5, "outer_nesterov": True}, None),
            ({}, None),
        ],
        "averaged": [({"outer_momentum": 0.5}, "the count of")],
        "halving": [({"center_rule": Halving()}, None)],
    }  # fmt: skip
    befores = {
        "plain": {}, "momentum": {"outer_momentum": 0.5}, "averaged": averaged, "halving": {"center_rule": Halving()},
    }  # fmt: skip

    class Saves(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "in the fit.ckpt")

    def go_on(now, moment):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            again = quiet_trainer(strategy=EASGDStrategy(tau=2, **now), devices=2, max_epochs=2)
            again.fit(Regression(batches=6), ckpt_path=tmp_path / f"{moment}.ckpt")
        return [message for message in (str(each.message) for each in seen) if "anew" in message]

    def run():
        told = []
        for name, before in befores.items():
            trainer = quiet_trainer(strategy=EASGDStrategy(tau=2, **before), devices=2, callbacks=[Saves()])
            trainer.fit(Regression(batches=6))
            trainer.save_checkpoint(tmp_path / "after it.ckpt")
            for now, says in nows[name]:
                told += [((name, now, moment), says, go_on(now, moment)) for moment in ("in the fit", "after it")]
        return told

    told, _ = run_ranks(run, 2)
    assert len(told) == 16
    for case, says, messages in told:
        if says is None:
            assert messages == [], case
        else:
            assert len(messages) == 1, case
            assert messages[0].startswith("EASGDStrategy: "), case
            assert re.search(says, messages[0]), case


def test_what_is_no_rule_is_refused():
    with pytest.raises(TypeError, match=re.escape("EASGDStrategy(center_rule='halving'): this is no rule")):
        EASGDStrategy(center_rule="halving")


@pytest.mark.parametrize(
    "rule", [PlainRule(), NesterovRule(0.5), Momentum(), AveragedRule(Momentum(), ConstantRate(0.1))]
)
def test_a_rule_is_known_by_what_it_shows(rule):
    again = pickle.loads(pickle.dumps(rule))
    assert repr(again) == repr(rule)
    assert again.stores == len(rule.names)


def test_workers_with_different_rules_are_told():
    def run():
        rule = [Halving(), Momentum()][int(os.environ["RANK"])]
        fitted(Quadratic(steps=6), EASGDStrategy(tau=2, center_rule=rule), 2)

    with pytest.raises(AssertionError, match=r"EASGDStrategy\(center_rule=...\): rank 0 has .*Halving.*rank 1 has"):
        run_ranks(run, 2)


class OfOnesOwn(EASGDStrategy):
    pass


def test_workers_that_give_a_served_center_different_rates_are_told():
    """Kind: the error names the user's class, what differs, and the remedy for that."""

    def run():
        arguments = [{}, {"alpha": 0.1, "beta": 0.5}][int(os.environ["RANK"])]
        fitted(Quadratic(steps=6), OfOnesOwn(tau=2, mode="async", **arguments), 2)

    for outcome in end_ranks(run, 2):
        error = outcome.error.strip().splitlines()[-1]
        assert "OfOnesOwn: the center's exchange is SymmetricExchange(rule=PlainRule()) on rank 0 and " in error
        assert error.endswith("on rank 1; give the strategies of all ranks the same arguments.")
        assert "open_center" not in error


def test_what_a_synchronous_rule_shows_is_the_average():
    """z ← ¾z + ¼x̃ at every exchange, of which there are three."""
    modes = [{}, {"process_group_backend": "gloo"}, {"wire_dtype": "bfloat16"}]

    def run(mode):
        module = Quadratic(lr=0.1, steps=7)
        strategy = EASGDStrategy(tau=2, beta=0.5, center_rule=AveragedRule(PlainRule(), ConstantRate(0.25)), **mode)
        fitted(module, strategy, 2)
        return module.trace, module.x.item()

    expected = synchronous_trace(2, 7, tau=2, alpha=0.25, beta=0.5)
    average = 1.0
    shown = []
    for step in range(7):
        if step and step % 2 == 0:
            average = 0.75 * average + 0.25 * expected[step, -1]
        shown.append(average)
    assert abs(shown[-1] - expected[-1, -1]) > 0.1
    for results in run_ranks(lambda: [run(mode) for mode in modes], 2):
        for mode, (trace, after) in zip(modes, results, strict=True):
            tolerance = 2e-2 if "wire_dtype" in mode else 1e-6
            assert [center for _, center in trace] == pytest.approx(shown, abs=tolerance), mode
            assert after == pytest.approx(shown[-1], abs=tolerance), mode


def test_stores_of_one_name_are_refused():
    nested = AveragedRule(AveragedRule(PlainRule(), ConstantRate(0.1)), ConstantRate(0.2))
    with pytest.raises(ValueError, match=r"EASGDStrategy\(center_rule=.*two of its stores have one name"):
        EASGDStrategy(center_rule=nested)


def test_a_rule_that_shows_an_address_is_refused():
    class Holds(Halving):
        def __init__(self):
            self.what = lambda: 1

    with pytest.raises(ValueError, match="an address differs from rank to rank"):
        EASGDStrategy(center_rule=Holds())


@pytest.mark.parametrize("momentum", [math.nan, math.inf, 1.0, -0.1, "0.9"])
@pytest.mark.parametrize("rule", [NesterovRule, HeavyBallRule])
def test_a_momentum_that_is_none_is_refused(rule, momentum):
    with pytest.raises(ValueError, match=rf"{rule.__name__}\(momentum={momentum!r}\): .* \[0, 1\)"):
        rule(momentum)


@pytest.mark.parametrize("rate", [math.nan, 0.0, 2, "0.1"])
def test_a_rate_that_makes_no_average_is_refused(rate):
    with pytest.raises(ValueError, match=rf"ConstantRate\(rate={rate!r}\): .* \(0, 1\]"):
        ConstantRate(rate)


def test_an_average_without_a_rate_is_refused():
    with pytest.raises(ValueError, match=r"EASGDStrategy\(center_rule=AveragedRule.*no attribute 'after'"):
        EASGDStrategy(center_rule=AveragedRule(PlainRule(), 0.1))


class Bad(CenterRule):
    """A rule that does one thing wrong."""

    names = ("center", "second")

    def move_(self, stores, difference, rate, version):
        elastic_push_([stores[0]], [difference], rate)


class WritesToTheDifference(Bad):
    def move_(self, stores, difference, rate, version):
        stores[0].add_(difference.mul_(rate))


class PutsAnother(Bad):
    def move_(self, stores, difference, rate, version):
        stores[0] = stores[0] + rate * difference


class Returns(Bad):
    def move_(self, stores, difference, rate, version):
        return stores[0] + rate * difference


class ChangesTheStart(Bad):
    def initial_stores(self, center):
        return [center / 2, center]


class HasStoresWithoutNames(Bad):
    def initial_stores(self, center):
        return [center, center, center]


class WantsMoreStores(Bad):
    def move_(self, stores, difference, rate, version):
        stores[2].add_(difference)


class Remembers(Bad):
    def __init__(self):
        self.moves = 0

    def move_(self, stores, difference, rate, version):
        self.moves += 1
        stores[0].add_(difference, alpha=rate / self.moves)


class RemembersInSecret(Remembers):
    def __repr__(self):
        return "RemembersInSecret()"


class DrawsAtRandom(Bad):
    def move_(self, stores, difference, rate, version):
        stores[0].add_(torch.rand_like(difference))


class LooksAtTheWhole(Bad):
    def move_(self, stores, difference, rate, version):
        stores[0].add_(difference / difference.norm())


class DeniesItsMemory(Bad):
    has_memory = False


class DeniesTheVersion(Bad):
    names = ("center",)
    has_memory = False

    def move_(self, stores, difference, rate, version):
        elastic_push_([stores[0]], [difference], rate / (version + 1))


class ShowsNothing(Bad):
    shown = 2


class OneName(Bad):
    names = "center"


class NoName(Bad):
    names = ()


class NamesInNoOrder(Bad):
    names = frozenset(("center", "second"))


class PutsAnotherInside(Bad):
    """The store stays the same object, and its memory is not where the center is."""

    def move_(self, stores, difference, rate, version):
        stores[0].data = stores[0] + rate * difference


class Shrinks(Bad):
    def move_(self, stores, difference, rate, version):
        stores[0].resize_(1)


class StartsAtRandom(Bad):
    def initial_stores(self, center):
        return [center, torch.rand_like(center)]


class StartsFromTheWhole(Bad):
    def initial_stores(self, center):
        return [center, torch.full_like(center, float(center.norm()))]


class WritesToTheStart(Bad):
    def initial_stores(self, center):
        return [center.clone(), center.zero_()]


class StartsWithNoTensor(Bad):
    def initial_stores(self, center):
        return [center, 0.0]


class DividesByTheVersion(Bad):
    def move_(self, stores, difference, rate, version):
        elastic_push_([stores[0]], [difference], rate / version)


class TakesRoots(Bad):
    def move_(self, stores, difference, rate, version):
        stores[0].add_(difference.sqrt(), alpha=rate)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (WritesToTheDifference, "it only reads it"),
        (PutsAnother, "puts other tensors in place of the stores"),
        (PutsAnotherInside, "puts other tensors in place of the stores"),
        (Shrinks, "puts other tensors in place of the stores"),
        (Returns, "move_ returns a Tensor; it moves the stores in place"),
        (ChangesTheStart, "initial_stores changes store 0"),
        (HasStoresWithoutNames, "initial_stores gives 3 values, and 2 tensors"),
        (StartsWithNoTensor, "initial_stores gives 2 values, and 2 tensors"),
        (WritesToTheStart, "initial_stores changes store 0"),
        (StartsAtRandom, "initial_stores, called twice on the same numbers"),
        (StartsFromTheWhole, "initial_stores begins a part of a store by what is in other parts"),
        (WantsMoreStores, "index out of range"),
        (Remembers, "move_ changes what the rule shows"),
        (RemembersInSecret, "tried twice on the same numbers it makes different ones"),
        (DrawsAtRandom, "tried twice on the same numbers it makes different ones"),
        (LooksAtTheWhole, "by what is in other parts"),
        (DeniesItsMemory, "leave has_memory=True"),
        (DeniesTheVersion, "leave has_memory=True"),
        (ShowsNothing, "shown=2 is none of its 2 stores"),
        (OneName, "names='center' are no names of stores"),
        (NoName, r"names=\(\) are no names of stores"),
        (NamesInNoOrder, r"names=frozenset.* are no names of stores"),
        (DividesByTheVersion, r"tried on 5 numbers: ZeroDivisionError\('float division by zero'\)"),
        (TakesRoots, "of finite numbers it makes some that are not"),
    ],
)
def test_a_rule_that_would_make_wrong_numbers_in_silence_is_refused(rule, says):
    with pytest.raises((TypeError, ValueError), match=rf"EASGDStrategy\(center_rule=.*{rule.__name__}.*{says}"):
        EASGDStrategy(center_rule=rule())


@dataclass(frozen=True)
class DividesByZero(CenterRule):
    """Sound on the few numbers on which a rule is tried."""

    def move_(self, stores, difference, rate, version):
        stores[0].add_(difference, alpha=rate)
        if version == 3:
            stores[0].div_(0)


@pytest.mark.parametrize(
    ("mode", "on_nonfinite", "tau"),
    [({}, "fail", 2), ({}, "reset", 4), ({"mode": "async"}, "fail", 4), ({"mode": "async"}, "reset", 2)],
)
def test_a_center_that_is_not_finite_is_no_workers_fault(mode, on_nonfinite, tau):
    """Whether a worker is pulled there before the end or not: no run ends well with such a center."""

    def run():
        strategy = EASGDStrategy(tau=tau, on_nonfinite=on_nonfinite, center_rule=DividesByZero(), **mode)
        fitted(Quadratic(lr=0.1, steps=18), strategy, 2)

    for outcome in end_ranks(run, 2):
        assert "EASGDStrategy: the center is not finite, and every difference that moved it was" in outcome.error


def test_a_sum_that_does_not_end_an_exchange_is_told():
    """Rules count exchanges by the version: a sum of somebody's own must, too."""

    class Forgets(DifferenceSum):
        def renewed(self, center, origins):
            return Forgets(center, center.values.like())

        @property
        def nbytes(self):
            return 0

        def start(self, shares):
            self.shares = shares

        def advance(self):
            pass

        def finish(self):
            self.center.move_(slice(None), self.wire.flat, self.shares[0])

    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    line = line_on(LoneChannel([]), LoneChannel([]))
    averager = SynchronousAverager(
        optimizer, line, lambda center: Forgets(center, center.values.like()), number=0, tau=1, rates=MovingRates()
    )
    module(torch.ones(1, 2)).sum().backward()
    averager.finish()
    averager.begin()
    with pytest.raises(RuntimeError, match=r"EASGDStrategy: Forgets has made .*call center.end_exchange\(\) once"):
        averager.settle()
