"""What the measurements of attention promise, their table and plot, and its peak memory."""
