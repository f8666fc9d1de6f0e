"""What is trained besides the scales, or instead: norms, biases, the head, LoRA, a prefix."""
