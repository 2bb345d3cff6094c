"""The trainer: recipe, model, forward pass, reference, training loop, saving."""
