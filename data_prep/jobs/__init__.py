"""The machinery of a prep job: its working directory, step runner, worker processes, leases and progress lines."""
