"""ZeRO-3's shards as whole weights, in checkpoints, in exports, in host memory."""

CONVERTED = "universal"  # a part's folder for any number of ranks, made when one is loaded; not in the manifest
