"""A run: settings, building the model, what is written to disk, optimiser, encoding in parts or once."""
