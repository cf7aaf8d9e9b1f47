"""What is compared with peers: one script per table, started as `python -m benchmarks.NAME`."""
