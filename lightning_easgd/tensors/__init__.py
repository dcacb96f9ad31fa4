"""What the package knows of tensors: flat vectors with views, checksums, buffers, numbers that may be tensors."""
