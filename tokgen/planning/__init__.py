"""A run before it runs: whether it fits, how long it takes, and what it waits for."""
