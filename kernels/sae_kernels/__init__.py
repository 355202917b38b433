"""Triton kernels; the plain-torch reference of each lives in sae.ops."""
