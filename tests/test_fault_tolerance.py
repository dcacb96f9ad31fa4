"""Workers that come, die and return: what is refused, the sum over those that are there, and real processes."""

import socket
import subprocess
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, StochasticWeightAveraging
from membership_job import clean_environment
from preloaded import python_of_torch
from ranks import end_ranks
from torch.utils.data import DataLoader
from toys import Quadratic, quiet_trainer

from lightning_easgd import EASGDModelParallelStrategy, EASGDStrategy, FaultTolerance
from lightning_easgd.averagers import ExchangeError, Meeting, SynchronousAveraging
from lightning_easgd.averagers.sync.addition import ExactAddition
from lightning_easgd.averagers.sync.choice import channel_joins, sliced_sums
from lightning_easgd.averagers.sync.membership_sum import MembershipSum
from lightning_easgd.averagers.sync.pull import PullToNew, PullToOld
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.fabric import EASGDStrategy as FabricStrategy
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.method.rules import NesterovRule
from lightning_easgd.strategies.elastic_worker import ElasticWorker
from lightning_easgd.strategies.trainer.launching import RankLauncher
from lightning_easgd.strategies.trainer.lightning_private import clocks_of, go_on_at
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport.channel import LoneChannel
from lightning_easgd.transport.lighthouse import Heard, Lighthouse
from lightning_easgd.transport.worker_layout import WorkerLayout

HERE_ON_DISK = Path(__file__).parent
HERE = FaultTolerance("http://localhost:1", 0)


class TestSettings:
    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            ({"lighthouse": 3}, TypeError, r"lighthouse=3\): give the address"),
            ({"lighthouse": "host:29510"}, ValueError, r"lighthouse='host:29510'\): an address is 'http://host:port'"),
            ({"replica_id": -1}, ValueError, r"replica_id=-1\): it is at least 0"),
            ({"replica_id": "1"}, TypeError, r"replica_id='1'\): give an int"),
            ({"replica_id": True}, TypeError, r"replica_id=True\): give an int"),
            ({"group_size": 0}, ValueError, r"group_size=0\): it is at least 1"),
            ({"replica_id": 2, "group_size": 2}, ValueError, r"replica_id=2, group_size=2\): the data are cut"),
            ({"min_replica_size": 0}, ValueError, r"min_replica_size=0\): it is at least 1"),
            ({"min_replica_size": None}, TypeError, r"min_replica_size=None\): give an int"),
            ({"quorum_timeout": 0}, ValueError, r"quorum_timeout=0\): a time to wait is positive"),
            ({"quorum_timeout": "5"}, TypeError, r"quorum_timeout='5'\): give seconds"),
            ({"process_group_timeout": timedelta(-1)}, ValueError, r"process_group_timeout=-1 day.*positive"),
            ({"process_group_timeout": float("nan")}, ValueError, r"process_group_timeout=nan\): .*positive"),
            ({"quorum_timeout": 1e12}, ValueError, r"quorum_timeout=1000000000000.0\): .*a year at most"),
            ({"process_group": "mpi"}, ValueError, r"process_group='mpi'\): unknown; use 'gloo'"),
            ({"restart_after_missed": 0}, ValueError, r"restart_after_missed=0\): it is at least 1"),
        ],
    )
    def test_what_cannot_be_is_refused(self, arguments, error, said):
        with pytest.raises(error, match=rf"^FaultTolerance\({said}"):
            FaultTolerance(**arguments)

    def test_it_comes_from_the_environment(self):
        found = FaultTolerance(group_size=4, quorum_timeout=timedelta(seconds=3)).resolved(
            {"TORCHFT_LIGHTHOUSE": "http://here:1", "REPLICA_GROUP_ID": "3"}
        )
        assert (found.lighthouse, found.replica_id, found.quorum_timeout) == ("http://here:1", 3, 3.0)

    @pytest.mark.parametrize(
        ("environment", "said"),
        [
            ({}, r"lighthouse=None\): there is no address, and TORCHFT_LIGHTHOUSE is not set"),
            ({"TORCHFT_LIGHTHOUSE": "here"}, r"lighthouse=None\) with TORCHFT_LIGHTHOUSE='here': an address is"),
            ({"TORCHFT_LIGHTHOUSE": "http://a:1"}, r"replica_id=None\): REPLICA_GROUP_ID is not set"),
            ({"TORCHFT_LIGHTHOUSE": "http://a:1", "REPLICA_GROUP_ID": "x"}, r"replica_id=None\): .* is 'x'"),
            (
                {"TORCHFT_LIGHTHOUSE": "http://a:1", "REPLICA_GROUP_ID": "4"},
                r"replica_id=None\) .*=4, group_size=4: the",
            ),
        ],
    )
    def test_what_is_missing_is_said(self, environment, said):
        with pytest.raises(ValueError, match=rf"^FaultTolerance\({said}"):
            FaultTolerance(group_size=4).resolved(environment)

    def test_torchft_is_asked_for(self, monkeypatch):
        monkeypatch.setattr("lightning_easgd.strategies.fault_tolerance.find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning_easgd\[elastic\]'"):
            quiet_trainer(strategy=EASGDStrategy(fault_tolerance=HERE), devices=1)


class Noting(Quadratic):
    """Notes where it begins, as another worker would hear it, and where each of its batches is."""

    NAMES = ("epoch", "batch", "steps", "batches")

    def __init__(self):
        super().__init__(steps=6, record=False)
        self.goes_on_at = None
        self.places = []

    def on_train_start(self):
        self.began = clocks_of(self.trainer, begins=True)
        if self.goes_on_at is not None:
            go_on_at(self.trainer, self.goes_on_at)

    def on_train_batch_start(self, batch, index):
        ready = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self.places.append([self.current_epoch, index, self.global_step, ready - 1])

    def validation_step(self, batch, index):
        pass

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(1))

    def configure_optimizers(self):
        sgd = super().configure_optimizers()
        return [sgd], [torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.9)]


class Scheduled(Quadratic):
    def training_step(self, batch, index):
        self.log("steps", float(self.global_step))
        return super().training_step(batch, index)

    def configure_optimizers(self):
        sgd = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "monitor": "steps"}}


class TestStrategy:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"mode": "async"}, r"mode='async', fault_tolerance=\.\.\.\): a served center"),
            (
                {"center_device": "cpu", "fault_tolerance": FaultTolerance(process_group="nccl")},
                r"center_device='cpu', fault_tolerance=FaultTolerance\(process_group='nccl'\)\): .*leave center_device",
            ),
            (
                {"wire_dtype": "int8", "fault_tolerance": FaultTolerance(process_group="nccl")},
                r"wire_dtype='int8', fault_tolerance=FaultTolerance\(process_group='nccl'\)\): .*leave wire_dtype out",
            ),
        ],
    )
    def test_what_does_not_go_with_it_is_refused(self, arguments, said):
        with pytest.raises(ValueError, match=rf"^EASGDStrategy\({said}"):
            EASGDStrategy(**{"fault_tolerance": True, **arguments})

    @pytest.mark.parametrize(
        ("device", "per_worker", "said"),
        [("cpu", 1, "this one has 1 of the type cpu; use 'gloo'"), ("cuda:0", 2, "this one has 2 of the type cuda")],
    )
    def test_nccl_needs_a_gpu_and_has_one(self, device, per_worker, said):
        worker = ElasticWorker("EASGDStrategy", FaultTolerance("http://localhost:1", 0, process_group="nccl"))
        with pytest.raises(ValueError, match=rf"^EASGDStrategy\(fault_tolerance=.*process_group='nccl'\)\): .*{said}"):
            worker.resolve(WorkerLayout(per_worker, per_worker), "devices_per_worker=2", torch.device(device))

    def test_what_is_no_setting_is_refused(self):
        with pytest.raises(TypeError, match=r"^EASGDStrategy\(fault_tolerance='yes'\): give True"):
            EASGDStrategy(fault_tolerance="yes")
        with pytest.raises(ValueError, match="Fabric's workers are a fixed number"):
            FabricStrategy(fault_tolerance=True)

    @pytest.mark.parametrize(
        ("strategy", "said"),
        [
            (partial(EASGDStrategy), r"2 of 1 device; .*one worker \(devices_per_worker=2\)\.$"),
            (partial(EASGDModelParallelStrategy, 1), r"2 of 1 device; .*one worker \(data_parallel_size=2\)\.$"),
        ],
    )
    def test_one_launch_is_one_worker(self, strategy, said):
        with pytest.raises(ValueError, match=rf"a launch is one worker, and this one has {said}"):
            quiet_trainer(strategy=strategy(fault_tolerance=HERE), devices=2)

    @pytest.mark.parametrize(
        ("group_size", "training", "arguments"),
        [
            (4, True, {"num_replicas": 8, "rank": 5}),
            (4, False, {"num_replicas": 2, "rank": 1}),
            (None, True, {"num_replicas": 2, "rank": 1, "seed": 2_000_006}),
        ],
    )
    def test_ranks_of_a_worker_share_its_data(self, monkeypatch, group_size, training, arguments):
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        worker = ElasticWorker("EASGDStrategy", FaultTolerance("http://localhost:1", 2, group_size))
        assert worker.sampler_arguments({"num_replicas": 2, "rank": 1}, training=training) == arguments

    def test_rates_and_schedules_are_handed_over_as_of_one_step(self):
        handed = []

        class Seen(torch.optim.lr_scheduler.StepLR):
            def get_lr(self):
                handed.append(worker._now)  # as another thread may, in the middle of a step
                return super().get_lr()

        worker = ElasticWorker("EASGDStrategy", HERE)
        averager = SimpleNamespace(clock=100)
        worker._session = SimpleNamespace(averagers=[averager])
        sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = Seen(sgd, 2, gamma=0.5)
        handed.clear()
        configs = [SimpleNamespace(scheduler=schedule)]
        none = SimpleNamespace(ready=0)
        batches = SimpleNamespace(current=none, total=none)
        never = SimpleNamespace(_last_train_dl_reload_epoch=0, _last_val_dl_reload_epoch=0)
        worker._trainer = SimpleNamespace(
            global_step=0, current_epoch=0, accumulate_grad_batches=1, optimizers=[sgd], lr_scheduler_configs=configs,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=batches, val_loop=never), **vars(never)),
            lightning_module=SimpleNamespace(automatic_optimization=True),
        )  # fmt: skip
        for _ in range(6):
            worker.note_clocks()
            sgd.step()
            averager.clock += 1
            schedule.step()
            worker._trainer.global_step += 1
        assert len(handed) == 6
        for clocks in handed:
            assert clocks["clock"] == clocks["steps"] + 100
            assert clocks["rates"][0][0]["lr"] == 0.5 ** (clocks["schedulers"][0]["last_epoch"] // 2)

    def test_who_comes_has_the_clock_of_the_others_step(self):
        """Kind: what is handed over is of one moment; else the clock would gain on the steps with each that comes."""
        trainer = quiet_trainer(devices=1, max_epochs=1)
        worker, averager = ElasticWorker("EASGDStrategy", HERE), SimpleNamespace(clock=0)
        averager.go_on_at = lambda clock: vars(averager).update(clock=clock)
        module = Quadratic(record=False)

        def comes():
            averager.clock = 8  # the others' of the moment in which it was sent
            worker._receive_clocks({**clocks_of(trainer), "clock": 7, "steps": 5, "batch": 5, "parameters": []})

        session = SimpleNamespace(averaging=SimpleNamespace(enter=comes), described=list, averagers=[averager])
        module.on_train_start = lambda: worker.enter(session, trainer)
        trainer.fit(module)
        assert trainer.global_step == 6
        assert averager.clock == 7

    def test_a_number_that_is_not_known_yet(self, monkeypatch):
        monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://localhost:1")
        monkeypatch.setenv("REPLICA_GROUP_ID", "3")
        strategy = EASGDStrategy(fault_tolerance=True)
        with pytest.raises(RuntimeError, match=r"^EASGDStrategy\.replica_id: it is known once a Trainer has"):
            _ = strategy.replica_id
        quiet_trainer(strategy=strategy, devices=1)
        assert strategy.replica_id == 3

    @pytest.mark.parametrize("theirs", [["b (2,)", "a (2,)"], ["a (2,)", "c (2,)"], ["a (2,)"]])
    def test_others_of_other_parameters_are_refused_also_where_there_are_as_many_numbers(self, theirs):
        worker = ElasticWorker("EASGDStrategy", HERE)
        worker._parameters = ["a (2,)", "b (2,)"]
        worker._now = {"rates": [], "schedulers": []}
        worker._check_alike({**worker._now, "parameters": worker._parameters})
        with pytest.raises(ExchangeError, match=r"other workers average .* where this one has [ab] \(2,\); give all"):
            worker._check_alike({**worker._now, "parameters": theirs})

    def test_the_first_epoch_of_one_that_comes_ends_as_any_other(self):
        """A schedule that follows a metric is stepped, also where steps alone end the fit; nothing is resumed."""
        trainer = quiet_trainer(devices=1, max_epochs=-1, max_steps=14)
        module = Scheduled(steps=6, record=False)
        module.on_train_start = lambda: go_on_at(trainer, {**clocks_of(trainer), "batch": 2, "batches": 2, "steps": 2})
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "You're resuming from a checkpoint")
            trainer.fit(module)
        assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2  # after 6 and 12 steps

    def test_who_comes_to_a_later_epoch_of_more_batches_has_those_that_are_left(self):
        """Kind: a number is asked for before it is made: loaders of that epoch come after the hook (reload)."""

        class Growing(Quadratic):
            def train_dataloader(self):
                return DataLoader(torch.zeros(2 + 2 * self.trainer.current_epoch), batch_size=1)

        trainer = quiet_trainer(devices=1, max_epochs=4, reload_dataloaders_every_n_epochs=1)
        module = Growing(record=False)
        theirs = {"epoch": 3, "batch": 6, "batches": 18, "steps": 18}
        module.on_train_start = lambda: go_on_at(trainer, {**clocks_of(trainer), **theirs})
        trainer.fit(module)
        assert trainer.global_step == 20  # of 2 + 4 + 6 + 8

    @pytest.mark.parametrize("check_every", [1, 5])
    def test_who_comes_has_the_data_of_the_epoch_in_which_the_others_have_loaded_theirs(self, check_every):
        """Kind: what is counted from the own beginning; it is that of the job."""

        class Loading(Quadratic):
            def __init__(self):
                super().__init__(record=False)
                self.used = []

            def train_dataloader(self):
                return DataLoader([float(self.trainer.current_epoch)], batch_size=1)

            def training_step(self, batch, index):
                self.used.append((self.current_epoch, "trains", batch.item()))
                return super().training_step(batch, index)

            def validation_step(self, batch, index):
                self.used.append((self.current_epoch, "validates", batch.item()))

            val_dataloader = train_dataloader

        def trainer():
            every = {"reload_dataloaders_every_n_epochs": 3, "check_val_every_n_epoch": check_every}
            return quiet_trainer(devices=1, max_epochs=12, **every)

        first, clocks, of_first = Loading(), [], trainer()
        first.on_train_batch_start = lambda *_: clocks.append(clocks_of(of_first))
        of_first.fit(first)
        for epoch in (1, 4, 6, 11):
            other, of_other = Loading(), trainer()
            other.on_train_start = partial(go_on_at, of_other, clocks[epoch])
            of_other.fit(other)
            assert other.used == [each for each in first.used if each[0] >= epoch]

    @pytest.mark.timeout(60)
    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:Be aware that when using")
    @pytest.mark.parametrize(
        ("saves", "accumulate", "ends"),
        [
            ({"every_n_train_steps": 3}, 1, {"max_epochs": 4}),
            ({"every_n_train_steps": 2}, 2, {"max_epochs": -1, "max_steps": 12}),
            ({"save_last": True}, 2, {"max_epochs": 4}),
            ({"save_last": True}, 1, {"max_epochs": -1, "max_steps": 20}),
        ],
    )
    def test_who_begins_with_a_resumed_worker_begins_at_that_ones_first_batch(self, saves, accumulate, ends, tmp_path):
        """Kind: before the first epoch the loops hold what was saved, as of a batch that is over, or of an epoch."""
        given = {"devices": 1, "accumulate_grad_batches": accumulate}
        checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, **saves)
        quiet_trainer(max_epochs=2, callbacks=[checkpoint], enable_checkpointing=True, **given).fit(Noting())
        saved = sorted(tmp_path.glob("*.ckpt"))
        assert len(saved) > 1
        for path in saved:
            first, other = Noting(), Noting()
            trainers = [quiet_trainer(**given, **ends) for _ in range(2)]
            trainers[0].fit(first, ckpt_path=path)
            other.goes_on_at = first.began
            trainers[1].fit(other)
            assert first.places[0] == other.places[0] == [first.began[name] for name in Noting.NAMES]
            assert [place[:2] for place in first.places] == [place[:2] for place in other.places]
            assert trainers[0].global_step == trainers[1].global_step
            rates = [trainer.optimizers[0].param_groups[0]["lr"] for trainer in trainers]
            assert rates[0] == pytest.approx(rates[1], rel=1e-12)

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize("steps_of_batch", [0, 1, 2])
    def test_who_comes_logs_at_the_others_steps_also_where_these_are_made_by_hand(self, steps_of_batch):
        """Kind: Lightning counts steps and batches, which are as many where it makes the steps."""

        class ByHand(Quadratic):
            def __init__(self):
                super().__init__(record=False)
                self.automatic_optimization = False
                self.clocks, self.logged_at = [], []

            def training_step(self, batch, index):
                optimizer = self.optimizers()
                for _ in range(steps_of_batch or (index + 1) % 2):  # or one in two batches
                    self.clocks.append((index, clocks_of(self.trainer)))
                    self.manual_backward(super().training_step(batch, index))
                    optimizer.step()
                self.logged_at.append(self.trainer.fit_loop.epoch_loop._batches_that_stepped)

        first, other = ByHand(), ByHand()
        quiet_trainer(devices=1).fit(first)
        index, clocks = first.clocks[-1]
        trainer = quiet_trainer(devices=1)
        other.on_train_start = lambda: go_on_at(trainer, clocks)
        trainer.fit(other)
        assert other.logged_at == first.logged_at[index:]

    @pytest.mark.timeout(60)
    def test_the_next_fit_of_a_trainer_begins_with_a_whole_epoch_for_all(self):
        trainer, module = quiet_trainer(devices=1, max_epochs=2), Noting()
        trainer.fit(module)
        module.places.clear()
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module)
        assert module.places[0] == [module.began[name] for name in Noting.NAMES] == [2, 0, 12, 12]

    def test_what_swa_has_put_in_place_of_a_schedule_is_each_workers_own(self):
        trainer = quiet_trainer(devices=1, max_epochs=4, callbacks=[StochasticWeightAveraging(0.1, swa_epoch_start=2)])
        module = Quadratic(record=False)
        clocks = []
        module.on_train_batch_start = lambda *_: clocks.append(clocks_of(trainer))
        trainer.fit(module)
        assert [clocks[0]["schedulers"], clocks[-1]["schedulers"]] == [[], None]
        worker = ElasticWorker("EASGDStrategy", HERE)
        worker._now = clocks[0]
        worker._check_alike({**clocks[-1], "parameters": []})
        go_on_at(trainer, clocks[-1])

    def test_others_of_another_number_of_schedulers_are_refused(self):
        worker = ElasticWorker("EASGDStrategy", HERE)
        worker._now = {"rates": [], "schedulers": [{}]}
        with pytest.raises(
            ExchangeError, match="the other workers have 0 schedulers, and this one 1; let configure_opt"
        ):
            worker._check_alike({"rates": [], "schedulers": []})

    def test_a_schedule_that_nobody_could_get_is_refused_at_once(self):
        worker = ElasticWorker("EASGDStrategy", HERE)
        worker._now = {"schedulers": [{"of": lambda step: step}]}
        with pytest.raises(
            TypeError, match=r"^EASGDStrategy\(fault_tolerance=\.\.\.\): the state of a scheduler .*lambda"
        ):
            worker._check_handed()

    def test_a_place_in_an_epoch_that_never_begins_is_not_the_next_fits(self):
        trainer = quiet_trainer(devices=1, max_epochs=3)
        module = Quadratic(record=False)
        begin = module.on_train_start

        def comes():
            begin()
            go_on_at(trainer, {**clocks_of(trainer), "batch": 2, "batches": 2, "epoch": 3})  # all epochs are over

        module.on_train_start = comes
        trainer.fit(module)
        loop = trainer.fit_loop.epoch_loop
        assert "reset" in vars(loop)
        averagers = [SimpleNamespace(clock=0)]
        nobody = SimpleNamespace(averaging=SimpleNamespace(enter=lambda: None), described=list, averagers=averagers)
        ElasticWorker("EASGDStrategy", HERE).enter(nobody, trainer)  # the next fit of this Trainer
        assert "reset" not in vars(loop)

    def test_nothing_listens(self, monkeypatch):
        monkeypatch.setattr("lightning_easgd.transport.lighthouse.CONNECTING", timedelta(seconds=0.5))

        def fit():  # in a process of its own, which is left with a process group
            quiet_trainer(strategy=EASGDStrategy(fault_tolerance=HERE), devices=1).fit(Quadratic())

        (ended,) = end_ranks(fit, 1)
        assert ended.exitcode == 1
        assert "EASGDStrategy: there is no lighthouse at http://localhost:1; start" in ended.error

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (b"HTTP/1.0 200 OK\r\n\r\nHello", "what answers there is another server"),
            (b"HTTP/1.0 404 Not Found\r\n\r\n", "HTTP Error 404: Not Found"),
            (b"SSH-2.0-OpenSSH_9.2p1\r\n", "SSH-2.0"),
            (b"", "timed out"),
        ],
    )
    def test_something_else_listens(self, monkeypatch, answer, said):
        """Kind: a lighthouse is what answers as one; a worker would wait for it until its timeout."""
        pytest.importorskip("torchft")
        monkeypatch.setattr("lightning_easgd.transport.lighthouse.CONNECTING", timedelta(seconds=1))
        with socket.create_server(("localhost", 0)) as server, ThreadPoolExecutor(8) as threads:

            def serve():
                while True:
                    try:
                        connection, _ = server.accept()
                    except OSError:
                        return
                    threads.submit(reply, connection)

            def reply(connection):
                with connection:
                    connection.recv(1000)
                    connection.sendall(answer)
                    if not answer:
                        time.sleep(3)

            threads.submit(serve)
            address = f"http://localhost:{server.getsockname()[1]}"
            with pytest.raises(ExchangeError, match=rf"^S: there is no lighthouse at {address}; start .*{said}"):
                Lighthouse(address, Heard(0), "S").check(1.0)
            server.shutdown(socket.SHUT_RDWR)

    def test_a_fixed_world_imports_nothing_of_it(self, tmp_path):
        script = tmp_path / "fixed.py"
        script.write_text(
            f"import sys; sys.path.insert(0, {str(HERE_ON_DISK)!r})\n"
            "import lightning_easgd\n"
            "from toys import Quadratic, quiet_trainer\n"
            "quiet_trainer(strategy='easgd', devices=1).fit(Quadratic(steps=12, record=False))\n"
            "print([name for name in sys.modules if name.startswith(('torchft', 'opentelemetry'))])\n"
        )
        command = [python_of_torch(), script]
        ended = subprocess.run(
            command, env=clean_environment(), capture_output=True, text=True, timeout=100, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("is_tuner", "counted"), [(False, [1]), (True, [])])
def test_a_tuners_fit_is_no_launch_of_the_jobs(is_tuner, counted):
    """Kind: a fit that a Tuner calls is counted, here where ranks are spawned."""

    class Launches:
        def launch(self, function, *arguments, trainer=None):
            return function

    class Launcher(RankLauncher, Launches):
        _strategy = EASGDStrategy(fault_tolerance=HERE)

    launches = []
    Launcher._strategy.elastic.count_launch = lambda: launches.append(1)
    finder = LearningRateFinder()
    finder._early_exit = is_tuner  # as the Tuner sets it
    Launcher().launch(str, trainer=SimpleNamespace(state=SimpleNamespace(fn="fit"), callbacks=[finder]))
    assert launches == counted


class Others:
    """A membership whose other workers do what the test says; in place of ``Membership``."""

    def __init__(self, size=2, gives=0.0):
        self.size, self.gives = size, gives
        self.has_others = self.counts = True
        self.is_requested = False
        self.missed = self.failed = self.behind = 0
        self.all_begin, self.awaited = False, None
        self.has_ended, self.is_of_one_rank = False, True
        self.pace, self.longest = 0.0, 0.25
        self.problem = "lost"
        self.states = {}
        self.waited = []

    def add_state(self, key, state, load, **_):
        self.states[key] = state, load

    def expect(self, pace):
        self.longest = pace

    def give(self, stores, version, clock, due_at=0, begun_as=None, pace=0.0):
        """What another worker is at."""
        begun_as = begun_as or self.states["center"][0]()["begun_as"]
        self.states["center"][1]({"stores": stores, "version": version, "in_common": {}, "begun_as": begun_as})
        self.states["clock"][1]((clock, due_at, pace))

    def open(self):
        pass

    def follow(self):
        pass

    def beside(self):
        return nullcontext()

    def close(self):
        pass

    def request(self, **_):
        self.is_requested = True

    def has_come(self, seconds):
        self.waited.append(seconds)
        return self.has_others

    def exchange(self, add_up, common):
        self.is_requested = False
        add_up()

    def all_reduce(self, buffer):
        buffer.add_(self.gives)

    def commit(self):
        return self.counts

    @property
    def has_failed(self):
        return not (self.counts or self.problem == "too few")


class TestSum:
    """x from 8 in steps of -1, center from 8 at first; τ = 2, β = ½."""

    def averaging(self, others, make_pull=PullToOld, tau=2, rule=None, **settings):
        self.x = torch.nn.Parameter(torch.tensor([8.0]))
        self.optimizer = torch.optim.SGD([self.x], lr=1.0)
        make_sum = partial(MembershipSum, members=others, tau=tau, patience=3.0, timeout=1.0, **settings)
        self.whole = SynchronousAveraging(
            LoneChannel(), make_sum, tau=tau, rates=MovingRates(beta=0.5), make_pull=make_pull, rule=rule
        )
        self.whole.start([self.optimizer])
        (self.averager,) = self.whole.averagers.values()

    def step(self, number=1):
        for _ in range(number):
            self.averager.begin()
            self.x.grad = torch.ones(1)
            self.optimizer.step()
            self.averager.finish()

    def values_after(self, steps):
        self.step(steps)
        return self.values

    @property
    def values(self):
        self.averager.settle()
        return self.x.item(), self.averager.center.flat.item()

    def test_alpha_and_beta_follow_the_number_of_workers(self):
        others = Others(size=2, gives=-6.0)
        self.averaging(others)
        self.step(3)  # at x = 6: d = -2, of all -8; α = ¼, β/p = ¼
        assert self.values == (6 + 0.5 - 1, 8 - 2.0)
        others.size, others.gives = 1, 0.0
        self.step(2)  # at x = 4.5: d = -1.5; α = β = ½
        assert self.values == (4.5 + 0.75 - 1, 6 - 0.75)

    @pytest.mark.parametrize("rates", [{"alpha": 0.6}, {"alpha": 0.6, "outer_momentum": 0.5}], ids=["paper", "outer"])
    def test_rates_that_more_workers_make_unstable_are_warned_of_when_these_have_come(self, rates, recwarn):
        """Kind: what is judged at the start is judged by the workers of the start, here one."""
        strategy = EASGDStrategy(fault_tolerance=HERE, **rates)
        strategy._warn_of_rates(1)
        others = Others(size=2)
        self.averaging(others, judge=strategy._warn_of_rates)
        self.step(5)
        assert not recwarn
        others.size = 4
        said = rf"^EASGDStrategy\(alpha={rates['alpha']}, beta=.* unstable"
        with pytest.warns(UserWarning, match=said):
            self.step(2)
        recwarn.clear()
        for others.size in (2, 4):  # some of them come and go
            self.step(2)
        assert not recwarn

    @pytest.mark.parametrize("delay", [0, 1])
    def test_a_pull_to_the_new_center(self, delay):
        self.averaging(Others(size=2, gives=-6.0), partial(PullToNew, delay))
        self.step(2)  # then at x = 6: d = -2, of all -8; the center goes to 6, from where x is
        assert self.values == (6.0, 6.0)
        self.step()
        assert self.values == (5.0, 6.0)

    @pytest.mark.parametrize("make_pull", [PullToOld, PullToNew, partial(PullToNew, 1)])
    def test_a_lost_exchange_leaves_no_trace(self, make_pull):
        others = Others(gives=float("nan"))
        others.counts = False
        self.averaging(others, make_pull)
        with pytest.warns(RuntimeWarning, match=r"has come to nothing \(lost\)"):
            values = self.values_after(4)
        assert values == (4.0, 8.0)

    def test_what_has_ended_is_completed(self):
        others = Others(gives=-6.0)
        self.averaging(others, tau=5)
        self.step(7)
        assert self.averager.center.version == 0
        others.has_ended = True
        self.step()
        assert self.averager.center.version == 1

    def asks_at(self, monkeypatch, others, seconds, steps=24):
        """The clocks at which it asks for an exchange, in steps that take so long each."""
        now, asked, come = 0.0, [], others.request
        monkeypatch.setattr("lightning_easgd.averagers.sync.membership_sum.time.monotonic", lambda: now)
        others.request = lambda: (come(), asked.append(self.averager.clock))
        for _ in range(steps):
            now += seconds
            self.step()
        return asked

    @pytest.mark.parametrize(("seconds", "asked"), [(0.001, [5, 15]), (0.04, [8, 18]), (0.06, [9, 19]), (9.0, [9, 19])])
    def test_short_steps_ask_some_of_them_before(self, monkeypatch, seconds, asked):
        """So that workers which are not quite abreast need not wait for each other."""
        others = Others()
        others.has_ended = True
        self.averaging(others, tau=10)
        assert self.asks_at(monkeypatch, others, seconds) == asked

    def test_it_does_not_ask_with_an_exchange_under_way(self, monkeypatch):
        self.averaging(others := Others(), tau=10)
        assert self.asks_at(monkeypatch, others, 0.001) == [5, 19]

    def test_ranks_of_one_worker_ask_at_the_same_step(self, monkeypatch):
        others = Others()
        others.is_of_one_rank, others.has_ended = False, True
        self.averaging(others, tau=10)
        assert self.asks_at(monkeypatch, others, 0.001) == [9, 19]

    def test_the_others_hear_how_long_steps_are_but_for_a_stop_among_them(self, monkeypatch):
        now, others = 0.0, Others()
        monkeypatch.setattr("lightning_easgd.averagers.sync.membership_sum.time.monotonic", lambda: now)
        self.averaging(others, tau=10)
        heard = []
        for seconds in (0.5, 0.5, 60.0, 0.5, 61.0, 60.0):  # the third has a validation in it
            now += seconds
            self.step()
            heard.append(others.pace)
        assert heard == [0.0, 0.5, 0.5, 0.5, 0.5, 60.0]
        assert others.states["clock"][0]()[2] == 0.25
        others.give([torch.tensor([3.0])], version=4, clock=27, pace=90.0)
        assert others.longest == 90.0

    def test_who_has_come_for_an_exchange_does_not_make_it_again(self, monkeypatch):
        """The others were at step 27, and had asked for what is due at 30."""
        others = Others()
        others.has_ended = True
        self.averaging(others, tau=10)
        others.give([torch.tensor([3.0])], version=4, clock=27, due_at=30)
        self.whole.enter()
        assert self.asks_at(monkeypatch, others, 9.0) == [39, 49]

    def test_who_exchanges_before_a_long_stop_does_not_make_it_again(self, monkeypatch):
        others = Others()
        others.has_ended = True
        self.averaging(others, tau=10)
        assert self.asks_at(monkeypatch, others, 0.001, steps=6) == [5]
        self.whole.meet(Meeting.VALIDATION)
        assert self.asks_at(monkeypatch, others, 0.001, steps=14) == [15]

    def test_a_slice_has_the_version_of_the_whole(self):
        others = Others()
        center = ReplicatedCenter(FlatTensors([[torch.zeros(3)]], torch.float32))
        make_sum = partial(MembershipSum, members=others, tau=2, patience=3.0, timeout=1.0)
        whole = sliced_sums(channel_joins(LoneChannel), make_sum)(center)
        center.version = 57  # as a checkpoint has it
        whole.enter(0)
        give, _ = others.states["center"]
        assert give()["version"] == 57

    def test_who_is_not_there_is_waited_for_once(self):
        others = Others()
        others.has_others = False
        self.averaging(others)
        self.step(4)
        assert self.values == (4.0, 8.0)
        assert (others.waited, others.missed) == ([3.0, 0.0], 1)
        others.has_others = True
        self.step()  # not due by the clock, but the others have come: d = -4
        assert self.values == (4 + 1 - 1, 8 - 1)

    def test_a_long_stop_is_no_stop_for_the_others(self):
        others = Others(gives=-1.0)
        self.averaging(others)
        self.step()
        assert others.is_requested
        self.whole.meet(Meeting.EPOCH_END)
        assert others.is_requested
        self.whole.meet(Meeting.VALIDATION)  # at x = 7: d = -1, of all -2
        assert not others.is_requested
        assert self.values == (7.25, 7.5)

    @pytest.mark.parametrize(("after", "values"), [(None, (6.0, 7.0)), (3, (6.0, 7.0)), (2, (9.0, 10.0))])
    def test_who_was_away_has_the_others_center(self, after, values):
        others = Others(size=1)
        self.averaging(others, restart_after_missed=after)
        self.step(4)
        others.give([torch.tensor([10.0])], version=7, clock=90)
        others.behind = 2
        self.x.data.fill_(4.0)
        self.optimizer.state[self.x]["momentum_buffer"] = torch.tensor(0.5)  # of where the worker was
        before = self.averager.clock
        self.step()
        assert self.averager.clock == before + 1
        assert self.values == values  # from (4, 10), α = β = ½; or from (10, 10)
        assert (not self.optimizer.state) == (after == 2)
        assert self.averager.center.version == 8

    def test_who_starts_again_takes_no_gradient_along(self):
        """Kind: by hand, or of batches that are accumulated, it is there before the step begins."""
        others = Others(size=1)
        self.averaging(others, restart_after_missed=2)
        self.step(4)
        others.give([torch.tensor([10.0])], version=7, clock=90)
        others.behind = 2
        self.x.grad = torch.ones(1)
        self.averager.begin()
        self.optimizer.step()
        self.averager.finish()
        assert self.values == (10.0, 10.0)

    def test_who_has_begun_beside_the_others_does_not_pull_their_center_back(self):
        """They were frozen as it came, and had been given up."""
        others = Others(size=1)
        self.averaging(others)
        self.whole.enter()
        self.step(4)
        others.give([torch.tensor([10.0])], version=7, clock=90, begun_as="theirs")
        with pytest.warns(
            RuntimeWarning, match="has begun anew where the others could not .* they are at step 90, and"
        ):
            self.step()
        assert self.values == (9.0, 10.0)

    def test_who_starts_again_for_two_reasons_does_so_once(self):
        """Kind: of two questions joined by "or" the second one is not asked, and notes nothing."""
        others = Others(size=1)
        self.averaging(others, restart_after_missed=5)
        self.whole.enter()
        self.step(4)
        others.behind = 7
        others.give([torch.tensor([10.0])], version=7, clock=90, begun_as="theirs")
        with pytest.warns(RuntimeWarning, match="has begun anew where the others could not"):
            self.step()
        assert self.values == (9.0, 10.0)
        self.step()
        others.behind = 1
        others.give([torch.tensor([20.0])], version=8, clock=92, begun_as="theirs")
        self.step()
        assert self.values == (8 + 6 - 1, 20 - 6)

    @pytest.mark.filterwarnings("ignore:.*has begun anew where the others")
    @pytest.mark.parametrize("begun_as", ["theirs", None])
    def test_what_rounding_has_left_of_another_center_is_not_added_to_theirs(self, begun_as):
        """Kind: a memory goes with what it is of; who was away all the while has what this center still lacks."""
        forgotten = []

        class Remembering(ExactAddition):
            def forget(self):
                forgotten.append(True)

        others = Others(size=1)
        self.averaging(others, make_addition=Remembering)
        self.whole.enter()
        self.step(4)
        others.give([torch.tensor([10.0])], version=7, clock=90, begun_as=begun_as)
        self.step()
        assert bool(forgotten) == (begun_as is not None)

    @pytest.mark.filterwarnings("error::RuntimeWarning")
    def test_who_comes_has_not_begun_beside_the_others(self):
        others = Others(size=1)
        self.averaging(others)
        others.give([torch.tensor([10.0])], version=7, clock=21, begun_as="theirs")
        self.whole.enter()
        self.step(1)
        assert self.averager.clock == 22

    def test_who_comes_starts_at_the_center_and_its_clock(self):
        others = Others(gives=2.0)
        self.averaging(others)
        others.give([torch.tensor([3.0])], version=4, clock=21)
        self.whole.enter()
        assert self.values == (3.5, 3.5)  # it has given nothing, and the others 2 at β/p = ¼
        assert self.averager.clock == 21

    def test_who_comes_tries_again_where_nothing_has_arrived(self):
        others = Others(gives=0.0)
        self.averaging(others)
        come = others.request

        def request(**_):
            come()
            others.counts = len(others.waited) == 2
            if others.counts:
                others.give([torch.tensor([3.0])], version=4, clock=21)

        others.request = request
        with pytest.warns(RuntimeWarning, match="come to nothing"):
            self.whole.enter()
        assert len(others.waited) == 3
        assert self.values == (3.0, 3.0)
        assert self.averager.clock == 21

    def test_who_never_gets_through_to_the_others_ends(self):
        others = Others()
        others.counts = False
        self.averaging(others)
        with (
            pytest.warns(RuntimeWarning, match="come to nothing"),
            pytest.raises(
                ExchangeError, match=r"10 exchanges .* nothing \(lost\); give .* longer process_group_timeout"
            ),
        ):
            self.whole.enter()

    def test_who_comes_between_two_exchanges_of_others_waits_for_them(self, monkeypatch):
        monkeypatch.setattr("lightning_easgd.averagers.sync.membership_sum._PAUSE", 0.0)
        others = Others(gives=0.0)
        self.averaging(others)
        come = others.request

        def request(**_):
            come()
            others.counts = len(others.waited) == 20  # as many attempts as it takes
            others.awaited = None if others.counts else 4
            if others.counts:
                others.give([torch.tensor([3.0])], version=4, clock=21)

        others.request = request
        self.whole.enter()
        assert self.values == (3.0, 3.0)
        assert self.averager.clock == 21

    def test_others_that_live_and_never_come_end_the_run(self, monkeypatch):
        monkeypatch.setattr("lightning_easgd.averagers.sync.membership_sum._PAUSE", 0.3)
        others = Others()
        self.averaging(others)
        others.counts = False
        others.request = lambda **_: setattr(others, "awaited", 4)
        with pytest.raises(ExchangeError, match=r"timeout=1 s\): the worker with replica_id=4 lives, and has made no"):
            self.whole.enter()

    def test_nobody_moves_a_center_to_which_nobody_has_given_anything(self):
        """As after a checkpoint, where a rule with a memory would move it by that alone."""
        others = Others(size=1)
        others.all_begin = True
        self.averaging(others, rule=NesterovRule(0.9))
        self.whole.load_center_state_dict({"stores": [[torch.tensor([8.0])], [torch.tensor([2.0])]]})
        self.whole.enter()
        assert self.values == (8.0, 8.0)

    def test_with_too_few_it_begins(self):
        others = Others()
        others.counts, others.problem = False, "too few"
        self.averaging(others)
        with pytest.warns(RuntimeWarning, match="come to nothing"):
            self.whole.enter()
        assert len(others.waited) == 1

    def test_who_was_ahead_of_the_others_is_told(self):
        others = Others()
        self.averaging(others)
        others.give([torch.zeros(1)], version=4, clock=21)
        self.averager.clock = 60
        with pytest.warns(RuntimeWarning, match="this worker was at step 60, and goes on at the others', 21"):
            self.whole.enter()
        assert self.averager.clock == 21

    def test_others_of_another_size_are_refused(self):
        others = Others()
        self.averaging(others)
        others.give([torch.zeros(2)], version=4, clock=21)
        with pytest.raises(ExchangeError, match=r"vectors of \[\(2,\)\] elements and this one of \[\(1,\)\]"):
            self.whole.enter()

    def test_others_that_never_come_end_the_run(self):
        others = Others()
        others.has_others = False
        self.averaging(others)
        with pytest.raises(ExchangeError, match=r"timeout=1 s\): the lighthouse has not brought"):
            self.whole.enter()
