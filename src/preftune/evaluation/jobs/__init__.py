"""Evaluation by other programs: lm-evaluation-harness, any command, jobs of Slurm and of Beaker.

Each file is one kind of job. `calls` keeps what has run, so that nothing runs twice; `scores` is
what they find, in one form.
"""
