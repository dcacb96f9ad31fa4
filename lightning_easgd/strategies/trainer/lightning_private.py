"""What Lightning does in private and a strategy has no hook for; a contract test watches each place."""

import contextlib
import inspect
import math
import signal
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

__all__ = [
    "before_transfer",
    "begin_epoch_whole",
    "begins_epoch",
    "clocks_of",
    "communicates_at_epoch_end",
    "evaluation_of",
    "fetches_next",
    "free_running",
    "give_mesh",
    "go_on_at",
    "interactive_error",
    "is_search",
    "is_without_steps",
    "knows_batches",
    "linking_what_is_saved",
    "place_in_evaluation",
    "reads_common_clock",
    "renew_training_iterator",
    "request_stop",
    "saves_after_batch",
    "saves_in_epoch",
    "training_data",
    "watch_evaluation",
    "watch_fetching",
]


def free_running(
    trainer: Any,
    on_sigterm: Callable[[], None],
    handling_signal: Callable[[], contextlib.AbstractContextManager[None]],
    in_validation: Callable[[], contextlib.AbstractContextManager[None]],
) -> Callable[[], None]:
    """Let the ranks of a fit run at their own pace.

    Since 2.5.2 Lightning broadcasts a flag from rank 0 before every batch, and again inside its SIGTERM handler, so
    that all ranks run in lock-step and a preempted rank blocks. Both methods are replaced on this trainer's objects.
    The handler of SLURM's requeue signal, which saves a checkpoint, and the whole of a validation get a context.

    Args:
        trainer: The trainer, before it registers its signal handlers (that is: in ``Strategy.setup``).
        on_sigterm: Called in place of the handler's broadcast; it runs inside a signal handler.
        handling_signal: Makes the context in which the requeue handler runs.
        in_validation: Makes the context in which a validation of the fit runs; Lightning's hooks come too late for it.

    Returns:
        A function that undoes it.
    """
    loop = trainer.fit_loop.epoch_loop
    connector = trainer._signal_connector
    validation = loop.val_loop
    forwarded = False

    def notify(signum: int, _: FrameType | None) -> None:
        nonlocal forwarded
        launcher = trainer.strategy.launcher
        if launcher is not None and not forwarded:
            forwarded = True
            launcher.kill(signal.Signals(signum))
        on_sigterm()

    def requeue(signum: int, frame: FrameType | None) -> None:
        with handling_signal():
            type(connector)._slurm_sigusr_handler_fn(connector, signum, frame)

    def apart(name: str) -> Callable[[], Any]:
        def method() -> Any:
            with in_validation():
                return getattr(type(validation), name)(validation)

        return method

    replaced = []
    for owner, name, replacement in (
        (loop, "_broadcast_sigterm_tensor", lambda: None),
        (connector, "_sigterm_notifier_fn", notify),
        (connector, "_slurm_sigusr_handler_fn", requeue),
        (validation, "run", apart("run")),
        (validation, "increment_progress_to_evaluation_end", apart("increment_progress_to_evaluation_end")),
    ):
        if hasattr(owner, name):
            setattr(owner, name, replacement)
            replaced.append((owner, name))

    def undo() -> None:
        for owner, name in replaced:
            with contextlib.suppress(AttributeError):
                delattr(owner, name)

    return undo


def request_stop(trainer: Any) -> None:
    """Make the trainer end the fit with ``SIGTERMException`` after the current batch, as its own handler does."""
    trainer._signal_connector.received_sigterm = True


def give_mesh(module: Any, mesh: Any) -> None:
    """Let a module's ``device_mesh`` be this one, as Lightning's own strategy does for ``configure_model``."""
    module._device_mesh = mesh


def communicates_at_epoch_end(trainer: Any) -> bool:
    """Whether Lightning itself communicates at the end of an epoch: to reduce what was logged, or to stop and save."""
    logged = trainer.fit_loop.epoch_loop._results.values()
    return bool(
        trainer.checkpoint_callbacks
        or trainer.early_stopping_callbacks
        or any(result.meta.on_epoch and (result.meta.sync.should or not result.is_tensor) for result in logged)
    )


def training_data(trainer: Any) -> Any:
    """What fetches a fit's batches; another one where its loaders are anew (``reload_dataloaders_every_n_epochs``)."""
    return trainer.fit_loop._data_fetcher


def before_transfer(trainer: Any, batch: Any) -> Any:
    """A batch as the hook ``on_before_batch_transfer`` of the datamodule, or else of the module, makes it."""
    return trainer.lightning_module._on_before_batch_transfer(batch)


def knows_batches(loop: Any) -> bool:
    """Whether the batches that a loop counts on are those of its data, and no limit or estimate.

    Args:
        loop: One that goes through data loaders.
    """
    combined = loop._combined_loader
    return combined is not None and all(map(_is_sized, combined.flattened))


def evaluation_of(trainer: Any) -> Any:
    """The loop of the evaluation, or prediction, that a trainer is in."""
    return trainer._active_loop


def watch_evaluation(loop: Any, fetched: Callable[[], None]) -> None:
    """Have a function called after every fetch of an evaluation that has begun; its first batch may be there already.

    Args:
        loop: That of the evaluation.
        fetched: The function.
    """

    def stop() -> None:
        type(loop)._on_after_fetch(loop)
        fetched()

    loop._data_fetcher._stop_profiler = stop


def place_in_evaluation(loop: Any) -> tuple[int, int, bool]:
    """Which data loader an evaluation fetches from, how much it had fetched of all before, and whether all have ended.

    Args:
        loop: That of the evaluation.
    """
    fetcher = loop._data_fetcher
    return getattr(fetcher.combined_loader._iterator, "_iterator_idx", 0), fetcher.fetched, fetcher.done


def _is_sized(loader: Any) -> bool:
    if isinstance(getattr(loader, "dataset", None), IterableDataset):  # torch takes its length for an estimate
        return False
    try:
        len(loader)
    except (TypeError, NotImplementedError):  # as Lightning looks
        return False
    return True


def clocks_of(trainer: Any, *, begins: bool = False) -> dict[str, Any]:
    """How far a fit is, in primitives and tensors: its steps, batches and epochs, learning rates and schedules.

    Args:
        trainer: The trainer.
        begins: Whether the fit is about to begin its first epoch; else it is in the middle of a batch.
    """
    epoch, done, of_all = _begins_at(trainer) if begins else _is_at(trainer)
    in_next_step = done % trainer.accumulate_grad_batches
    return {
        "steps": trainer.global_step,
        "stepped": _stepped(trainer),
        "epoch": epoch,
        "batch": done - in_next_step,
        "batches": of_all - in_next_step,
        "loaded": [getattr(loop, name) for loop, name in _loading_loops(trainer)],
        "rates": [
            [
                {name: _kept(group[name]) for name in ("lr", "initial_lr") if name in group}
                for group in optimizer.param_groups
            ]
            for optimizer in trainer.optimizers
        ],
        "schedulers": _schedulers_of(trainer),
    }


def _stepped(trainer: Any) -> int:
    """The batches that have been stepped with, by which is logged; by hand there may be more or fewer steps."""
    if trainer.lightning_module.automatic_optimization:
        return int(trainer.global_step)  # of a resumed fit Lightning's own number is one behind until it begins
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def _is_at(trainer: Any) -> tuple[int, int, int]:
    """The epoch of the batch that a fit trains on, the batches before it in that epoch, and those of all epochs."""
    batches = trainer.fit_loop.epoch_loop.batch_progress
    return trainer.current_epoch, max(0, batches.current.ready - 1), max(0, batches.total.ready - 1)


def _begins_at(trainer: Any) -> tuple[int, int, int]:
    """The same of the first batch of a fit that is about to begin its first epoch.

    Until then the loops hold what the checkpoint, or the fit before, has left in them.
    """
    loop = trainer.fit_loop.epoch_loop
    batches = loop.batch_progress
    follows_batch = loop.restarted_on_train_batch_end  # the hook, after which the batch counts as completed
    epoch, of_all = trainer.current_epoch, batches.total.completed + follows_batch
    if not (loop.restarting or follows_batch):
        return epoch, 0, of_all
    done = batches.current.completed + follows_batch
    if done < trainer.num_training_batches:
        return epoch, done, of_all
    return epoch + (not follows_batch), 0, of_all  # there is no batch left of the one that it goes on with


def _schedulers_of(trainer: Any) -> list[dict[str, Any]] | None:
    """The states of a fit's schedulers; None once SWA's own has taken their place, as it does in each worker."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    if any(type(scheduler).__name__ == "SWALR" for scheduler in schedulers):
        return None
    return [scheduler.state_dict() for scheduler in schedulers]


def _kept(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate


def go_on_at(trainer: Any, clocks: dict[str, Any]) -> None:
    """Let a fit that is about to begin its first epoch begin in another one, where another fit is in it.

    The rest of the epoch has as many batches as there, of the first ones in its order; one at least. What a checkpoint
    says of how far this fit was counts no more.
    """
    fit_loop, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    _set(fit_loop.epoch_progress, clocks["epoch"], clocks["epoch"])
    fit_loop._restarting = loop.restarting = False  # its own setter makes it True where steps alone end the fit
    for each in (fit_loop, loop, loop.val_loop):
        each._loaded_from_state_dict = each._resuming_from_checkpoint = False
        each.reset_restart_stage()
    optimization = loop.automatic_optimization if trainer.lightning_module.automatic_optimization else None
    steps = (
        loop.manual_optimization.optim_step_progress
        if optimization is None
        else optimization.optim_progress.optimizer.step
    )
    steps.total.ready = steps.total.completed = clocks["steps"]
    loop._batches_that_stepped = clocks["stepped"]
    _begin_epoch_at(trainer, clocks["batch"], clocks["batches"])
    if trainer.reload_dataloaders_every_n_epochs:
        for (loop_, name), epoch in zip(_loading_loops(trainer), clocks["loaded"], strict=True):
            _load_as_in(trainer, loop_, name, epoch)
    for optimizer, groups in zip(trainer.optimizers, clocks["rates"], strict=True):
        for group, rates in zip(optimizer.param_groups, groups, strict=True):
            group.update(rates)
    if clocks["schedulers"] is not None:
        for config, state in zip(trainer.lr_scheduler_configs, clocks["schedulers"], strict=True):
            config.scheduler.load_state_dict(state)


def _set(progress: Any, current: int, total: int) -> None:
    for each, number in ((progress.current, current), (progress.total, total)):
        each.ready = each.started = each.processed = each.completed = number


def _begin_epoch_at(trainer: Any, batch: int, of_all: int) -> None:
    """Let the epoch that comes first begin at this batch, of so many of all epochs; Lightning begins it at 0."""
    loop = trainer.fit_loop.epoch_loop

    def reset() -> None:
        del loop.reset
        loop.reset()
        last = trainer.num_training_batches - 1  # only now: this epoch's loaders may have been made anew
        _set(loop.batch_progress, min(batch, last), of_all)

    loop.reset = reset


def _loading_loops(trainer: Any) -> tuple[tuple[Any, str], ...]:
    """The loops of a fit that have data loaders, and what each calls the epoch in which these were made."""
    fit_loop = trainer.fit_loop
    return (fit_loop, "_last_train_dl_reload_epoch"), (fit_loop.epoch_loop.val_loop, "_last_val_dl_reload_epoch")


def _load_as_in(trainer: Any, loop: Any, name: str, epoch: float) -> None:
    """Let a loop that is about to need its data loaders have those of an epoch, and make new ones so long after it."""
    if getattr(loop, name) == epoch:
        return
    setattr(loop, name, -math.inf)  # so that they are made anew
    if epoch == -math.inf:  # there has been no need of them
        return

    def setup_data() -> None:
        del loop.setup_data
        current = trainer.fit_loop.epoch_progress.current
        now, current.completed = current.completed, epoch  # as trainer.current_epoch reads it
        try:
            loop.setup_data()
        finally:
            current.completed = now
        loop.setup_data()  # those of a later one, if it is time

    loop.setup_data = setup_data


def begin_epoch_whole(trainer: Any) -> None:
    """Take back where :func:`go_on_at` lets an epoch begin, if none has begun since: a fit may have had no more."""
    vars(trainer.fit_loop.epoch_loop).pop("reset", None)
    for loop, _ in _loading_loops(trainer):
        vars(loop).pop("setup_data", None)


def is_search(trainer: Any) -> bool:
    """Whether what is trained is the sweep of the learning rate finder, and not the fit itself."""
    return any(type(callback).__name__ == "_LRCallback" for callback in trainer.callbacks)


def is_tuning(trainer: Any) -> bool:
    """Whether a ``Tuner`` has called fit, which ends before the first step."""
    return any(getattr(callback, "_early_exit", False) for callback in trainer.callbacks)


def begins_epoch(trainer: Any) -> bool:
    """Whether a resumed fit, its loops restored, goes on with a new epoch."""
    epochs = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress
    saved_after_batch = batches.current.completed < batches.current.processed
    return bool(epochs.processed == epochs.ready or (batches.is_last_batch and saved_after_batch))


def renew_training_iterator(trainer: Any) -> None:
    """Make the iterator over the training data anew, as Lightning does at the start of every epoch but the first."""
    iter(trainer.fit_loop._data_fetcher)


def watch_fetching(trainer: Any, begins: Callable[[], None], ended: Callable[[], None]) -> Callable[[], None]:
    """Have functions called around every fetch of a training batch of a fit, but for the first of each epoch.

    That one is different: samplers draw their seeds then. The methods are those that Lightning's profiler listens to.

    Returns:
        A function that undoes it.
    """
    loop = trainer.fit_loop.epoch_loop

    def is_later() -> bool:
        fetcher = trainer.fit_loop._data_fetcher
        return bool(fetcher.fetched and not fetcher.done)  # done: there was nothing left

    def start() -> None:
        type(loop)._on_before_fetch(loop)
        if is_later():
            begins()

    def stop() -> None:
        if is_later():
            ended()
        type(loop)._on_after_fetch(loop)

    loop._on_before_fetch, loop._on_after_fetch = start, stop

    def undo() -> None:
        del loop._on_before_fetch, loop._on_after_fetch

    return undo


def fetches_next(trainer: Any) -> bool:
    """Whether a resumed fit, its loops restored, goes on with a batch of the epoch that it was in."""
    return not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def reads_common_clock(callback: Any) -> bool:
    """Whether a callback asks rank 0 for the time after every batch: ``Timer`` (``max_time``), timed checkpoints."""
    timer = type(callback).__name__ == "Timer" and callback._duration is not None and callback._interval == "step"
    return timer or getattr(callback, "_train_time_interval", None) is not None


def saves_in_epoch(callback: Any) -> bool:
    """Whether a callback saves checkpoints after a number of steps."""
    return getattr(callback, "_every_n_train_steps", 0) > 0


def saves_after_batch(callback: Any, step: int) -> bool:
    """Whether a callback is about to save a checkpoint because of this step."""
    due = saves_in_epoch(callback) and step % callback._every_n_train_steps == 0
    return due and step != callback._last_global_step_saved


def linking_what_is_saved(trainer: Any, has_saved: Callable[[], bool]) -> Callable[[], None]:
    """Have ``ModelCheckpoint(save_last="link")`` make its link only where the strategy has written the checkpoint.

    It makes the link by itself, beside the strategy, which may have left the checkpoint to another worker: the file has
    another name there, or is not there yet.

    Args:
        trainer: The trainer.
        has_saved: Whether this worker has written the last checkpoint.

    Returns:
        A function that undoes it.
    """
    callbacks = [each for each in trainer.checkpoint_callbacks if hasattr(each, "_link_checkpoint")]

    def link(make: Callable[..., None], *arguments: Any, **keywords: Any) -> None:
        if has_saved():
            make(*arguments, **keywords)

    def undo() -> None:
        for callback in callbacks:
            vars(callback).pop("_link_checkpoint", None)

    for callback in callbacks:
        callback._link_checkpoint = partial(link, callback._link_checkpoint)
    return undo


def is_without_steps(trainer: Any) -> bool:
    """Whether this epoch makes no gradient steps: SWA then holds its average in the module, for BatchNorm's sake."""
    return bool(trainer.fit_loop._skip_backward)


def interactive_error(tree: str | None, remedy: str) -> Exception | None:
    """The error with which Lightning refuses a launcher in a notebook or at a prompt; None where this is neither.

    To be called where Lightning has its strategies configure their launchers, just before it would raise its own.

    Args:
        tree: The package of a class tree, as of :func:`~lightning_easgd.strategies.trees.class_trees.tree_of`.
        remedy: What comes after the sentence that says what was given.
    """
    connector = sys.modules.get(f"{tree}.connector") or sys.modules.get(
        f"{tree}.trainer.connectors.accelerator_connector"
    )
    if not getattr(connector, "_IS_INTERACTIVE", False):
        return None
    error: type[Exception] = getattr(connector, "MisconfigurationException", RuntimeError)  # Fabric has none
    user = "Fabric" if error is RuntimeError else "Trainer"
    return error(
        f"`{user}(strategy={_given_strategy()})` is not compatible with an interactive environment, such as a"
        f" notebook. {remedy}"
    )


def _given_strategy() -> str:
    """What the user gave for the strategy: only the connector, which is calling, knows the name."""
    frame = inspect.currentframe()
    while frame is not None:
        given = getattr(frame.f_locals.get("self"), "_strategy_flag", None)
        if given is not None:
            return repr(given)
        frame = frame.f_back
    return "..."
