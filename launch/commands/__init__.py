"""The commands of `rdt`: a file for each, with its options and its function."""
