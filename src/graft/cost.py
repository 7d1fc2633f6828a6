"""What a config costs before it runs."""
