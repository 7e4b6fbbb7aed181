"""Data sets, chat templates, images: from the user's files to `records.Prompt`."""
