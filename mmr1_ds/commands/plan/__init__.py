"""The memory and time of a run, estimated from shapes and datasheets before anything is queued."""
