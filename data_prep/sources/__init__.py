"""Sources of text: files, compressed files and Hugging Face datasets, read as documents."""
