"""What a run keeps: its steps on disk, their manifests, resuming, imported weights."""
