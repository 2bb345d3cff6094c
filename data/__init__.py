"""Data: datasets to rows, tokens, plans and packed batches. Nothing in here needs a model."""
