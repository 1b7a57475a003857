"""pytest-benchmark over the registry: `pytest bench/suite --workload llama3.1-8b-r8192`."""
