"""An error in a training is told once, by the rank that was first; the tracebacks of all ranks go to a file."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_easgd.averagers import NonFiniteError
from lightning_easgd.lab.command_errors import ReportedError, explain, innermost, shows_tracebacks
from lightning_easgd.lab.run_directory import ERROR_FILE
from lightning_easgd.strategies.failures import first_line

__all__ = ["fit", "is_divergence"]


def fit(trainer: L.Trainer, run: Path, command: str, prepare_rank: Callable[[], None], **arguments: Any) -> None:
    """Call ``trainer.fit``, whose ranks may be threads of this launch, or processes of any kind.

    Args:
        trainer: The trainer.
        run: Directory of the run, where the tracebacks go.
        command: Name of the command, for the sentence.
        prepare_rank: Called first in each rank; a function of a module, as spawned ranks get it pickled.
        **arguments: Of ``trainer.fit``.

    Raises:
        ReportedError: If the training has failed.
        SystemExit: If SIGTERM has ended it, with the code of that; Lightning's own is 0, as of a run that is done.
    """
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launch = launcher.launch

        def launch_reporting(function: Callable[..., Any], *values: Any, **named: Any) -> Any:
            del launcher.launch  # spawned ranks get a pickled copy of the launcher
            return launch(_Rank(function, run, command, prepare_rank), *values, **named)

        launcher.launch = launch_reporting  # type: ignore[method-assign]
    try:
        trainer.fit(**arguments)
    except Exception as error:
        if not (run / ERROR_FILE).exists():  # no rank has told it: there is one process, or a rank was killed
            _report(run, command, error)
        raise ReportedError(f"{command}: {first_line(error)}") from error
    except SIGTERMException:
        if trainer.local_rank:  # whoever has started it would kill the others, which are about to end as well
            raise
        if trainer.is_global_zero:
            way = "ckpt_path=... goes on with it" if any(run.rglob("*.ckpt")) else "no checkpoint had been saved"
            print(f"{command}: SIGTERM has ended the run in {run}; {way}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


def is_divergence(run: Path) -> bool:
    """Whether it was weights that are not finite, of any rank, that ended the training of a run."""
    return f"{NonFiniteError.__name__}:" in (run / ERROR_FILE).read_text(encoding="utf-8")


class _Rank:
    """What a rank executes; can be pickled."""

    def __init__(self, function: Callable[..., Any], run: Path, command: str, prepare: Callable[[], None]) -> None:
        self._function, self._run, self._command, self._prepare = function, run, command, prepare

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self._prepare()
        try:
            return self._function(*arguments, **keywords)
        except Exception as error:
            # Here, and not where it ends the process: by then others have failed because of this rank.
            _report(self._run, self._command, error)
            raise


def _report(run: Path, command: str, error: Exception) -> None:
    """Write the traceback; say what is wrong if no other rank has."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / ERROR_FILE
    try:
        path.touch(exist_ok=False)
        is_first = True
    except FileExistsError:
        is_first = False
    with path.open("a", encoding="utf-8") as file:
        file.write(f"rank {os.environ.get('LOCAL_RANK', '0')}: {''.join(traceback.format_exception(error))}\n")
    if is_first:
        sentence = explain(command, error) or f"{command}: {type(error).__name__}: {_line(innermost(str(error)))}"
        print(f"{sentence} (traceback: {path})", file=sys.stderr, flush=True)
    if shows_tracebacks():
        traceback.print_exception(error)


def _line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")[:500]
