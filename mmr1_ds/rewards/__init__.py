"""Verifiable rewards: built-in ones, the user's own files, and the processes that run them."""
