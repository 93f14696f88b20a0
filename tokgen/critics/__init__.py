"""Networks that judge images: discriminators and perceptual distances."""
