import pytest

from tests.callbacks.subjects import SUBJECTS


@pytest.fixture(params=SUBJECTS)
def subject(request):
    """Each module in turn that the settings are tested on."""
    return SUBJECTS[request.param]


@pytest.fixture
def unknown(subject, monkeypatch):
    """Each module in turn, of a model that no registry knows."""
    monkeypatch.setattr("mil_anchor.sites.registry._REGISTRY", {})
    return subject
