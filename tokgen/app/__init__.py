"""A page to play with: models drawn from, edited with and looked into, in a browser."""
