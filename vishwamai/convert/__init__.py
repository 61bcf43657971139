"""Hugging Face checkpoints to ours and back: one name table per family serves both directions."""
