"""A bar on a terminal; elsewhere a line for each epoch, or within a long one for each so many seconds."""

import sys

import pytest
from application import composed, quiet_trainer, tiny_classifier
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_easgd.lab import train
from lightning_easgd.lab.data import DigitsDataModule
from lightning_easgd.lab.progress import ProgressLines, progress

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("terminal", "refresh_rate", "kind"),
    [(True, 10, TQDMProgressBar), (False, 10, ProgressLines), (False, 0, TQDMProgressBar)],
)
def test_what_shows_depends_on_where_the_output_goes(monkeypatch, terminal, refresh_rate, kind):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    shown = progress(refresh_rate=refresh_rate, leave=True)
    assert type(shown) is kind
    if kind is TQDMProgressBar:
        assert (shown.refresh_rate, shown._leave) == (refresh_rate, True)


@pytest.mark.parametrize(("seconds", "lines"), [(60.0, 3), (0.0, 3 + 3 * 4)])
def test_lines(capsys, seconds, lines):
    trainer = quiet_trainer(
        callbacks=[ProgressLines(seconds)], enable_progress_bar=True, max_epochs=3, limit_train_batches=4
    )
    trainer.fit(tiny_classifier(), datamodule=DigitsDataModule())
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == lines
    assert shown[-1].startswith("epoch 3/3  step 12  ")
    if lines > 3:
        assert shown[1].startswith("epoch 1/3  batch 2/4  step 2")


def test_forty_epochs_write_little(capsys, tmp_path):
    train.train(
        composed(
            tmp_path, "strategy=single", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "plot=false",
            "callbacks.worker_evaluation.max_batches=1",
        )
    )  # fmt: skip
    shown = capsys.readouterr()
    assert len([line for line in shown.out.splitlines() if line.startswith("epoch ")]) == 40
    assert len(shown.out) + len(shown.err) < 8_000
