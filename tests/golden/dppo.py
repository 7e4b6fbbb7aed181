"""Write dppo.json: the losses of DPPO (arXiv 2602.04879, binary divergences) by their formulas, in plain Python.

A token is masked where its advantage would take its probability p further from the old one q than a bound on the
divergence allows; else its loss is -A log p min(p / q, 20), the last factor a constant. Written from the formulas; no
peer's code ran.
Usage: python tests/golden/dppo.py
"""

import json
import math
import random
from pathlib import Path

NUM_TOKENS, BOUNDS = 401, [(0.2, 0.3), (0.05, 0.02), (1e-3, 1e-2)]

generator = random.Random(17)
tokens = []
for _ in range(NUM_TOKENS):
    q = generator.random() ** generator.choice([0.05, 1, 6, 40])
    p = 1 / (1 + (1 / q - 1) * math.exp(generator.gauss(0, 1.5)))  # odds moved by a factor
    tokens.append((p, q, generator.gauss(0, 1) if generator.random() < 0.9 else 0.0))
tokens += [(0.9, 1e-7, -1.0), (0.9, 1e-7, 1.0)]  # a token that became likely


def divergence(kind, p, q):
    if kind == "dppo_tv":
        return abs(p - q)
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


cases = []
for kind in ("dppo_tv", "dppo_kl"):
    for low, high in BOUNDS:
        losses, gradients, higher, lower = [], [], 0, 0
        for p, q, advantage in tokens:
            far = divergence(kind, p, q)
            rises = advantage > 0 and p > q and far > high
            falls = advantage < 0 and p < q and far > low
            weight = 0.0 if rises or falls else min(p / q, 20.0)
            losses.append(-weight * advantage * math.log(p))
            gradients.append(-weight * advantage)
            higher, lower = higher + rises, lower + falls
        assert 0 < higher < len(tokens) and 0 < lower < len(tokens)
        cases.append({"kind": kind, "low": low, "high": high, "loss": losses, "gradient": gradients,
                      "higher": higher, "lower": lower})  # fmt: skip
columns = {
    "logprobs": [math.log(p) for p, _, _ in tokens],
    "old_logprobs": [math.log(q) for _, q, _ in tokens],
    "advantages": [advantage for _, _, advantage in tokens],
}
Path(__file__).with_suffix(".json").write_text(json.dumps(columns | {"cases": cases}) + "\n")
