"""What a person sees in the terminal, and the checks of `qzo doctor`."""
