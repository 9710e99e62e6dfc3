"""One module a suite: what is asked, which numbers come of it. Readers of files are in :mod:`timerome.datasets`."""
