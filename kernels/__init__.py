"""Triton kernels. Imported as s1engine.kernels, by s1engine.ops.triton_ops only."""
