"""The search for layouts: candidates, lower bounds, and run files of the best."""
