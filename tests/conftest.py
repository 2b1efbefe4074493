"""The order of the tests, and the processor time that they take."""

import multiprocessing.forkserver
import os
import resource
import time

import pytest
from hypothesis import HealthCheck, settings

# Nothing is wrong with a busy machine, on which examples take long to make.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

_START = time.perf_counter()


@pytest.fixture(autouse=True, scope="session")
def _remember_runs_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Not in the home of whoever runs the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("long", "xdist_group"))))


def pytest_sessionfinish() -> None:
    """End the processes that others begin from, which count once they have ended."""
    multiprocessing.forkserver._forkserver._stop()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds of this process and of all that it started, to compare machines by."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    user, system = (sum(getattr(u, name) for u in used) for name in ("ru_utime", "ru_stime"))
    wall = time.perf_counter() - _START
    terminalreporter.write_line(
        f"processor time {user + system:.0f} s ({user:.0f} user, {system:.0f} system) "
        f"in {wall:.0f} s"
    )
