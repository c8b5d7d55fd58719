"""The porch: one script per verb, each a page that calls one function of each wing."""
