"""Images edited: which pixels are drawn anew, which tokens that frees, and how both are joined."""
