"""The contract runs over every family of the table."""

import pytest

from tests.conftest import ALL_FAMILIES


@pytest.fixture(params=ALL_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every supported family in turn."""
    return request.param
