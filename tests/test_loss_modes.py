"""Neither micro-batches nor ranks change a gradient, for every loss and every average; on real ZeRO-3 ranks."""

import numpy as np
import pytest
from launching import run_ranks
from tiny_models import save_vision_model

pytestmark = pytest.mark.slow

LOSSES = ("default", "gspo", "gspo_token", "cispo", "sapo")
MODES = ("token", "seq", "seq_sum")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Ranks x micro-batches a rank -> what the program wrote."""
    folder = tmp_path_factory.mktemp("loss_modes")
    model = save_vision_model(folder / "model")
    found = {}
    for num_ranks, micro_batch in ((1, 1), (2, 1), (2, 4)):
        out = folder / f"{num_ranks}-{micro_batch}.npz"
        run_ranks("loss_modes.py", model, out, micro_batch, folder / f"{num_ranks}-{micro_batch}", num_ranks=num_ranks)
        found[num_ranks, 8 // num_ranks // micro_batch] = dict(np.load(out))
    return found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_depend_on_neither_ranks_nor_micro_batches(results, loss, mode):
    key = f"{loss}|{mode}"
    one = results[1, 8]
    largest = np.abs(one[key]).max()
    assert largest > 1e-3
    for other in (results[2, 4], results[2, 1]):
        assert np.abs(other[key] - one[key]).max() < 1e-5 * largest
        for name, expected, actual in zip(one["names"], one[f"{key}|figures"], other[f"{key}|figures"], strict=True):
            assert actual == pytest.approx(expected, abs=1e-5, rel=1e-4), name


def test_every_mode_has_a_gradient_of_its_own(results):
    gradients = [results[1, 8][f"{loss}|{mode}"] for loss in LOSSES for mode in MODES]
    for at, first in enumerate(gradients):
        for second in gradients[:at]:
            assert np.abs(first - second).max() > 1e-4
