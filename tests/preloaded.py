"""`python()`: stands for the interpreter, but has imported torch, Lightning and this package already.

Each import of the training command takes some six seconds of processor time, and a launch of four ranks takes four of
them. `python()` is a small program that hands its arguments, environment, folder and standard streams to a server. The
server has imported the libraries, has composed the configurations and trained one step (half of what a short command
takes), and forks a process that goes on as ``python -m MODULE ...`` or
``python FILE ...`` would: as ``__main__``, and with its own ends, exit codes and tracebacks. There the interpreter
is `python()` again, so that ranks which Lightning or torchrun start are forked too, and so are processes that
multiprocessing spawns, which then import their main module alone. It lives as long as that process, passes signals on,
and ends as it ends; when it is killed the process is killed. Other command lines, such as ``-c CODE``, get the real
interpreter, and ``EASGD_REAL_PYTHON=1`` gives it to everyone. pytest-xdist's processes are forked, too, and see the
real one. `python_of_torch()` has imported neither Lightning nor this package, for tests of what is imported when.
With ``EASGD_WHOLE_EXIT=1`` a process takes its modules to pieces as it ends, as others need not.
"""

import atexit
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# What all trees of Lightning import, which takes most of the time; then the rest.
_OF_TORCH = """
    torch torch._dynamo torch.distributed.fsdp torch.nn.parallel torch.optim.swa_utils torch.utils.tensorboard
    torchmetrics lightning_utilities fsspec tqdm yaml
"""
_MODULES = """
    lightning.pytorch lightning.pytorch.cli lightning.fabric torchmetrics.classification hydra
    hydra.core.override_parser.overrides_parser hydra.experimental.callbacks
    hydra._internal.core_plugins.basic_launcher matplotlib.figure matplotlib.backends.backend_agg
    sklearn.datasets torch.distributed.run torch.utils.data
    torch.distributed.algorithms.model_averaging.averagers lightning_easgd lightning_easgd.strategies
    lightning_easgd.fabric lightning_easgd.callbacks lightning_easgd.sampling lightning_easgd.lab.report
    lightning_easgd.lab.plots lightning_easgd.lab.models lightning_easgd.lab.data lightning_easgd.lab.recorders
    lightning_easgd.lab.baselines lightning_easgd.lab.command_errors lightning_easgd.lab.compare
    lightning_easgd.lab.simulation PIL.Image torch.utils.tensorboard torch.distributed.checkpoint torchft
"""

_XDIST = "import sys;exec(eval(sys.stdin.readline()))"  # what pytest-xdist's processes are started with
_SHARED = "EASGD_XDIST_PYTHON"
_NAMES = ("python", "python_of_torch")

# The client, which imports little, and its request: one packet of JSON, the three streams, and where the process is
# spawned all that its parent has left open for it.
_CLIENT = """\
#!{python} -ISs
import json, os, signal, socket, sys
def is_open(number):
    try:
        return bool(os.fstat(number))
    except OSError:
        return False
arguments = sys.argv[1:]
while arguments[:1] in (["-u"], ["-B"]):  # what an environment that is handed on says as well
    del arguments[0]
spawned = arguments[:1] == ["-c"] and arguments[-1] == "--multiprocessing-fork"
is_of_xdist = arguments == ["-c", {xdist!r}]
known = spawned or is_of_xdist or arguments and (arguments[0] == "-m" or arguments[0].endswith(".py"))
if not known or "EASGD_REAL_PYTHON" in os.environ:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
files = [0, 1, 2]
if spawned:
    files += [number for number in map(int, os.listdir("/proc/self/fd")) if number > 2 and is_open(number)]
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
def pass_on(number, frame):
    if child is None:
        raise SystemExit(128 + number)
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass
child = None
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, pass_on)
request = json.dumps([arguments, os.getcwd(), dict(os.environ), files]).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], files)
server.sendall(request)
answers = server.makefile()
child = int(answers.readline())
code = int(answers.readline() or 1)
if code < 0:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""

# The server. A forked child leaves the loop with what to run, and runs it at the top level of the interpreter.
_SERVER = r"""
import fcntl, gc, importlib, json, multiprocessing, os, random, selectors, signal, socket, sys, weakref

def answer(listener):
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, "connection")
    selector.register(0, selectors.EVENT_READ, "end")  # closes as the tests end, however they do
    clients = {}  # process by connection
    while True:
        for key, _ in selector.select():
            if key.data == "end":
                for process in clients.values():
                    os.kill(process, signal.SIGKILL)
                os._exit(0)
            if key.data == "connection":
                connection, _ = listener.accept()
                try:
                    header, files, _, _ = socket.recv_fds(connection, 4, 100)
                    with connection.makefile("rb") as file:
                        request = json.loads(file.read(int.from_bytes(header, "big")))
                except (ValueError, OSError):  # it was killed already
                    connection.close()
                    continue
                process = os.fork()
                if process == 0:
                    for other in [*clients, connection, listener]:
                        other.close()
                    for each in list(selector.get_map().values()):
                        if isinstance(each.fileobj, int) and each.fileobj > 2:
                            os.close(each.fileobj)
                    selector.close()
                    *request, numbers = request
                    high = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1000) for file in files]
                    for file in files:
                        os.close(file)
                    for file, number in zip(high, numbers):
                        os.dup2(file, number)
                        os.close(file)
                    return request
                for file in files:
                    os.close(file)
                clients[connection] = process
                ended = os.pidfd_open(process)
                selector.register(connection, selectors.EVENT_READ, "client")
                selector.register(ended, selectors.EVENT_READ, connection)
                try:
                    connection.sendall(b"%d\n" % process)
                except OSError:
                    pass
            elif key.data == "client":  # it sends no more: it has been killed
                selector.unregister(key.fileobj)
                if key.fileobj in clients:
                    os.kill(clients[key.fileobj], signal.SIGKILL)
            else:
                connection = key.data
                _, status = os.waitpid(clients.pop(connection), 0)
                selector.unregister(key.fileobj)
                os.close(key.fileobj)
                if connection.fileno() in selector.get_map():
                    selector.unregister(connection)
                try:
                    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                except OSError:
                    pass
                connection.close()

xdist, folder, of_torch, modules, *programs = sys.argv[1:]
def listen(program):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(program + ".socket-")
    listener.listen(64)
    os.rename(program + ".socket-", program + ".socket")
    return listener
def load(names):
    for name in names.split():
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # an older Lightning, an extra that is not installed
python, python_of_torch = programs
listeners = [listen(program) for program in programs]
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests' own; a command that runs gets it too
load(of_torch)
if os.fork() == 0:  # the second server; it ends as the first does, with the pipe
    listeners.reverse()
    python = python_of_torch
else:
    load(modules)
listener, other = listeners
other.close()
del python_of_torch, listeners, other, modules, of_torch, programs, listen, load
if "torch.distributed.elastic.rendezvous.dynamic_rendezvous" in sys.modules:
    # torchrun reads the source of its whole stack for the name of one caller: half a second for each of its processes.
    sys.modules["torch.distributed.elastic.rendezvous.dynamic_rendezvous"].get_method_name = (
        lambda depth=2: sys._getframe(depth).f_code.co_name
    )
for each in list(weakref.finalize._registry):
    each.atexit = False  # torch takes its operators apart, as every process ends
sys.path.append(folder)
from huge_pages import use_huge_pages
if "hydra" in sys.modules:
    import composing
    composing.compose_all_once()
    del composing
    import ranks
    ranks.warm_up()
    del ranks
sys.path.remove(folder)
gc.collect()
gc.freeze()
use_huge_pages()
del use_huge_pages, sys.modules["huge_pages"]
arguments, folder, environment = answer(listener)
del listener, answer
signal.signal(signal.SIGINT, signal.default_int_handler)
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
if arguments == ["-c", xdist]:  # tests that run see the interpreter itself
    del __file__  # which processes that multiprocessing spawns would import
else:
    sys.executable = python
    multiprocessing.set_executable(python)
multiprocessing.process.ORIGINAL_DIR = folder
random.seed()
if "numpy" in sys.modules:
    sys.modules["numpy"].random.seed()
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(int(environment.get("OMP_NUM_THREADS", "0")) or os.cpu_count())
import runpy
def run():
    if arguments[0] == "-m":
        sys.path[0] = folder
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(arguments[0]))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
def end(code):
    # As the interpreter ends, but for taking itself to pieces, which takes half a second of processor time.
    import atexit, threading
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
if "EASGD_WHOLE_EXIT" in environment:
    run()
else:
    try:
        run()
    except SystemExit as how:
        if how.code is not None and not isinstance(how.code, int):
            print(how.code, file=sys.stderr)
        end(how.code & 255 if isinstance(how.code, int) else int(how.code is not None))
    except Exception:
        sys.excepthook(*sys.exc_info())
        end(1)
    end(0)
"""


def python() -> str:
    """The path of what stands for the interpreter and has imported all that the package's commands need."""
    return _programs()[0]


def python_of_torch() -> str:
    """The path of one that has imported torch, but neither Lightning nor this package."""
    return _programs()[1]


@functools.cache
def _programs() -> list[str]:
    """Start the servers, once; with pytest-xdist those of pytest's first process are all processes'."""
    if _SHARED in os.environ:
        return [str(Path(os.environ[_SHARED], name)) for name in _NAMES]
    folder = tempfile.TemporaryDirectory(prefix="easgd-python-")
    programs = [Path(folder.name, name) for name in _NAMES]
    server = Path(folder.name, "server.py")
    server.write_text(_SERVER)
    process = subprocess.Popen(
        [sys.executable, server, _XDIST, Path(__file__).parent, _OF_TORCH, _MODULES, *programs],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=folder.name,
        env={**os.environ, "RUST_LOG": "error"},  # torchft reads it as it is imported
    )
    for program in programs:
        program.write_text(_CLIENT.format(python=sys.executable, address=f"{program}.socket", xdist=_XDIST))
        program.chmod(0o755)

    owner = os.getpid()

    def end() -> None:
        if os.getpid() == owner:
            process.stdin.close()
            process.wait(10)
            folder.cleanup()

    atexit.register(end)
    os.environ[_SHARED] = folder.name
    while not all(Path(f"{program}.socket").exists() for program in programs):
        time.sleep(0.01)
        assert process.poll() is None, "the server of tests/preloaded.py has ended"
    return [str(program) for program in programs]
