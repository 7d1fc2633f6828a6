"""Side-by-side measurements against peers. Run with ``python -m benchmarks NAME``; never part of the tests."""
