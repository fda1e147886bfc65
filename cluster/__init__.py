"""Where and how the work runs, never what is computed."""
