"""`python -m preftune` is the `preftune` command."""

from preftune.cli.main import entrypoint

if __name__ == "__main__":
    entrypoint()
