"""One thread per process: the tests start several processes on few cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
