"""Images: sources that are read region by region, data sets, tile stores, and generated UltraMNIST sets."""
