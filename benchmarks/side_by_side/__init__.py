"""preftune and TRL side by side: what `benchmarks/against_trl.py` is made of.

Every measured thing runs in a process of its own (`worker`), which the parent starts and reads
(`jobs`). The parent imports no torch: a child's peak memory starts from that of its parent.
"""
