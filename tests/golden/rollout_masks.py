"""Write rollout_masks.json: the masks of `algorithm.rollout_mask` by their published formulas, in plain Python.

Token: IcePop (arXiv 2510.18855). Sequence and geometric: masked importance sampling, by the product and the geometric
mean. k3: rejection of responses by the mean of r - 1 - log r. Written from the formulas; no peer's code ran.
Usage: python tests/golden/rollout_masks.py
"""

import json
import math
import random
from pathlib import Path

LENGTHS, BOUNDS = [1, 7, 3, 12, 5, 0, 2], [(0.5, 2.0), (0.9, 1.1), (0.0, 1.05)]

generator = random.Random(7)
rows = [[generator.gauss(0, 0.25) for _ in range(length)] for length in LENGTHS]  # log(trainer / rollout)


def inside(value, low, high):
    return float(low <= value <= high)


def masks(row, low, high):
    if not row:
        return {"token": [], "sequence": [], "geometric": [], "k3": []}
    ratios = [math.exp(value) for value in row]
    product = math.prod(ratios)
    k3 = sum(ratio - 1 - math.log(ratio) for ratio in ratios) / len(row)
    return {
        "token": [inside(ratio, low, high) for ratio in ratios],
        "sequence": [inside(product, low, high)] * len(row),
        "geometric": [inside(product ** (1 / len(row)), low, high)] * len(row),
        "k3": [float(k3 <= high / 50)] * len(row),
    }


cases = []
for low, high in BOUNDS:
    found = [masks(row, low, high) for row in rows]
    together = {name: [kept for part in found for kept in part[name]] for name in found[0]}
    cases.append({"low": low, "high": high, "k3_high": high / 50, "kept": together})
path = Path(__file__).with_suffix(".json")
log_ratios = [value for row in rows for value in row]
path.write_text(json.dumps({"lengths": LENGTHS, "log_ratios": log_ratios, "cases": cases}) + "\n")
