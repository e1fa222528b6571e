"""Root of the generated packages."""
