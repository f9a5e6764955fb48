"""The training loop and what it needs beside the engine."""
