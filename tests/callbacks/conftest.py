import pytest

from tests.callbacks.subjects import SUBJECTS


@pytest.fixture(params=SUBJECTS)
def subject(request):
    """Each module in turn that the settings are tested on."""
    return SUBJECTS[request.param]
