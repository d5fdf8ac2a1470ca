"""The figures of all campaigns, in a table at the end, and how to repeat one that has failed."""

from __future__ import annotations

import json

import pytest

from tests.chaos.harness import Chaos

COLUMNS = (
    "kills", "SIGKILL", "SIGTERM", "SIGINT", "in a write", "aimed", "torn", "orphans", "compared", "equal",
)  # fmt: skip
_NAME = "chaos"


@pytest.fixture
def chaos(request, tmp_path):
    """A campaign of the seed ``--chaos-seed``; it fails at its end if it has found a fault."""
    seed = request.config.getoption("--chaos-seed")
    found = Chaos(tmp_path, f"{seed} {request.node.name}")
    found.limit = request.config.getoption("--chaos-kills")
    yield found
    request.node.user_properties.append((_NAME, json.dumps(found.counts)))
    repeat = f"python -m pytest -m '' --chaos-seed={seed} '{request.node.nodeid}'"
    assert not found.faults, "\n\n".join([f"{len(found.faults)} faults; to repeat: {repeat}", *found.faults])


def pytest_terminal_summary(terminalreporter):
    rows = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == _NAME and report.when == "teardown":
                    rows[report.nodeid.rpartition("::")[2]] = json.loads(value)
    if rows:
        rows["total"] = {column: sum(row.get(column, 0) for row in rows.values()) for column in COLUMNS}
        terminalreporter.section(f"kills, seed {terminalreporter.config.getoption('--chaos-seed')}")
        terminalreporter.line(f"| {' | '.join(('', *COLUMNS))} |")
        terminalreporter.line("|---" * (len(COLUMNS) + 1) + "|")
        for name, row in rows.items():
            terminalreporter.line(f"| {' | '.join((name, *(str(row.get(column, 0)) for column in COLUMNS)))} |")
