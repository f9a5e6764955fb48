"""The commands of `rdt`, one file each: the options as a dataclass, and the function that takes the command's words.

A file imports nothing heavy (PyTorch, matplotlib) at its top: options are checked first.
"""
