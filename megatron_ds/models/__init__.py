"""Model cores: each a list of stages built from layers."""
