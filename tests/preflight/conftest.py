"""A configuration that every check passes."""


import pytest
from fixtures.dry_runs import valid_run


@pytest.fixture
def valid(tmp_path):
    return valid_run(tmp_path)
