"""Ranks, micro-batches and padding change no gradient, for every loss, average and mask; on real ZeRO-3 ranks."""

import numpy as np
import pytest
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model

pytestmark = pytest.mark.slow

CASES = (
    "default|token", "default|seq", "default|seq_sum", "gspo|token", "gspo_token|seq", "cispo|seq_sum", "sapo|token",
    "gmpo|seq", "dppo_tv|token", "dppo_kl|seq_sum",
    "masked|token", "masked|seq", "masked|seq_sum", "kl_cov|seq", "entropy|seq_sum", "top entropy|seq_sum",
)  # fmt: skip
# Ranks, responses a micro-batch, how they are laid out: 1 rank x 8 micro-batches, 2 x 1, and 2 ranks that
# compute every sequence together, in 2 micro-batches of 4.
LAYOUTS = ((1, 1, "padded"), (2, 4, "by-tokens"), (2, 2, "ulysses"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By layout, what the program wrote."""
    folder = tmp_path_factory.mktemp("loss_modes")
    model = save_text_model(folder / "model", num_heads=4)
    found = {}
    for num_ranks, micro_batch, layout in LAYOUTS:
        out, saved = folder / f"{layout}.npz", folder / layout
        run_ranks("loss_modes.py", model, out, micro_batch, saved, layout, num_ranks=num_ranks)
        found[layout] = dict(np.load(out))
    return found


@pytest.mark.parametrize("key", CASES)
def test_gradients_depend_on_neither_ranks_nor_micro_batches(results, key):
    one = results["padded"]
    largest = np.abs(one[key]).max()
    assert largest > 1e-3
    for other in (results["by-tokens"], results["ulysses"]):
        assert np.abs(other[key] - one[key]).max() < 1e-5 * largest
        for name, expected, actual in zip(one["names"], one[f"{key}|figures"], other[f"{key}|figures"], strict=True):
            assert actual == pytest.approx(expected, abs=1e-5, rel=1e-4), name


def test_every_mode_has_a_gradient_of_its_own(results):
    gradients = [results["padded"][key] for key in CASES]
    for at, first in enumerate(gradients):
        for second in gradients[:at]:
            assert np.abs(first - second).max() > 1e-4
