"""Write gdpo.json: the advantages of GDPO (arXiv 2601.05242, section 3) by its formulas, in numpy.

A_k = (r_k - mean of the group) / std of the group, A = sum of w_k A_k, then (A - mean) / std over the batch. Written
from the formulas; no peer's code ran. Deviations are of samples (n - 1), as in the peers, 1e-6 is added to a group's,
and a constant group has A_k = 0.
Usage: python tests/golden/gdpo.py
"""

import json
from pathlib import Path

import numpy as np

generator = np.random.default_rng(11)
cases = []
for num_groups, num_responses, weights in ((1, 7, [1.0]), (5, 3, [1.0, 0.5]), (7, 8, [0.2, 1.0, -0.7])):
    shape = (num_groups, num_responses)
    rewards = [generator.integers(0, 2, shape) * 1.0, generator.normal(0, 0.01, shape), generator.normal(5, 30, shape)]
    rewards = rewards[: len(weights)]
    rewards[0][0, :] = np.arange(num_responses) % 2
    if num_groups > 1:
        rewards[0][1, :] = 1.0
    sums = np.zeros(shape)
    for weight, values in zip(weights, rewards, strict=True):
        for group in range(num_groups):
            row = values[group]
            if np.ptp(row) > 0:
                sums[group] += weight * (row - np.mean(row)) / (np.std(row, ddof=1) + 1e-6)
    advantages = (sums - np.mean(sums)) / np.std(sums, ddof=1)
    cases.append({"weights": weights, "rewards": [r.tolist() for r in rewards], "advantages": advantages.tolist()})
Path(__file__).with_suffix(".json").write_text(json.dumps({"cases": cases}) + "\n")
