"""Other projects' models: layers for them that hold packed weights."""
