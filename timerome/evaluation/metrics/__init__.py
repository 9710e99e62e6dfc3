"""Published metrics as pure functions of log-probabilities, hits and texts; no model in sight."""
