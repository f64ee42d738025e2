"""What outlives the process: snapshots of a session, and the log of features that holds the far past."""
