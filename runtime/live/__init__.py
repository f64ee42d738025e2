"""Watching: one camera or several, standing questions and typed ones, and what hangs beside the frames."""
