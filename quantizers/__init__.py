"""What 4-bit tensors in a file mean, one file per format, and how their codes are made."""
