"""Will it fit: bytes by part, before anything runs."""
