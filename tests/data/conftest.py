import datasets
import pytest
from fixtures.data_fixtures import write_text_model, write_vision_model


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("cache"))
    old, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder
    yield
    datasets.config.HF_DATASETS_CACHE = old


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory):
    """A model folder without weights, as the text model's; no test changes it."""
    return write_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("text"))
