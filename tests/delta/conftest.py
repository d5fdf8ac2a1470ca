"""The registry of transforms as it is in a new process, whatever other tests have registered in this one."""

import pytest

from shadowlit.delta import registry, transforms


@pytest.fixture(autouse=True)
def own_transforms(monkeypatch):
    """Only the package's transforms are registered; what a test registers is forgotten after it."""
    known = registry._registered.items()
    own = {name: found for name, found in known if found.function.__module__ == transforms.__name__}
    monkeypatch.setattr(registry, "_registered", own)
