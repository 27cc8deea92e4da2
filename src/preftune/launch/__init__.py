"""Starting a command in several processes: here, on given hosts, under Slurm and elsewhere.

Nothing here imports torch: what is wrong with a command line is told at once.
"""
