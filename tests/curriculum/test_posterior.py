import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from mmr1_ds.curriculum.posterior import posterior
from mmr1_ds.curriculum.utilities import UTILITIES, sharpening, utility_function, utility_moments


def grid_posterior(mean, variance, right, total):
    """The same by brute force, on 20,001 points."""
    z = np.linspace(mean - 14 * variance**0.5 - 4, mean + 14 * variance**0.5 + 4, 20_001)
    logarithm = right * z - total * np.logaddexp(0, z) + norm.logpdf(z, mean, variance**0.5)
    density = np.exp(logarithm - logarithm.max())
    mass = density.sum()
    new_mean = (density * z).sum() / mass
    return new_mean, (density * (z - new_mean) ** 2).sum() / mass, logarithm.max() + np.log(mass * (z[1] - z[0]))


@pytest.mark.parametrize("variance", [0.01, 0.7, 4.0, 16.0])
@pytest.mark.parametrize(
    "right, total", [(0, 2), (2, 2), (0, 8), (3, 8), (2.5, 8), (8, 8), (1, 64), (64, 64), (0, 500)]
)
def test_posterior_equals_brute_force(variance, right, total):
    for mean in (-9.0, -1.3, 0.0, 4.0):
        found = posterior(*(np.array([float(value)]) for value in (mean, variance, right, total)))
        expected = grid_posterior(mean, variance, right, total)
        deviation = expected[1] ** 0.5
        assert abs(found[0][0] - expected[0]) < 0.02 * deviation
        assert found[1][0] == pytest.approx(expected[1], rel=0.04)
        assert found[2][0] == pytest.approx(expected[2], abs=0.02)


@pytest.mark.parametrize("name", UTILITIES)
def test_expected_utilities_equal_quad(name):
    utility = utility_function(name)
    # The square, which only the sharpening uses, is harder to integrate.
    for variance, tolerances in ((0.01, (1e-4, 1e-4)), (1.0, (1e-4, 1e-4)), (4.0, (2e-3, 0.06)), (9.0, (0.06, 0.3))):
        for mean in (-5.0, -1.0, 0.0, 2.0, 6.0):

            def integrand(x, power, mean=mean, variance=variance):
                return utility(expit(mean + variance**0.5 * x), 8) ** power * norm.pdf(x)

            found = utility_moments(np.array([mean], np.float32), np.array([variance], np.float32), utility, 8)
            for power, tolerance in zip((1, 2), tolerances, strict=True):
                exact = quad(integrand, -9, 9, args=(power,), points=[-mean / variance**0.5], limit=200)[0]
                assert found[power - 1][0] == pytest.approx(exact, rel=tolerance, abs=1e-7)


def test_utilities_peak_where_they_should():
    rates = np.linspace(0, 1, 3001)
    peaks = {name: rates[np.argmax(utility_function(name)(rates, 8))] for name in UTILITIES}
    assert peaks["learnability"] == pytest.approx(1 / 2, abs=1e-3)
    assert peaks["learnability-squared"] == pytest.approx(1 / 3, abs=1e-3)
    assert peaks["gradient-probability"] == pytest.approx(1 / 2, abs=1e-3)
    assert utility_function("gradient-probability")(np.array([0.25]), 2)[0] == pytest.approx(2 * 0.25 * 0.75)


# Sharpening


def test_sharpening_solves_its_equation():
    random = np.random.default_rng(0)
    first = random.random(501).astype(np.float32) * 0.2 + 0.01
    for factor in (1.1, 1.3):
        target = factor * (first @ first) / first.sum()
        second = np.full(501, target * first.sum() / 501, dtype=np.float32)
        gamma = sharpening(first, second, 1.0, 8.0)
        weights = first.astype(np.float64) ** gamma
        assert (weights @ first) / weights.sum() == pytest.approx(target, rel=1e-3)
        # Draws that collect a tenth less than expected must be sharper; where none could be, the cap holds.
        assert 8.0 >= sharpening(first, second, 0.9, 8.0) > gamma
        assert sharpening(first, 9.0 * second, 1.0, 2.0) == 2.0
    assert sharpening(first, first**2, 1.1, 2.0) == 1.0


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_sharpening_of_equal_utilities_is_defined(value):
    first = np.full(7, value, dtype=np.float32)
    assert 1.0 <= sharpening(first, first**2, 1.0, 2.0) <= 2.0
