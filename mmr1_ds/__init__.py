"""mmr1_ds: GRPO with Variance-Aware Sampling on DeepSpeed ZeRO-3 and vLLM."""

__version__ = "0.1.0"
