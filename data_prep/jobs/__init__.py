"""The machinery of a prep job: its working directory, its steps, the cluster that runs them, and progress lines."""
