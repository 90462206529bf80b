"""What goes in: images, prompts, and where one stands in the other."""
