"""The typed Python API behind the command line."""
