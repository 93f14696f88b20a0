"""What several published systems have in common: rows of key tables, settings, checks."""
