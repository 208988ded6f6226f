"""What attnprobe costs, measured: each measurement in its own process, ratios side by side."""
