"""Real libraries train with ``strategy="easgd"`` in place of ``"ddp"``, nothing else changed: ``make test-clients``.

They live in a virtual environment of their own, and these tests are not among those of ``make test``.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

CLIENTS = ["chemprop", "pytorch_forecasting", "neuralforecast"]
STRATEGIES = ["ddp", "easgd", "easgd_async"]
LIMIT_SECONDS = 300


@pytest.mark.timeout(LIMIT_SECONDS + 30)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("client", CLIENTS)
def test_client(client: str, strategy: str, tmp_path: Path, rows: list[str]) -> None:
    pytest.importorskip(client)
    script = Path(__file__).with_name(f"client_{client}.py")
    done = subprocess.run(
        [sys.executable, script, strategy, tmp_path],
        capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    before, after = ranks[0]["before"], ranks[0]["after"]
    equal = ranks[0]["digest"] == ranks[1]["digest"]
    rows.append(
        f"{client + ' ' + version(client):<28} {strategy:<12} loss {before:.4f} -> {after:.4f}"
        f"  ranks {'equal' if equal else 'DIFFER'}  save {ranks[0]['saved'] or 'works'}"
    )
    assert all(rank["finite"] for rank in ranks)
    assert after < 0.9 * before
    assert equal
    assert not ranks[0]["saved"]
