"""The topology file: schema, loader with line numbers, cross-field checks. No Ray import."""
