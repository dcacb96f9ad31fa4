"""The table of what came out, at the end of the run."""

import pytest

ROWS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def rows(pytestconfig: pytest.Config) -> list[str]:
    return pytestconfig.stash[ROWS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section("real libraries, 2 ranks on CPU")
    for row in config.stash[ROWS]:
        terminalreporter.write_line(row)
