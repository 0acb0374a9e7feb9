"""Integer geometry: regions of maps, how operators map them, windows of tensors."""
