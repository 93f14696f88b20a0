"""Published models by name: a file of data per system, a row per model."""
