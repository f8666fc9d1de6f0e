"""`python -m qzo`."""

from qzo.cli import main

main()
