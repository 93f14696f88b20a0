"""The demo: a tokenizer and generators on procedural shapes, and the page that shows them."""
