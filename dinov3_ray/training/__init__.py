"""What a training loop needs of a teacher; no Ray."""
