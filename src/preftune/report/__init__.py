"""`report.html`: what a run was, what its curves say, in one file. Reads files of runs alone."""
