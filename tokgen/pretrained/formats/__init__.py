"""Weight files, read and written without executing anything."""
