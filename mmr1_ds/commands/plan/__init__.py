"""What a run will take of memory and time, reckoned from shapes and datasheets before anything is queued."""
