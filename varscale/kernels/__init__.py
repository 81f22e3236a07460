"""Kernels in C++ for what PyTorch is slow at on a CPU; each is compiled on first use and kept in the user's cache."""
