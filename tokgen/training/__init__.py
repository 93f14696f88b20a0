"""Training: states, optimizers, the steps of a tokenizer and of its discriminator."""
