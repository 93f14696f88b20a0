"""Configs: read, migrated from earlier words, checked, and built."""
