"""`python -m smartlab`: the command line, also under launchers such as torchrun."""

from smartlab.cli.app import main

main()
