"""`mmr1-ds data`: a data set as the trainer will see it, shown without a GPU and without the model's weights."""
