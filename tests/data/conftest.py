import pytest


@pytest.fixture(autouse=True, scope="module")
def cache(dataset_cache):
    """Every module here reads data sets."""
