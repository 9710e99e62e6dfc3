"""One module a benchmark: what its files hold, what is asked, which numbers come of it."""
