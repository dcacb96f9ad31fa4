"""One worker of those that come and go, as a user starts it: python membership_worker.py FOLDER NUMBER [KEY=JSON ...]

It writes a line of JSON for each of its steps into FOLDER/NUMBER.jsonl, one when it has come to the others and one at
its end; a further rank r of it into FOLDER/NUMBER.r.jsonl. Keys: ``tolerance`` (of ``FaultTolerance``) and those of
``SETTINGS``.
"""

import hashlib
import itertools
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch.distributed.fsdp import fully_shard
from toys import quiet_trainer

from lightning_easgd import EASGDModelParallelStrategy, EASGDStrategy, FaultTolerance
from lightning_easgd.tensors.shards import local
from lightning_easgd.transport.membership import Membership

SETTINGS = {
    "steps": 10**6,
    "pace": 0.01,  # seconds of a step
    "tau": 5,
    "ranks": 1,  # of a worker
    "device": "cpu",  # or a CUDA device, which all share
    "is_sharded": False,
    "wire_dtype": None,
    "dies_in": None,  # an operation of its exchanges, in its own of this number
    "is_terminated": False,  # before it comes to the others
    "raises_at": None,  # at its step of this number, in torchrun's first attempt
    "saves_at": None,  # this step
    "resumes": None,  # from this checkpoint
    "links": False,  # to its last checkpoint, of which it saves one in 10 steps
    "strays_at": None,  # this step, from the center of the others
    "finds_rate": False,  # which takes a fit of its own
    "tunes": False,  # in a fit of its own, before the first one
    "start_method": "popen",
    "fits": 1,  # one after the other, of new modules
    "is_strict": False,  # warnings of what is deprecated are errors
}


class Paced(L.LightningModule):
    """A line fitted to noise; every worker has its own data."""

    def __init__(self, settings, folder, number):
        super().__init__()
        self.settings, self.folder, self.number = settings, folder, number
        self.norm, self.net = torch.nn.BatchNorm1d(50), torch.nn.Linear(50, 2)
        self.made = 0
        self.lr = 0.05

    def configure_model(self):
        if self.settings["is_sharded"]:
            for part in (self.norm, self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, index):
        time.sleep(self.settings["pace"])
        self.made += 1
        if self.made == self.settings["raises_at"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            raise RuntimeError("as the test has it")
        generator = torch.Generator().manual_seed(self.global_step * 97 + self.number + 31 * self.global_rank)
        x = torch.randn(8, 50, generator=generator).to(self.device)
        return (self.net(self.norm(x)) - x[:, :2]).square().mean()

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.StepLR(sgd, 10, gamma=0.99)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        if self.settings["is_terminated"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.utils.data.DataLoader(torch.zeros(40), batch_size=1)

    def write(self, **row):
        rank = f".{self.global_rank}" if self.global_rank else ""
        with (self.folder / f"{self.number}{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), **row}) + "\n")

    def on_train_start(self):
        self.write(event="starts", pid=os.getpid())

    def on_train_batch_end(self, *_):
        if not self.trainer.strategy._averagers:  # in the learning rate finder's sweep
            return
        (averager,) = self.trainer.strategy._averagers
        members = self.trainer.strategy.elastic.membership
        center = averager.center
        (of_weight,) = (
            value
            for parameter, value in zip(averager.parameters, averager.center_values(), strict=True)
            if parameter is self.net.weight
        )
        self.write(
            step=self.global_step,
            clock=averager.clock,
            epoch=self.current_epoch,
            lr=self.optimizers().param_groups[0]["lr"],
            version=center.version,
            center=hashlib.blake2b(center.flat.cpu().numpy().tobytes(), digest_size=8).hexdigest(),
            weight=local(self.net.weight)[0, 0].item(),
            center_weight=local(of_weight)[0, 0].item(),
            living=members.living,
            tracked=int(self.norm.num_batches_tracked),
            missed=members.missed,
            failed=members.failed,
        )
        if self.global_step == self.settings["strays_at"]:
            averager.settle()
            center.flat.add_(1.0)
        if self.global_step == self.settings["saves_at"]:
            self.trainer.save_checkpoint(self.folder / f"of_{self.number}.ckpt")


def die_in(operation, number):
    """Let this process be killed when the others have begun the operation of an exchange, and it has not."""
    operate = getattr(Membership, operation)
    made = itertools.count(1)

    def dies(self, *buffers):
        if next(made) == number:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return operate(self, *buffers)

    setattr(Membership, operation, dies)


if __name__ == "__main__":
    folder, number, *given = sys.argv[1:]
    settings = SETTINGS | {key: json.loads(value) for key, value in (each.split("=", 1) for each in given)}
    torch.manual_seed(int(number))
    if settings["is_strict"]:
        warnings.simplefilter("error", DeprecationWarning)
    if settings["dies_in"] is not None:
        die_in(*settings["dies_in"])
    tolerance = FaultTolerance(replica_id=int(number), **settings.get("tolerance", {}))
    arguments = {"tau": settings["tau"], "wire_dtype": settings["wire_dtype"], "fault_tolerance": tolerance}
    places = {"devices": settings["ranks"]}
    if settings["device"] != "cpu":
        devices = [torch.device(settings["device"])] * settings["ranks"]
        arguments |= {"parallel_devices": devices, "process_group_backend": "gloo"}
        places = {"accelerator": "auto", "devices": "auto"}
        os.environ["NCCL_HOSTID"] = f"{number}.{os.environ.get('RANK', '0')}"  # else it refuses to share a GPU
    for _ in range(settings["fits"]):
        if settings["is_sharded"]:
            strategy = EASGDModelParallelStrategy(data_parallel_size=settings["ranks"], **arguments)
        else:
            method = settings["start_method"]
            strategy = EASGDStrategy(devices_per_worker=settings["ranks"], start_method=method, **arguments)
        finder = LearningRateFinder(num_training_steps=10, early_stop_threshold=None)
        links = ModelCheckpoint(Path(folder, "links"), "{step}", every_n_train_steps=10, save_last="link")
        trainer = quiet_trainer(
            strategy=strategy,
            **places,
            max_epochs=-1,
            max_steps=settings["steps"],
            callbacks=[*([finder] if settings["finds_rate"] else []), *([links] if settings["links"] else [])],
            enable_checkpointing=settings["finds_rate"] or settings["tunes"] or settings["links"],
            default_root_dir=folder,
        )
        module = Paced(settings, Path(folder), int(number))
        if settings["tunes"]:
            Tuner(trainer).lr_find(module, num_training=10, early_stop_threshold=None, update_attr=False)
        trainer.fit(module, ckpt_path=settings["resumes"])
        module.write(event="ends", step=trainer.global_step)
