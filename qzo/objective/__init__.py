"""What is minimised or rewarded: batches, losses, rewards, evaluation."""
