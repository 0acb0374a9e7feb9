"""Plans carried out, tile by tile."""
