import datasets
import pytest


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("cache"))
    old, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder
    yield
    datasets.config.HF_DATASETS_CACHE = old
