"""Attention: grouped-query and latent, masks, rotary positions, kernels and the cache of keys and values."""
