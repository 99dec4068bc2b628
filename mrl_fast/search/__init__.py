"""Prefix dot products for top-k, rerank and funnels, and the index over them."""
