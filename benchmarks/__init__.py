"""What attnprobe costs in time and memory, as ratios to a plain forward pass or training step."""
