"""Storages of sweeps: each test of the trials runs on all of them."""

import pytest

from tests.studies.sweep import postgres


@pytest.fixture(scope="session")
def database():
    """The address of a PostgreSQL database."""
    if postgres.binaries() is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with postgres.server() as address:
        yield address
