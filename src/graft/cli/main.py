"""The ``graft`` command."""


def main() -> None:
    """Parses the command line and runs one verb."""
    raise SystemExit("no verbs yet")
