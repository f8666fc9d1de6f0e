"""What lies on disk: tensors, formats by name, the hub, and writes that are complete or absent."""
