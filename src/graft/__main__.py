"""``python -m graft``: the same as the ``graft`` command (and what torchrun starts)."""

from graft.cli.main import main

if __name__ == "__main__":
    main()
