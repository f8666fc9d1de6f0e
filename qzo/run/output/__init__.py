"""What a run leaves behind: adapter, snapshots, metrics, card, and the exported checkpoint."""
