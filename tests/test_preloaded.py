"""What stands for the interpreter behaves as the interpreter does."""

import os
import signal
import subprocess
import sys
import time

import pytest
from preloaded import python

pytestmark = pytest.mark.timeout(120)
SCRIPT = """
import atexit, os, sys, __main__
print(sys.argv[1:], sys.stdin.read(), os.getcwd(), os.environ["SAID"], __name__, __main__.__spec__ is None)
print(os.path.basename(sys.argv[0]), os.path.abspath("") in sys.path, "to stderr", file=sys.stderr)
atexit.register(print, "at the end")
ending = sys.argv[1]
if ending == "code":
    sys.exit(3)
if ending == "message":
    sys.exit("no")
if ending == "error":
    raise ValueError("as expected")
if ending == "kill":
    os.kill(os.getpid(), 9)
if ending == "abort":
    os.abort()
"""


def runs(folder, *command, **options):
    """What the real interpreter and the other one make of a command."""
    environment = os.environ | {"SAID": "hello"}
    for interpreter in (sys.executable, python()):
        yield subprocess.run(
            [interpreter, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=60,
            check=False, **options,
        )  # fmt: skip


@pytest.mark.parametrize("ending", ["return", "code", "message", "error", "kill", "abort"])
def test_a_script_sees_and_ends_the_same(tmp_path, ending):
    (tmp_path / "script.py").write_text(SCRIPT)
    for command in (["script.py", ending], ["-m", "script", ending]):
        real, ours = runs(tmp_path, *command, input="given")
        assert ours.returncode == real.returncode
        assert ours.stdout == real.stdout
        assert ours.stderr.splitlines()[:1] == real.stderr.splitlines()[:1]
        assert ours.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_it_has_imported_the_libraries_and_starts_others_alike(tmp_path):
    inner = "import sys, subprocess; print('lightning.pytorch' in sys.modules, flush=True)\n"
    (tmp_path / "inner.py").write_text(inner)
    (tmp_path / "outer.py").write_text(inner + "sys.exit(subprocess.run([sys.executable, 'inner.py']).returncode)")
    real, ours = runs(tmp_path, "outer.py")
    assert (real.stdout.split(), ours.stdout.split()) == (["False"] * 2, ["True"] * 2)
    real, ours = runs(tmp_path, "-c", "import sys; print(sys.executable, 'torch' in sys.modules)")
    assert real.stdout == ours.stdout


SPAWN = """
import multiprocessing, os, sys
def answer(queue, pipe):
    pipe.send(("torch" in BEFORE, __name__, queue.get()))
    sys.exit(5)
BEFORE = set(sys.modules)
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue, (ours, theirs) = context.SimpleQueue(), context.Pipe()
    child = context.Process(target=answer, args=(queue, theirs))
    child.start()
    theirs.close()
    queue.put("hello")
    print(*ours.recv())
    child.join()
    print(child.exitcode)
    killed = context.Process(target=answer, args=(queue, ours))
    killed.start()
    killed.kill()
    killed.join()
    print(killed.exitcode)
"""


def test_processes_that_it_spawns_are_forked_too(tmp_path):
    (tmp_path / "script.py").write_text(SPAWN)
    real, ours = runs(tmp_path, "script.py")
    assert (real.stderr, ours.stderr) == ("", "")
    assert real.stdout.split() == ["False", "__mp_main__", "hello", "5", "-9"]
    assert ours.stdout.split() == ["True", "__mp_main__", "hello", "5", "-9"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 7), (signal.SIGKILL, -9)])
def test_signals_reach_the_process(tmp_path, number, code):
    (tmp_path / "wait.py").write_text(
        "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print(os.getpid(), flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([python(), "wait.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    with process:
        pid = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(20) == code
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")
