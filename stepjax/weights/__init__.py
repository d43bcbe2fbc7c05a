"""What a weight is: its name, shape, axes and format, and its product."""
