"""What images and tokens are worth, in numbers."""
