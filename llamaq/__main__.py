"""`python -m llamaq …` is the `tune` command, whoever owns the script of that name."""

from llamaq.cli import main

main()
