"""Images: sources that are read region by region, and generated ones for the demo."""
