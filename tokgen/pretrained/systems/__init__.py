"""The published systems, a file each: its config, its keys, what its fixture computes."""
