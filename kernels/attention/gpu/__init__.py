"""Attention on NVIDIA GPUs: cuDNN's kernel where it honours the mask, ours in Pallas Mosaic where it does not."""
