"""Published checkpoints: reading and writing files, mapping tensors."""
