"""What the measurements of soft top-k promise, and their table and plot."""
