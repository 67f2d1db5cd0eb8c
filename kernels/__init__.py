"""Triton kernels, each beside its launcher; ``s1engine.ops.triton_ops`` alone uses them to serve.

A docstring starts with the kernel's formula. Shapes: T tokens and B sequences of a step, Hq/Hkv
query/KV heads, G = Hq / Hkv, D head size, S block size, V vocabulary, H hidden, F intermediate, N/K
rows and columns of a weight. Constexprs are capitals, BLOCK_X the size of a tile along X.
``launch_table`` holds every launch's tiles; ``compile_report`` shows what they compile to.
"""
