"""An error in a training: one sentence from the first rank that fails, and the tracebacks in a file."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from application import command
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

from lightning_easgd.lab import rank_errors

pytestmark = [pytest.mark.processes, pytest.mark.timeout(150)]

IMAGES = (
    "data=imagenet", "data.root=images", "data.num_classes=2", "data.batch_size=4", "model=strided_net",
    "trainer.max_epochs=2", "callbacks.progress_bar.refresh_rate=0", "plot=false",
)  # fmt: skip


@pytest.fixture
def images(tmp_path):
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{number}.JPEG")
    (tmp_path / "images" / "train" / "dog" / "dog_5.JPEG").write_bytes(b"\xff\xd8 torn")
    return tmp_path


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        (2, ["trainer.devices=2", "data.num_workers=0"]),
        (2, ["trainer.devices=2", "data.num_workers=1", "strategy.start_method=fork"]),
        (2, ["trainer.devices=2", "data.num_workers=0", "strategy.start_method=spawn"]),
        (2, ["trainer.devices=2", "data.num_workers=0", "strategy=ddp"]),
        (1, ["strategy=single", "data.num_workers=2"]),
    ],
    ids=["popen", "fork", "spawn", "ddp", "single"],
)
def test_a_torn_image_is_told_once(images, ranks, arguments):
    done = command("train", *IMAGES, *arguments, "paths.run=run", cwd=images)
    assert done.returncode not in (0, 2)
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert len(lines) <= 3, lines
    told = "images/train/dog/dog_5.JPEG: this image cannot be decoded"
    assert lines[0].startswith(told)
    assert lines[-1].startswith(told)
    assert lines[-1].endswith("set on_corrupt=skip (traceback: run/error.txt)")
    assert sum(told in line for line in lines) == 1
    tracebacks = (images / "run" / "error.txt").read_text()
    assert tracebacks.startswith("rank ")
    assert "Traceback (most recent call last)" in tracebacks
    assert len(re.findall(r"^rank \d: ", tracebacks, re.MULTILINE)) <= ranks
    assert "DataError" in tracebacks


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["strategy=single"], 1),
        (["trainer.devices=2", "strategy.start_method=fork"], 1),
        (["trainer.devices=2", "strategy=ddp", "strategy.start_method=fork"], 1),
        (["strategy=single", "on_divergence=report"], 0),
        (["trainer.devices=2", "strategy.start_method=fork", "on_divergence=report"], 0),
    ],
    ids=["single", "easgd", "ddp", "single, reported", "easgd, reported"],
)
def test_a_divergence_is_in_the_table_and_fails_unless_asked_otherwise(tmp_path, arguments, code):
    quick = ("optimizer.lr=1e9", "trainer.max_epochs=1", "plot=false", "callbacks.progress_bar.refresh_rate=0")
    done = command("train", *quick, *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert re.search(r"^  DIVERGED .* not finite", done.stdout, re.MULTILINE)
    assert len(done.stderr.splitlines()) <= 1
    if code:
        assert "not finite" in done.stderr
        assert "learning rate" in done.stderr or "optimizer.lr" in done.stderr


@pytest.mark.parametrize(
    ("local_rank", "code", "files", "way"),
    [(0, 143, ["last.ckpt"], "ckpt_path=... goes on with it"), (0, 143, [], "no checkpoint had been saved"),
     (1, None, [], None)],
)  # fmt: skip
def test_a_run_that_sigterm_has_ended_is_not_done(local_rank, code, files, way, tmp_path, capfd):
    """Kind: an exit code says whether there is a result; Lightning's own says that there is."""
    for name in files:
        (tmp_path / name).touch()

    def ended():
        raise SIGTERMException

    trainer = SimpleNamespace(
        strategy=SimpleNamespace(launcher=None), fit=ended, local_rank=local_rank, is_global_zero=local_rank == 0
    )
    with pytest.raises(SystemExit) as stopped:
        rank_errors.fit(trainer, tmp_path, "easgd-train", lambda: None)
    assert stopped.value.code == code
    said = f"easgd-train: SIGTERM has ended the run in {tmp_path}; {way}\n"
    assert capfd.readouterr().err == ("" if local_rank else said)
