"""Sources of text: files, archives and datasets, read as documents."""
