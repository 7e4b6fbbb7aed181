"""What every test module starts from."""

import gc
import logging
import os
import signal

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# A background job of a script starts with SIGINT ignored, and so would every process that the tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


gc.disable()  # what the modules of tests import stays: a fifth of the time that importing it takes


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """Modules with slow tests come first, so that the two processes that take modules in turn end together."""
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def own_environment():
    """A module's changes to the environment end with it.

    Process groups made in a test set RANK and the like. `datasets` even puts another mapping in os.environ's place
    when it maps in several processes, and whoever holds the first one sees no change any more.
    """
    mapping, values = os.environ, dict(os.environ)
    yield
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    os.environ = mapping  # noqa: B003  the very object is what is restored
    os.environ.update(values)
    for name in mapping.keys() - values.keys():
        del mapping[name]


@pytest.fixture
def own_logging():
    """What the program sets up for its log lines ends with the test."""
    package = logging.getLogger("mmr1_ds")
    handlers, level, propagate = package.handlers[:], package.level, package.propagate
    yield
    package.handlers[:], package.propagate = handlers, propagate
    package.setLevel(level)


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory):
    """A model folder without weights, as the text model's; no test changes it."""
    from fixtures.data_fixtures import write_vision_model

    return write_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    from fixtures.data_fixtures import write_text_model

    return write_text_model(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def dataset_cache(tmp_path_factory):
    """A module's own cache of `datasets`."""
    import datasets

    folder = str(tmp_path_factory.mktemp("cache"))
    old, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder
    yield
    datasets.config.HF_DATASETS_CACHE = old
