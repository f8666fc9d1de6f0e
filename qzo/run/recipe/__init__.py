"""What a run is told: keys, presets, which go together, reading."""
