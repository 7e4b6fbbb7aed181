"""Write clip_cov.json: Clip-Cov (arXiv 2505.22617) by its formulas, in plain Python, all eligible tokens cut.

Eligible is a token whose (A - mean A) (log p - mean log p) lies between two bounds and which the clip leaves alone;
with a ratio that lets all of them be cut nothing is random. verl 0.8.0's compute_policy_loss_clip_cov was run on the
same numbers (float64, token-mean): loss and gradient are equal to 1e-15.
Usage: python tests/golden/clip_cov.py
"""

import json
import math
import random
from pathlib import Path

NUM_TOKENS, CLIP_LOW, CLIP_HIGH, LOW, HIGH = 401, 0.2, 0.28, 0.5, 2.5

generator = random.Random(29)
logprobs = [-abs(generator.gauss(0, 2)) for _ in range(NUM_TOKENS)]
old = [value + generator.gauss(0, 0.2) for value in logprobs]
advantages = [generator.gauss(0.3, 1.2) for _ in range(NUM_TOKENS)]

mean_logprob, mean_advantage = sum(logprobs) / NUM_TOKENS, sum(advantages) / NUM_TOKENS
losses, gradients, between, cut = [], [], [], []
for new, before, advantage in zip(logprobs, old, advantages, strict=True):
    ratio = math.exp(new - before)
    plain, clipped = -advantage * ratio, -advantage * min(max(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH)
    is_clipped = clipped > plain
    is_between = LOW < (advantage - mean_advantage) * (new - mean_logprob) < HIGH
    is_cut = is_between and not is_clipped
    losses.append(0.0 if is_cut else max(plain, clipped))
    gradients.append(0.0 if is_cut or is_clipped else plain)
    between.append(is_between)
    cut.append(is_cut)
assert 20 < sum(cut) < sum(between) < 200
Path(__file__).with_suffix(".json").write_text(
    json.dumps({
        "clip": [CLIP_LOW, CLIP_HIGH], "bounds": [LOW, HIGH], "logprobs": logprobs, "old_logprobs": old,
        "advantages": advantages, "between": between, "cut": cut, "loss": losses, "gradient": gradients,
    }) + "\n"
)  # fmt: skip
