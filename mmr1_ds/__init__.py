"""mmr1_ds: GRPO with Variance-Aware Sampling on DeepSpeed ZeRO-3 and vLLM."""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    # `python -m mmr1_ds...`, which puts the folder of the call first: a random.py there is not the library's.
    sys.path.append(sys.path.pop(0))
