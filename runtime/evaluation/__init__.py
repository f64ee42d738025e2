"""Is it right? Data sets and their scores, and traces of what was computed, compared."""
