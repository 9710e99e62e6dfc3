"""Commands that are more than a few lines; :mod:`timerome.cli` lists them all."""
