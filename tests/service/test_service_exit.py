"""Interpreters that end with threads of the center blocked in system calls: never a hang."""

import os
import subprocess
import sys

import pytest
from preloaded import python
from torch.distributed import TCPStore

SCRIPT = """
import atexit, os, signal, sys, threading, time
import torch
from torch.distributed import TCPStore
from lightning_easgd.served_center import open_center
from lightning_easgd.method.rules import SymmetricExchange

rank, port, ending = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
threads = []
# When the center has been closed, and they have heard of it: where a thread lets go of a tensor while the interpreter
# is taken to pieces, torch ends the process.
atexit.register(lambda: [thread.join(10) for thread in threads])
center = open_center(
    TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False),
    rank=rank, nodes=[[0], [1]], segments=[(0, 1000)], dtype=torch.float32, exchange=SymmetricExchange(),
    initial=torch.zeros(1000), timeout=5.0,
)
x = torch.ones(1000)
center.exchange_all(x, [0.5])
center.control.meet("exchanged")
if ending == "success":
    center.close()
elif ending == "exception":
    raise ValueError("as expected")
elif ending == "kill" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
elif ending == "exchanging":  # daemon threads in the middle of exchanges, and never closed
    def storm():
        while True:
            center.exchange_all(x, [0.0])
    threading.excepthook = lambda arguments: None
    for _ in range(2):
        threads.append(threading.Thread(target=storm, daemon=True))
        threads[-1].start()
    time.sleep(0.3)
"""


@pytest.mark.parametrize(
    ("ending", "codes"),
    [("success", [0, 0]), ("unclosed", [0, 0]), ("exception", [1, 1]), ("kill", [0, -9]), ("exchanging", [0, 0])],
)
def test_the_interpreter_ends(ending, codes, tmp_path):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # One that has imported torch already ends as any other does; the hardest case has a new one all the same.
    interpreter = sys.executable if ending == "exchanging" else python()
    environment = os.environ | {"EASGD_WHOLE_EXIT": "1"}
    processes = [
        subprocess.Popen(
            [interpreter, script, str(rank), str(store.port), ending],
            stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == codes, errors
